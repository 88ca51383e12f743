"""The bootstrap over problems: intervals of a mean, and of the difference of two models on the same problems.

A group is a benchmark: one value a problem. The statistic is the mean over groups of each group's mean, so each
benchmark weighs the same; problems are resampled within their group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_rlvr.types import UserError

INDICES_AT_A_TIME = 1 << 22
ROUNDING = 1e-12  # a mean of differences this close to 0 is 0


class Difference(NamedTuple):
    """How much better the second of two models is, its interval, and the share of resamples where it is no better."""

    value: float
    low: float
    high: float
    not_better: float


def bootstrap_means(groups: Sequence[Float[Tensor, " _"]], samples: int, seed: int) -> Float[Tensor, " samples"]:
    """Return the statistic of each resample, float64, from a generator of its own.

    Equal sizes and seeds draw the same problems: results of two models on the same problems stay paired.

    Raises: ValueError if a group is empty or a value is not finite; UserError unless samples >= 1.
    Source: Efron (1979), doi 10.1214/aos/1176344552.
    """
    if samples < 1:
        raise UserError(
            f"samples must be at least 1 resample, got {samples}: it shapes the bootstrap interval. Set samples."
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([_means(_pool(values), samples, generator) for values in groups]).mean(dim=0)


def bootstrap_interval(
    values: Float[Tensor, " B"] | Sequence[Float[Tensor, " _"]],
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of `values`, or of the mean of several groups' means.

    It holds the resampled means' quantiles (1 - level)/2 and (1 + level)/2. It speaks of other problems of the same
    kind, not of other samples of the same problems; of one problem it is a point.

    Raises: as bootstrap_means; UserError unless 0 < level < 1.

    >>> low, high = bootstrap_interval(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    >>> 0 <= low <= 0.75 <= high <= 1
    True
    """
    groups = [values] if isinstance(values, Tensor) else values
    return _quantiles(bootstrap_means(groups, samples, seed), level)


def paired_difference(
    baseline: Sequence[Float[Tensor, " _"]],
    other: Sequence[Float[Tensor, " _"]],
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> Difference:
    """Compare two models problem by problem: baseline[g][i] and other[g][i] are of the same problem.

    Pairs are resampled, so what makes a problem easy or hard for both cancels.

    Raises: as bootstrap_interval; ValueError if the shapes of a group differ.

    >>> paired_difference([torch.tensor([0.0, 0.5])], [torch.tensor([0.5, 1.0])])
    Difference(value=0.5, low=0.5, high=0.5, not_better=0.0)
    """
    for a, b in zip(baseline, other, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"pairs are of the same problems, got {len(a)} problems and {len(b)}")
    gains = [b.double() - a.double() for a, b in zip(baseline, other, strict=True)]
    means = bootstrap_means(gains, samples, seed)
    low, high = _quantiles(means, level)
    value = float(torch.stack([gain.mean() for gain in gains]).mean())
    return Difference(value, low, high, float((means <= ROUNDING).double().mean()))


def _pool(values: Tensor) -> Tensor:
    if values.numel() == 0 or not bool(values.isfinite().all()):
        raise ValueError(f"values must be finite and at least one, got {values.tolist()[:8]}.")
    return values.detach().double().cpu()


def _means(pool: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    size = pool.numel()
    rows = max(1, INDICES_AT_A_TIME // size)
    counts = [min(rows, samples - done) for done in range(0, samples, rows)]
    return torch.cat([pool[torch.randint(size, (n, size), generator=generator)].mean(dim=1) for n in counts])


def _quantiles(means: Tensor, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise UserError(
            f"level must be in (0, 1), such as 0.95, got {level}: it shapes the bootstrap interval. Set level."
        )
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(means, tails).tolist()
    return low, high
