"""Per-token policy losses from the probability ratio of the new to the old policy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class PolicyTerm(NamedTuple):
    """Per-token loss (to be minimised) and the tokens whose gradient the clip has cut."""

    loss: Float[Tensor, "N T"]
    clipped: Bool[Tensor, "N T"]


def clipped_surrogate(
    log_ratio: Float[Tensor, "N T"], advantage: Float[Tensor, "N T"], low: float, high: float
) -> PolicyTerm:
    """Return -min(r A, clip(r, 1 - low, 1 + high) A) for each token, with r = exp(log_ratio).

    A clipped token, and one without advantage, has gradient 0 also where r overflows.

    Source: PPO, arXiv 1707.06347; unequal bounds from DAPO, arXiv 2503.14476.
    """
    above = (advantage > 0) & (log_ratio > math.log1p(high))
    below = (advantage < 0) & (log_ratio < math.log1p(-low))
    clipped = (above | below).detach()
    ratio = log_ratio.masked_fill(clipped | (advantage == 0), 0.0).exp()
    bound = torch.full_like(ratio, 1 - low).masked_fill(above, 1 + high)
    return PolicyTerm(-torch.where(clipped, bound, ratio) * advantage, clipped)
