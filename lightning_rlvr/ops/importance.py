"""Weights of tokens that another distribution than the policy's has sampled."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor


def truncated_importance(
    logp: Float[Tensor, "N T"], sampled_logp: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], most: float
) -> Float[Tensor, "N T"]:
    """Return min(pi / mu, most) of each counted token, 0 elsewhere; mu is what the token was sampled from.

    The bound keeps the variance finite where mu gave too little, at the price of a bias there.

    Args:
        logp: log-probability of each token under the policy pi.
        sampled_logp: that under mu.
        mask: the counted tokens.
        most: the bound.

    Raises: ValueError if the bound is below 1: then tokens on which both agree would be weakened.
    Source: V-trace's rho, IMPALA, arXiv 1802.01561, section 4.1.

    >>> import torch
    >>> mask = torch.ones(1, 2, dtype=torch.bool)
    >>> truncated_importance(torch.tensor([[0.5, 0.2]]).log(), torch.tensor([[0.1, 0.4]]).log(), mask, most=2.0)
    tensor([[2.0000, 0.5000]])
    """
    if most < 1:
        raise ValueError(f"the bound on importance weights must be at least 1, got {most}")
    return (logp - sampled_logp).exp().clamp(max=most).masked_fill(~mask, 0.0)
