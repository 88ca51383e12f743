"""Responses of a model to the questions of benchmarks, stored problem by problem."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_rlvr.models import PolicySource, PromptFormat
from lightning_rlvr.models.length import check_length
from lightning_rlvr.models.source import decode
from lightning_rlvr.rewards.identity import shown
from lightning_rlvr.rollout import Served, ServedEngine, TransformersEngine, seed_of
from lightning_rlvr.store import Record, Store
from lightning_rlvr.types import Engine, Prompt, Sampling, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Generation:
    """How responses are sampled; the last three settings change memory and speed only."""

    samples: int
    sampling: Sampling
    prompt_format: PromptFormat
    seed: int
    prompts_per_batch: int
    rollout_rows: int
    device: str | None

    def __post_init__(self) -> None:
        for key in ("samples", "prompts_per_batch", "rollout_rows"):
            if getattr(self, key) < 1:
                raise UserError(f"{key} must be at least 1, got {getattr(self, key)}. Set {key}.")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise UserError(
                f"samples must be 1 where the temperature is 0, got {self.samples}: all responses to a problem would "
                "be the same. Set samples or sampling.temperature."
            )

    def manifest(self, source: PolicySource | Served, questions: Sequence[Prompt]) -> dict[str, Any]:
        """Return what the responses depend on; equal manifests mean equal responses."""
        return {
            "policy": source.fingerprint(),
            "prompt_format": shown(self.prompt_format, "prompt_format"),
            "samples": self.samples,
            **asdict(self.sampling),
            "seed": self.seed,
            "questions": len(questions),
            "texts": texts_digest(questions),
        }

    def chosen_device(self) -> torch.device:
        """Return the device models run on: the one set, else a GPU, else the CPU.

        Raises: UserError if it is not there.
        """
        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"device must be one that this machine has, got {name!r}: {reason}. Set device.") from error


def texts_digest(questions: Sequence[Prompt]) -> str:
    """Hash what is asked, and in which order; gold answers do not matter to responses."""
    return hashlib.sha256("\n".join(repr((p.uid, p.text)) for p in questions).encode()).hexdigest()


def sample(
    name: str,
    source: PolicySource | Served,
    suite: Mapping[str, tuple[Sequence[Prompt], Store]],
    generation: Generation,
) -> None:
    """Sample what is missing of a model's responses, from questions by benchmark into their stores, and finish these.

    The model is loaded only if something is missing. A batch is stored as soon as it is sampled. Batches are cut from
    all questions, so a run that was killed samples the very batches that it would have.
    """
    from tqdm import tqdm

    total = sum(len(questions) for questions, _ in suite.values())
    with tqdm(total=total, desc=name, unit=" problems", mininterval=1.0) as bar:
        model: _Model | None = None
        for benchmark, (questions, store) in suite.items():
            bar.set_postfix_str(benchmark)
            with store.claim():
                store.check()
                done = store.done()
                bar.initial += len(done)
                bar.update(len(done))
                for batch in _batches(questions, generation.prompts_per_batch):
                    if missing := [prompt for prompt in batch if prompt.uid not in done]:
                        model = model or _load(name, source, suite, generation)
                        store.append(_respond(model, missing, generation))
                        bar.update(len(missing))
                store.finish([prompt.uid for prompt in questions])


def _batches(questions: Sequence[Prompt], size: int) -> list[Sequence[Prompt]]:
    return [questions[i : i + size] for i in range(0, len(questions), size)]


class _Model(NamedTuple):
    """What responds, and the tokenizer it reads by."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase


def _load(
    name: str,
    source: PolicySource | Served,
    suite: Mapping[str, tuple[Sequence[Prompt], Store]],
    generation: Generation,
) -> _Model:
    try:
        if isinstance(source, Served):
            tokenizer = source.tokenizer()
            return _Model(ServedEngine(source, tokenizer), tokenizer)
        policy = source.load()
        encode = generation.prompt_format.encode
        longest = max(len(encode(policy.tokenizer, p.text)) for questions, _ in suite.values() for p in questions)
        check_length(policy.model, longest, generation.sampling.max_new_tokens, "sampling.max_new_tokens or benchmarks")
    except UserError as error:
        raise UserError(f"model {name!r}: {error}") from error
    policy.model.to(generation.chosen_device())  # type: ignore[arg-type]
    return _Model(TransformersEngine.of(policy, generation.rollout_rows), policy.tokenizer)


def _respond(model: _Model, questions: Sequence[Prompt], generation: Generation) -> list[Record]:
    """Sample the responses to some questions: one record a question, with lists over its responses."""
    prompts = [generation.prompt_format.encode(model.tokenizer, prompt.text) for prompt in questions]
    seeds = [seed_of(generation.seed, "evaluate", prompt.uid) for prompt in questions]
    rollouts = model.engine.generate(prompts, seeds, generation.samples, generation.sampling)
    responses = decode(model.tokenizer, rollouts)
    logp = rollouts.logp.double().sum(dim=1).tolist()
    entropy = (rollouts.entropy.double().sum(dim=1) / rollouts.mask.sum(dim=1)).tolist()
    records = []
    for i, prompt in enumerate(questions):
        rows = slice(i * generation.samples, (i + 1) * generation.samples)
        records.append(
            {
                "uid": prompt.uid,
                "prompt": prompt.text,
                "response": [r.text for r in responses[rows]],
                "tokens": [r.tokens for r in responses[rows]],
                "truncated": [r.truncated for r in responses[rows]],
                "logp": logp[rows],
                "entropy": entropy[rows],
            }
        )
    return records
