"""Exact selection of a share of tokens. Ties are settled by the order of the tokens, nothing else."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def share_count(fraction: float, total: int) -> int:
    """Return how many of `total` tokens make up `fraction`: rounded up, so no positive share picks nothing.

    Raises: ValueError if fraction is outside [0, 1].

    >>> share_count(0.8, 5), share_count(0.0002, 100), share_count(0.0, 100)
    (4, 1, 0)
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"a share of tokens must lie in [0, 1], got {fraction}")
    if fraction == 0 or total == 0:
        return 0
    return min(total, max(1, math.ceil(round(fraction * total, 6))))  # 0.07 * 100 is 7.000000000000001


def lowest(values: Float[Tensor, " K"], count: int) -> Bool[Tensor, " K"]:
    """Select exactly `count` smallest values; among equals at the threshold the first in order are taken.

    Raises: ValueError if a value is nan (it has no rank) or count is outside [0, K].

    >>> lowest(torch.tensor([2.0, 1.0, 2.0, 3.0]), 2).tolist()
    [True, True, False, False]
    """
    if not 0 <= count <= len(values):
        raise ValueError(f"cannot select {count} of {len(values)} tokens")
    if values.isnan().any():
        raise ValueError("cannot rank tokens: a counted token has a nan statistic")
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = values.kthvalue(count).values
    below = values < threshold
    equal = values == threshold
    room = count - below.sum()
    return below | (equal & (equal.cumsum(0) <= room))


def highest(values: Float[Tensor, " K"], count: int) -> Bool[Tensor, " K"]:
    """Select exactly `count` largest values; among equals at the threshold the first in order are taken.

    >>> highest(torch.tensor([2.0, 1.0, 2.0, 3.0]), 2).tolist()
    [True, False, False, True]
    """
    return lowest(-values, count)
