"""One rollout batch: the questions, what was sampled, what it was worth, and the metrics of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning import Callback
from torch import Tensor

from lightning_rlvr.training.distributed import reduce_ratios, world_size
from lightning_rlvr.types import (
    Objective,
    Prompt,
    Ratio,
    Response,
    Rollouts,
    Status,
    TokenBatch,
    TokenPlan,
    TokenStats,
    Verdict,
)

if TYPE_CHECKING:
    from lightning_rlvr.training.module import RLVRModule


class PromptBatch:
    """Questions and how many responses to sample for each.

    Neither tuple nor dataclass: Lightning walks through those and refuses frozen dataclasses in them.
    """

    def __init__(self, prompts: list[Prompt], samples: int) -> None:
        self.prompts, self.samples = prompts, samples


class Experience(NamedTuple):
    """One rollout batch with its verdicts; rows are prompt-major."""

    prompts: list[Prompt]  # one a row
    rollouts: Rollouts
    responses: list[Response]
    verdicts: list[Verdict]
    ids: list[int]  # unique: by run, rollout batch, question and number of the response

    def rows(self, part: slice) -> Experience:
        """Return the given rows."""
        return Experience(
            self.prompts[part], self.rollouts.rows(part), self.responses[part], self.verdicts[part], self.ids[part]
        )

    def to(self, device: torch.device | str) -> Experience:
        """Return it with its tensors on a device."""
        return self._replace(rollouts=self.rollouts.to(device))

    def samples(self) -> list[dict[str, Any]]:
        """Return one plain record a row, for tables and files."""
        entropy = self.rollouts.entropy.sum(1) / self.rollouts.mask.sum(1)
        lengths = self.rollouts.mask.sum(1)
        return [
            {
                "uid": prompt.uid,
                "prompt": prompt.text,
                "gold": prompt.answer,
                "response": response.text,
                "answer": verdict.answer,
                "status": verdict.status.value,
                "reward": verdict.score,
                "tokens": int(length),
                "truncated": response.truncated,
                "entropy": float(h),
            }
            for prompt, response, verdict, length, h in zip(
                self.prompts, self.responses, self.verdicts, lengths, entropy, strict=True
            )
        ]


class StepRecord(NamedTuple):
    """All that was known of a rollout batch when its updates began; of this rank's rows."""

    experience: Experience
    stats: TokenStats
    plan: TokenPlan
    ref_logp: Tensor | None
    group_size: int
    number: int  # of the rollout batches that were trained on, counted from 1


class StepObserver(Callback):
    """A callback that is shown each rollout batch. Subclasses override what they need."""

    def on_sampled(self, module: RLVRModule, batch: PromptBatch, experience: Experience) -> None:
        """See what was sampled and judged for a batch of questions; dynamic sampling may keep it back or drop it."""

    def on_planned(self, module: RLVRModule, record: StepRecord) -> None:
        """See a rollout batch before the policy is updated on it."""

    def on_updated(self, module: RLVRModule, record: StepRecord, clipped: Tensor) -> None:
        """See it after its updates; `clipped` [N, T] marks tokens whose gradient the clip had cut."""


def describe(experience: Experience, stats: TokenStats, plan: TokenPlan, group_size: int) -> dict[str, Ratio]:
    """Return the metrics of a rollout batch: rewards, verdicts, lengths, entropy, shares of token classes."""
    rollouts, verdicts = experience.rollouts, experience.verdicts
    rows, tokens = torch.tensor(len(verdicts)), stats.mask.sum()

    def of_rows(values: Sequence[float] | Tensor) -> Ratio:
        return Ratio(torch.as_tensor(values, dtype=torch.float64).sum(), rows)

    def of_tokens(values: Tensor) -> Ratio:
        return Ratio(values.masked_fill(~stats.mask, 0).double().sum(), tokens)

    tied = (stats.advantage.view(-1, group_size) == 0).all(dim=1)
    metrics = {
        "reward": of_rows([v.score for v in verdicts]),
        "accuracy": of_rows([float(v.correct) for v in verdicts]),
        "response_length": of_rows(stats.mask.sum(dim=1)),
        "truncated": of_rows(rollouts.truncated),
        "entropy": of_tokens(stats.entropy),
        "tied_groups": Ratio(tied.sum(), torch.tensor(len(tied))),
    }
    metrics |= {f"status/{s.value}": of_rows([float(v.status is s) for v in verdicts]) for s in Status}
    metrics |= {f"reward/{part}": of_rows([v.parts[part] for v in verdicts]) for part in verdicts[0].parts}
    metrics |= {f"share/{name}": of_tokens(chosen) for name, chosen in plan.classes.items()}
    return metrics


def pull_covariance(objective: Objective, record: StepRecord) -> Ratio:
    """Return Cov(log pi, a) over the counted tokens of the rollout batch of all ranks, which all must take part in.

    a is the pull of the loss on a token: its advantage as the objective shaped it, less the gradients of its KL and
    drift, all on policy, times the number of tokens. Where a policy is a table, a natural gradient step of size eta
    changes its mean token entropy by about -eta times this (nats; a plain one has pi * a in the place of a). Over
    several updates on one batch it is summed. An entropy bonus and the exact KL, which do not pull through the sampled
    tokens, are not in it.

    Source: covariance theory of entropy, arXiv 2505.22617; with the KL, arXiv 2512.04359.
    """
    stats = record.stats
    kept = stats.logp.double().masked_fill(~stats.mask, 0.0)
    mean = reduce_ratios({"logp": Ratio(kept.sum(), stats.mask.sum())})["logp"]
    # The weights of the loss hold its denominators, so this sum is the mean; ranks' sums add up.
    total = ((kept - mean) * _pull(objective, record)).masked_fill(~stats.mask, 0.0).sum()
    return Ratio(total * world_size(), torch.ones(()))


def _pull(objective: Objective, record: StepRecord) -> Tensor:
    """Return how fast the loss falls as each token's log-probability rises, where the policy is the old one [N, T]."""
    stats = record.stats
    with torch.enable_grad():
        logp = stats.logp.detach().clone().requires_grad_()
        full_kl = torch.zeros_like(stats.logp)
        tokens = TokenBatch(logp, stats.logp, stats.mask, record.ref_logp, stats.entropy, full_kl)
        (gradient,) = torch.autograd.grad(objective.loss(tokens, record.plan).loss, logp)
    return -gradient.double()
