"""Per-token policy losses from the probability ratio of the new to the old policy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Surrogate(NamedTuple):
    """Per-token loss (to be minimised) and the tokens whose gradient the clip has cut."""

    loss: Float[Tensor, "N T"]
    clipped: Bool[Tensor, "N T"]


def clipped_surrogate(
    logp: Float[Tensor, "N T"],
    old_logp: Float[Tensor, "N T"],
    advantage: Float[Tensor, "N T"],
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """Return -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) for each token, with r = exp(logp - old_logp).

    A clipped token, and one without advantage, has gradient 0 also where r overflows.

    Source: PPO, arXiv 1707.06347; unequal bounds from DAPO, arXiv 2503.14476.
    """
    log_ratio = logp - old_logp
    above = (advantage > 0) & (log_ratio > math.log1p(clip_high))
    below = (advantage < 0) & (log_ratio < math.log1p(-clip_low))
    clipped = (above | below).detach()
    ratio = log_ratio.masked_fill(clipped | (advantage == 0), 0.0).exp()
    bound = torch.full_like(ratio, 1 - clip_low).masked_fill(above, 1 + clip_high)
    return Surrogate(-torch.where(clipped, bound, ratio) * advantage, clipped)
