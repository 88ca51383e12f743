"""Per-token policy losses from the probability ratio of the new to the old policy."""

from __future__ import annotations

from typing import NamedTuple

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

    Source: PPO, arXiv 1707.06347; unequal bounds from DAPO, arXiv 2503.14476.
    """
    ratio = (logp - old_logp).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    unbounded_gain, bounded_gain = ratio * advantage, bounded * advantage
    return Surrogate(-unbounded_gain.minimum(bounded_gain), (bounded_gain < unbounded_gain).detach())
