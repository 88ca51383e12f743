"""Advantages of a group of responses to one prompt."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def group_advantages(rewards: Float[Tensor, "B G"], scale_by_std: bool, eps: float = 1e-6) -> Float[Tensor, "B G"]:
    """Return A = R - mean(R) within each group, divided by std(R) + eps if `scale_by_std`.

    A group whose rewards are all equal has exactly 0 advantage for all, with or without scaling. The standard
    deviation is the sample's (divided by G - 1), as the public trainers compute it; the paper does not say.

    Raises: ValueError if G is 1: a lone response has no group to be better than.
    Source: GRPO, arXiv 2402.03300, section 4.1; without scaling Dr.GRPO, arXiv 2503.20783.

    >>> import torch
    >>> group_advantages(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), scale_by_std=False)
    tensor([[ 0.5000, -0.5000],
            [ 0.0000,  0.0000]])
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"a group needs at least 2 responses to compare, got {rewards.shape[1]}: set group_size")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    # The mean of equal numbers may miss them by a rounding; eps would then blow that up into a signal.
    tied = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    centred = centred.masked_fill(tied, 0.0)
    if not scale_by_std:
        return centred
    return centred / (centred.square().sum(dim=1, keepdim=True).div(rewards.shape[1] - 1).sqrt() + eps)
