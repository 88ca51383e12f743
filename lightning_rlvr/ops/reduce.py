"""Aggregation of token losses as one weight per token, with its denominators inside."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Aggregation = Literal["sequence_mean", "token_mean", "fixed_length"]


def token_weights(
    mask: Bool[Tensor, "N T"],
    update: Int[Tensor, " N"],
    how: Aggregation,
    length: int | None = None,
) -> Float[Tensor, "N T"]:
    """Return weights (float64) such that the aggregated loss of an optimizer step is sum(weights * token loss).

    `update[i]` is the optimizer step in which row i takes part. All denominators are counted over the rows of
    one step, so the sum over any micro-batches of that step is the step's loss:

    - sequence_mean: 1 / (rows of the step * tokens of the row) (GRPO, arXiv 2402.03300)
    - token_mean: 1 / tokens of the step (DAPO, arXiv 2503.14476)
    - fixed_length: 1 / (rows of the step * length) (Dr.GRPO, arXiv 2503.20783)

    Uncounted tokens weigh 0. A row without counted tokens adds nothing but still counts as a row.

    Raises: ValueError if how is unknown, or fixed_length comes without a positive length.

    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> token_weights(mask, torch.tensor([0, 0]), "sequence_mean").tolist()
    [[0.25, 0.25], [0.5, 0.0]]
    """
    counted = mask.double()
    rows = _per_update(torch.ones_like(update, dtype=torch.float64), update)
    tokens = counted.sum(dim=1)
    if how == "sequence_mean":
        denominator = rows * tokens
    elif how == "token_mean":
        denominator = _per_update(tokens, update)
    elif how == "fixed_length":
        if length is None or length < 1:
            raise ValueError(f"fixed_length divides by a fixed number of tokens, got length={length}")
        denominator = rows * length
    else:
        raise ValueError(f"unknown aggregation {how!r}: sequence_mean, token_mean or fixed_length")
    return counted / denominator.clamp(min=1)[:, None]


def _per_update(values: Tensor, update: Tensor) -> Tensor:
    """Give each row the sum of `values` over the rows of its update."""
    _, slot = update.unique(return_inverse=True)
    sums = values.new_zeros(int(slot.max()) + 1 if len(slot) else 0).index_add(0, slot, values)
    return sums[slot]
