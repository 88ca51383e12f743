"""Exact selection of a share of tokens. Ties are settled by the order of the tokens, nothing else."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
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


def token_lottery(row_id: Int[Tensor, " K"], position: Int[Tensor, " K"]) -> Float[Tensor, " K"]:
    """Return a number in [0, 1) for each token that is random, and decided by row id and position alone.

    A random pick by these does not depend on layout, padding, number of ranks or generator state. The mixing is
    SplitMix64's finaliser on a combination of both numbers.

    Source: Steele, Lea and Flood (2014), doi.org/10.1145/2660193.2660195.
    """
    gamma = _signed(0x9E3779B97F4A7C15)
    x = row_id * gamma + position * _signed(0xD1342543DE82EF95) + gamma  # the finaliser maps 0 to 0
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift_right(x, shift)) * _signed(factor)
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 11).double() / 2**53


def _signed(value: int) -> int:
    """Return an unsigned 64-bit constant as the signed number of the same bits; products wrap alike."""
    return value - 2**64


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift as if unsigned: the sign is not repeated."""
    return torch.bitwise_and(x >> bits, 2 ** (64 - bits) - 1)
