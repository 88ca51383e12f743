"""What `preflight` says of memory against what training takes: resident memory of a CPU, float32.

    python -m benchmarks.memory [--cases small wide smollm2_shape]

Each case is a model of random weights in a folder of its own, and a process that trains it for two rollout batches
whose responses nearly all reach their limit. Measured is the process's greatest resident memory less what it has after
all imports, before it loads the model. The process's heap keeps what small tensors have freed, and pages of the
weights' file count as resident: on small models both show. Writes benchmarks/results/memory.json.
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
from typing import Any

import torch

from benchmarks import record
from benchmarks.sides import score


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
    import lightning

    from lightning_rlvr import preflight
    from lightning_rlvr.curriculum import Curriculum
    from lightning_rlvr.models import Pretrained
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
        Pretrained(str(folder)),
        SENT(),
        ByPlace(),
        Sampling(case.response_tokens),
        optimizer=partial(torch.optim.AdamW, lr=1e-6),
        micro_batch_size=case.micro_batch,
        pass_at=[1],
    )
    order = Curriculum(order="shuffled", stages=1, epochs=2)
    data = RLVRDataModule(Numbers(), None, None, case.samples, case.prompts, curriculum=order)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401 - part of the baseline

    module.policy_source.tokenizer()
    before = record.peak_bytes()
    trainer.fit(module, data)
    measured = record.peak_bytes() - before
    found = preflight.inspect(data, module, {"trainer": {"accelerator": "cpu", "devices": 1}})
    return {
        "baseline_mib": round(before / 2**20, 1),
        "measured_mib": round(measured / 2**20, 1),
        "preflight_mib": round(found.memory.peak / 2**20, 1),
        "ratio": round(found.memory.peak / measured, 3),
        "parts_mib": {name: round(size / 2**20, 1) for name, size in found.memory.parts.items()},
        "moments_mib": {name: round(size / 2**20, 1) for name, size in found.memory.totals.items()},
    }


def main() -> None:
    """Measure each case in a process of its own and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--train", type=Path, help="folder of the one case's model: measure in this process")
    chosen = parser.parse_args()
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
