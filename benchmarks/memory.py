"""What `preflight` says of memory against what training takes: resident memory of a CPU, float32; tensors of a GPU.

    python -m benchmarks.memory [--cases small wide smollm2_shape]
    python -m benchmarks.memory --gpu        # Qwen2.5-1.5B with random weights and the settings of sent_1.5b.yaml

Each case is a model of random weights in a folder of its own, and a process that trains it for two rollout batches
whose responses nearly all reach their limit. Measured is the process's greatest resident memory less what it has after
all imports, before it loads the model. The process's heap keeps what small tensors have freed, and pages of the
weights' file count as resident: on small models both show. On a GPU it is the most that tensors took, and what the
caching allocator held for them. Writes benchmarks/results/memory.json, memory_gpu.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import record
from benchmarks.sides import score
from benchmarks.workloads import qwen2_1_5b
from lightning_rlvr.models.source import Policy, PolicySource, finish_model

if TYPE_CHECKING:
    from lightning_rlvr.training import RLVRDataModule, RLVRModule


@dataclass(frozen=True)
class Case:
    """A Qwen3 model (sizes as in its config) and the work of a step."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    prompts: int
    samples: int
    prompt_tokens: int
    response_tokens: int
    micro_batch: int


CASES = {
    "small": Case(192, 4, 6, 6, 512, 32, 8, 16, 64, 16),
    "small_one_part": Case(192, 4, 6, 6, 512, 16, 8, 16, 64, 128),
    "wide": Case(256, 4, 4, 2, 100_000, 4, 8, 32, 64, 8),
    "deep": Case(384, 16, 6, 2, 8192, 8, 8, 64, 96, 8),
    "smollm2_shape": Case(576, 30, 9, 3, 49152, 2, 4, 32, 64, 4),
}


def write_model(case: Case, folder: Path) -> None:
    """Write the model with random weights, and a tokenizer of characters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from lightning_rlvr.models.char_tokenizer import char_tokenizer

    tokenizer = char_tokenizer()
    config = Qwen3Config(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 8 // 3,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_heads,
        head_dim=case.hidden // case.heads,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(case: Case, folder: Path) -> dict[str, Any]:
    """Train, and return the greatest resident memory beside preflight's figures."""
    import lightning  # noqa: F401 - this and the next are part of the baseline
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import lightning_rlvr.objectives
    import lightning_rlvr.preflight
    import lightning_rlvr.training  # noqa: F401
    from lightning_rlvr.models import Pretrained

    source = Pretrained(str(folder))
    source.tokenizer()
    before = record.peak_bytes()
    module, data = fit(source, case, 2, {"accelerator": "cpu"}, micro_batch_size=case.micro_batch)
    measured = record.peak_bytes() - before
    return {
        "baseline_mib": round(before / 2**20, 1),
        "measured_mib": round(measured / 2**20, 1),
        **said_of(module, data, {"accelerator": "cpu", "devices": 1}, measured),
    }


def train_recipe() -> dict[str, Any]:
    """Train a model of the shape of Qwen2.5-1.5B as sent_1.5b.yaml says, on as many prompts as fill its rollout rows.

    One rollout batch: its second update meets the optimizer's state.
    """
    case = Case(1536, 28, 12, 2, 151_936, 8, 8, 128, 2048, 1)
    trainer = {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed"}
    module, data = fit(
        RandomQwen(), case, 1, trainer, micro_batch_size=case.micro_batch, rollout_rows=64, updates_per_rollout=2
    )
    measured = torch.cuda.max_memory_allocated()
    return {
        "measured_mib": round(measured / 2**20, 1),
        "reserved_mib": round(torch.cuda.max_memory_reserved() / 2**20, 1),
        **said_of(module, data, trainer, measured),
        "seconds": {name: round(spent, 2) for name, spent in module.clock.seconds.items()},
        "response_tokens": case.prompts * case.samples * case.response_tokens,
    }


class RandomQwen(PolicySource):
    """Qwen2.5-1.5B in float32 with random weights, made where it is used, and a tokenizer of characters."""

    def tokenizer(self) -> Any:
        """Return a tokenizer of fewer tokens than the model has."""
        from lightning_rlvr.models.char_tokenizer import char_tokenizer

        return char_tokenizer()

    def prepare(self) -> None:
        """Do nothing."""

    def fingerprint(self) -> str:
        """Return a name."""
        return "random"

    def load(self) -> Policy:
        """Make the model on the GPU."""
        with torch.device("cuda"):
            return Policy(self._made(), self.tokenizer())

    def skeleton(self) -> Any:
        """Make it without weights."""
        with torch.device("meta"):
            return self._made()

    def _made(self) -> Any:
        from transformers import Qwen2ForCausalLM

        tokenizer = self.tokenizer()
        config = qwen2_1_5b(tokenizer.pad_token_id, tokenizer.eos_token_id)
        return finish_model(Qwen2ForCausalLM(config).float())


def fit(
    source: PolicySource, case: Case, steps: int, trainer: dict[str, Any], **settings: Any
) -> tuple[RLVRModule, RLVRDataModule]:
    """Train for some rollout batches; return module and data."""
    import lightning

    from lightning_rlvr.curriculum import Curriculum
    from lightning_rlvr.objectives import SENT
    from lightning_rlvr.training import RLVRDataModule, RLVRModule
    from lightning_rlvr.types import Prompt, Reward, Sampling, Status, Task, Verdict

    class ByPlace(Reward):
        def __call__(self, responses: Any, prompts: Any) -> list[Verdict]:
            return [Verdict(score(row), Status.WRONG) for row in range(len(responses))]

    class Numbers(Task):
        def load(self) -> list[Prompt]:
            return [Prompt(str(i), f"{i:0{case.prompt_tokens}}", "") for i in range(case.prompts)]

    module = RLVRModule(
        source,
        SENT(),
        ByPlace(),
        Sampling(case.response_tokens),
        optimizer=partial(torch.optim.AdamW, lr=1e-6),
        pass_at=[1],
        **settings,
    )
    order = Curriculum(order="shuffled", stages=1, epochs=steps)
    data = RLVRDataModule(Numbers(), None, None, case.samples, case.prompts, curriculum=order)
    lightning.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **trainer,
    ).fit(module, data)
    return module, data


def said_of(module: RLVRModule, data: RLVRDataModule, trainer: dict[str, Any], measured: int) -> dict[str, Any]:
    """Return what preflight says of a run, and its ratio to what was measured."""
    from lightning_rlvr import preflight

    memory = preflight.inspect(data, module, {"trainer": trainer}).memory
    return {
        "preflight_mib": round(memory.peak / 2**20, 1),
        "ratio": round(memory.peak / measured, 3),
        "parts_mib": {name: round(size / 2**20, 1) for name, size in memory.parts.items()},
        "moments_mib": {name: round(size / 2**20, 1) for name, size in memory.totals.items()},
    }


def main() -> None:
    """Measure each case in a process of its own and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--train", type=Path, help="folder of the one case's model: measure in this process")
    parser.add_argument("--gpu", action="store_true")
    chosen = parser.parse_args()
    if chosen.gpu:
        about = record.about("memory", ("torch", "transformers", "lightning"), gpu=torch.cuda.get_device_name())
        record.keep("memory_gpu", {**about, **train_recipe()})
        print(json.dumps(record.read("memory_gpu"), indent=2))
        return
    if chosen.train is not None:
        print("@", json.dumps(train(CASES[chosen.cases[0]], chosen.train)))
        return
    results = record.read("memory").get("cases", {})
    for name in chosen.cases:
        with tempfile.TemporaryDirectory() as folder:
            write_model(CASES[name], Path(folder))
            command = [sys.executable, "-m", "benchmarks.memory", "--cases", name, "--train", folder]
            said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        line = next(line for line in said.splitlines() if line.startswith("@"))
        results[name] = {**vars(CASES[name]), **json.loads(line[1:])}
        print(name, json.dumps(results[name]), flush=True)
        about = record.about("memory", ("torch", "transformers", "lightning"), torch.get_num_threads())
        record.keep("memory", {**about, "cases": results})


if __name__ == "__main__":
    main()
