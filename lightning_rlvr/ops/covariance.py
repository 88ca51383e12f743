"""Covariance of log-probability and advantage, token by token."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor


def token_covariance(
    logp: Float[Tensor, " K"], advantage: Float[Tensor, " K"], scope: Bool[Tensor, " K"] | None = None
) -> Float[Tensor, " K"]:
    """Return Cov_t = (logp_t - mean logp) * (A_t - mean A) for each token, in float64.

    The means run over all given tokens, or over those in `scope`. Sums run in the order given: pass tokens in
    canonical order (`TokenStats.counted`) for results that do not depend on how the batch was laid out.

    Source: KL-Cov and Clip-Cov, arXiv 2505.22617; SENT, arXiv 2512.04359.
    """
    logp, advantage = logp.double(), advantage.double()
    within = slice(None) if scope is None else scope
    return (logp - logp[within].mean()) * (advantage - advantage[within].mean())
