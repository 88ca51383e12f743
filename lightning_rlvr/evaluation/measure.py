"""From responses and verdicts to numbers: one value a problem, then means with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from lightning_rlvr.ops.bootstrap import Difference, bootstrap_interval, paired_difference
from lightning_rlvr.ops.pass_at_k import avg_at_k, maj_at_k, pass_at_k
from lightning_rlvr.types import Status, UserError

DEFAULT_KS = (8, 16, 32)
AVERAGE = "average"  # over benchmarks, each with the same weight


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made."""

    level: float = 0.95
    resamples: int = 1000
    seed: int = 1

    def __post_init__(self) -> None:
        for ok, key, value, rule in (
            (0 < self.level < 1, "level", self.level, "in (0, 1), such as 0.95"),
            (self.resamples >= 1, "resamples", self.resamples, "at least 1"),
            (0 <= self.seed < 2**63, "seed", self.seed, "0 or more, in 63 bits"),
        ):
            if not ok:
                raise UserError(f"{key} must be {rule}, got {value}: it shapes the bootstrap intervals. Set {key}.")


class Estimate(NamedTuple):
    """A mean over problems with its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """One model on one benchmark: `scores` by measure, float64 with one value a problem, and how its responses were."""

    uids: tuple[str, ...]
    scores: Mapping[str, Tensor]
    responses: Mapping[str, float]


Results = Mapping[str, Mapping[str, Result]]  # by model, then benchmark


def chosen_ks(ks: Sequence[int] | None, samples: int) -> list[int]:
    """Return the k to report: those asked for, or 8, 16, 32 as far as there are samples.

    Raises: UserError unless 1 <= k <= samples: pass@k has no unbiased estimate from fewer samples.
    """
    if ks is None:
        return [k for k in DEFAULT_KS if k <= samples] or [samples]
    wrong = [k for k in ks if not 1 <= k <= samples]
    if wrong or not ks:
        raise UserError(
            f"ks must be numbers in [1, samples], got {list(ks)} with {samples} samples a problem: pass@k draws k of "
            "them, and has no unbiased estimate from fewer. Set ks or samples."
        )
    return sorted(set(ks))


def measure(samples: pd.DataFrame, verdicts: pd.DataFrame, ks: Sequence[int]) -> Result:
    """Measure one model on one benchmark; row i of both tables is problem i, with lists over its n samples.

    pass@k is the unbiased estimate from n samples. avg@n is the share of correct samples: its expectation is avg@k for
    every k. maj@k is the mean over the n // k disjoint groups of k samples, in sample order.
    """
    status = _matrix(verdicts["status"])
    correct = torch.tensor([[s == Status.CORRECT.value for s in row] for row in status])
    cluster = torch.tensor(_matrix(verdicts["cluster"]))
    problems, n = correct.shape
    counts, whole = correct.sum(dim=1), torch.full((problems,), n)
    scores = {
        **{f"pass@{k}": pass_at_k(whole, counts, k) for k in ks},
        f"avg@{n}": avg_at_k(correct),
        **{f"maj@{k}": _majority(cluster, correct, k) for k in ks},
    }
    return Result(tuple(samples["uid"]), scores, _responses(samples, status))


def _majority(cluster: Tensor, correct: Tensor, k: int) -> Tensor:
    """Return maj@k of each problem, the mean over the disjoint groups of k samples."""
    groups = cluster.shape[1] // k
    cut = [x[:, : groups * k].reshape(-1, k) for x in (cluster, correct)]
    return maj_at_k(cut[0], cut[1]).view(-1, groups).mean(dim=1)


def _responses(samples: pd.DataFrame, status: Sequence[Sequence[str]]) -> dict[str, float]:
    """Describe the responses: mean tokens, entropy in nats a token, and shares of responses."""
    tokens, entropy, truncated = (
        torch.tensor(_matrix(samples[column]), dtype=torch.float64) for column in ("tokens", "entropy", "truncated")
    )
    found = [s for row in status for s in row]
    return {
        "length": float(tokens.mean()),
        "entropy": float((entropy * tokens).sum() / tokens.sum()),
        "truncated": float(truncated.mean()),
        **{s.value: found.count(s.value) / len(found) for s in Status},
    }


def _matrix(column: pd.Series) -> list[list]:
    return [list(row) for row in column]


def estimates(results: Results, bootstrap: Bootstrap) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Return means and intervals by model, benchmark (and `average`), and measure."""
    return {
        model: {
            **{name: {m: _estimate([v], bootstrap) for m, v in r.scores.items()} for name, r in by_benchmark.items()},
            AVERAGE: {
                m: _estimate([r.scores[m] for r in by_benchmark.values()], bootstrap)
                for m in next(iter(by_benchmark.values())).scores
            },
        }
        for model, by_benchmark in results.items()
    }


def _estimate(groups: Sequence[Tensor], bootstrap: Bootstrap) -> Estimate:
    value = float(torch.stack([values.mean() for values in groups]).mean())
    return Estimate(value, *bootstrap_interval(groups, bootstrap.level, bootstrap.resamples, bootstrap.seed))


def differences(results: Results, bootstrap: Bootstrap) -> dict[str, dict[str, dict[str, Difference]]]:
    """Compare every model with the first, problem by problem; by model, benchmark (and `average`), and measure.

    Raises: UserError if they were not sampled on the same problems.
    """
    (first, baseline), *others = results.items()
    found: dict[str, dict[str, dict[str, Difference]]] = {}
    for model, by_benchmark in others:
        for name, result in by_benchmark.items():
            if result.uids != baseline[name].uids:
                raise UserError(
                    f"{model!r} and {first!r} were sampled on different problems of {name!r}, so they cannot be "
                    "compared pair by pair. Evaluate both anew, or set output to another folder."
                )
        names = list(by_benchmark)
        found[model] = {
            name: {
                m: paired_difference(
                    [baseline[b].scores[m] for b in group],
                    [by_benchmark[b].scores[m] for b in group],
                    bootstrap.level,
                    bootstrap.resamples,
                    bootstrap.seed,
                )
                for m in by_benchmark[names[0]].scores
            }
            for name, group in {**{b: [b] for b in names}, AVERAGE: names}.items()
        }
    return found
