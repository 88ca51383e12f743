"""Covariance of log-probability and advantage, token by token."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def token_covariance(
    logp: Float[Tensor, " K"],
    advantage: Float[Tensor, " K"],
    scope: Float[Tensor, " S"] | None = None,
    scope_advantage: Float[Tensor, " S"] | None = None,
) -> Float[Tensor, " K"]:
    """Return Cov_t = (logp_t - mean logp) * (A_t - mean A) for each token, in float64.

    The means run over the given tokens, or over another set of tokens if its values are passed as `scope` and
    `scope_advantage`. Sums run in the order given: pass tokens in canonical order
    (`TokenStats.counted`) for results that do not depend on how the batch was laid out.

    Source: KL-Cov and Clip-Cov, arXiv 2505.22617; SENT, arXiv 2512.04359.
    """
    logp, advantage = logp.double(), advantage.double()
    mean_logp = (logp if scope is None else scope.double()).mean()
    mean_advantage = (advantage if scope_advantage is None else scope_advantage.double()).mean()
    return (logp - mean_logp) * (advantage - mean_advantage)
