"""One side of the step benchmark as a process: it does a training step whenever it is told to.

    python -m benchmarks.sides ours|trl SETTINGS

SETTINGS are those of `Settings`, as json. Each line read from stdin starts a step; the answer is a line `@ ` and json:
its seconds, and the peak resident memory of the process so far.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.generate import GivenLengths
from benchmarks.workloads import SMOLLM2, WORKLOADS, Workload

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KL_COEF = 0.04
LEARNING_RATE = 1e-6
PARTS = ("rollout", "statistics", "update", "logging")


@dataclass(frozen=True)
class Settings:
    """What both sides do. `prompts` and `tokens` cut the workload down; micro_batch is rows in a pass.

    On `cuda` weights are bfloat16.
    """

    workload: str
    lengths: str
    reference: bool
    updates: int
    micro_batch: int
    steps: int
    prompts: int
    tokens: int
    device: str = "cpu"

    def work(self) -> Workload:
        """Return the workload, cut down."""
        whole = WORKLOADS[self.workload]()
        if self.device == "cuda":
            whole.model.to(self.device, torch.bfloat16)
        return replace(whole, prompts=whole.prompts[: self.prompts], max_new_tokens=self.tokens)

    def response_lengths(self, work: Workload) -> Tensor:
        """Return the length of each response, prompt-major."""
        return work.full_lengths() if self.lengths == "full" else work.geometric_lengths()

    def tokenizer(self, work: Workload) -> PreTrainedTokenizerBase:
        """Return the workload's tokenizer; W1 has a word for each id."""
        if self.workload == "W2":
            return SMOLLM2.tokenizer()
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast

        words = {f"w{i}": i for i in range(work.model.config.vocab_size)}
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="w2")),
            pad_token=f"w{work.pad_id}",
            eos_token=f"w{work.eos_id}",
        )


def score(row: int) -> float:
    """Return the reward of a response by its place: groups are not tied, and nothing is spent on judging."""
    return (7 * row * row + row) % 5 / 4


class Turns:
    """Waits for a line before each step and answers with its seconds."""

    def __init__(self, device: str) -> None:
        self._start, self.device = 0.0, device

    def begin(self) -> None:
        """Wait for the word to begin."""
        if not sys.stdin.readline():
            sys.exit()
        self._start = time.perf_counter()

    def end(self, parts: dict[str, float] | None = None) -> None:
        """Report, with the seconds of parts of the step if those are known."""
        record.wait(self.device)
        seconds = time.perf_counter() - self._start
        peak = (torch.cuda.max_memory_allocated() if self.device == "cuda" else record.peak_bytes()) / 2**30
        print("@", json.dumps({"seconds": seconds, "peak_gib": peak, **(parts or {})}), flush=True)


def ours(settings: Settings, turns: Turns) -> None:
    """`fit` with this package: its module, engine and trainer, and as little else as it lets one have."""
    import lightning

    from lightning_rlvr.curriculum import Curriculum
    from lightning_rlvr.models.source import Policy, PolicySource
    from lightning_rlvr.objectives import DAPO
    from lightning_rlvr.training import RLVRDataModule, RLVRModule
    from lightning_rlvr.types import Prompt, Reward, Sampling, Status, Task, Verdict

    work = settings.work()
    lengths, tokenizer = settings.response_lengths(work), settings.tokenizer(work)

    class Source(PolicySource):
        def tokenizer(self) -> PreTrainedTokenizerBase:
            return tokenizer

        def prepare(self) -> None: ...

        def load(self) -> Policy:
            return Policy(work.model, tokenizer)

        def fingerprint(self) -> str:
            return work.name

    class ByPlace(Reward):
        def __call__(self, responses: Any, prompts: Any) -> list[Verdict]:
            return [Verdict(score(row), Status.WRONG) for row in range(len(responses))]

    class Prompts(Task):
        def load(self) -> list[Prompt]:
            return [Prompt(str(i), str(i), "") for i in range(len(work.prompts))]

    class Module(RLVRModule):
        @property
        def engine(self) -> GivenLengths:
            engine = GivenLengths(self.policy, [work.eos_id], work.pad_id, self.rollout_rows)
            engine.lengths = lengths.to(work.model.device)
            return engine

        def encode(self, text: str) -> list[int]:
            return work.prompts[int(text)]

    class Steps(lightning.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            self.before = dict(module.clock.seconds)
            turns.begin()

        def on_train_batch_end(self, *args: Any) -> None:
            turns.end({part: module.clock.seconds[part] - self.before.get(part, 0.0) for part in PARTS})

    module = Module(
        Source(),
        DAPO(kl_coef=KL_COEF if settings.reference else 0.0),
        ByPlace(),
        Sampling(work.max_new_tokens),
        optimizer=partial(torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
        updates_per_rollout=settings.updates,
        micro_batch_size=settings.micro_batch,
        pass_at=[1],
    )
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator=settings.device,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Steps()],
    )
    order = Curriculum(order="shuffled", stages=1, epochs=settings.steps)
    data = RLVRDataModule(Prompts(), None, None, work.group_size, len(work.prompts), curriculum=order)
    trainer.fit(module, data)


def trl(settings: Settings, turns: Turns) -> None:
    """The same with TRL's GRPOTrainer, at its best settings."""
    from datasets import Dataset
    from transformers import LogitsProcessorList, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    work = settings.work()
    lengths, tokenizer = settings.response_lengths(work), settings.tokenizer(work)
    folder = tempfile.TemporaryDirectory()
    work.model.save_pretrained(folder.name)  # GRPOTrainer loads policy and reference itself
    work = replace(work, model=None)
    parts = len(lengths) // settings.micro_batch

    class Trainer(GRPOTrainer):
        def _tokenize_prompts(self, prompts: list[str]) -> Any:
            return [work.prompts[int(prompt)] for prompt in prompts], None, {}

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step % settings.updates == 0:
                turns.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step % settings.updates == 0:
                turns.end()

    def given_lengths(width: int) -> Callable[[Tensor, Tensor], Tensor]:
        def only_then(input_ids: Tensor, scores: Tensor) -> Tensor:
            scores[:, work.eos_id] = -torch.inf
            ends = lengths.to(scores.device)
            ending = ends == input_ids.shape[1] - width + 1
            ending &= ends < work.max_new_tokens
            scores[ending] = -torch.inf
            scores[ending, work.eos_id] = 0.0
            return scores

        return only_then

    config = GRPOConfig(
        output_dir=folder.name,
        max_steps=settings.steps * settings.updates,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=parts // settings.updates,
        steps_per_generation=parts,
        num_generations=work.group_size,
        max_completion_length=work.max_new_tokens,
        beta=KL_COEF if settings.reference else 0.0,
        loss_type="dapo",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        temperature=1.0,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=settings.device == "cuda",
        use_cpu=settings.device == "cpu",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "bfloat16" if settings.device == "cuda" else "float32"},
    )
    trainer = Trainer(
        model=folder.name,
        reward_funcs=lambda completions, **rest: [score(row) for row in range(len(completions))],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(len(work.prompts))]}),
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    generate = trainer.model.generate

    def with_lengths(**inputs: Any) -> Tensor:
        processors = LogitsProcessorList([given_lengths(inputs["input_ids"].shape[1])])
        out = generate(**inputs, logits_processor=processors)
        assert out.shape[1] == inputs["input_ids"].shape[1] + int(lengths.max())
        return out

    trainer.model.generate = with_lengths
    trainer.train()
    folder.cleanup()


if __name__ == "__main__":
    told = Settings(**json.loads(sys.argv[2]))
    {"ours": ours, "trl": trl}[sys.argv[1]](told, Turns(told.device))
