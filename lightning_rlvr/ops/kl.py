"""KL(pi || pi_ref) in nats: estimators from the log-probability of a sampled token, and the exact sum.

k1, k2 and k3 are functions of d = ref_logp - logp. Their values and their gradients answer different questions: on
samples from pi all three have expectation KL or close to it (k2 to second order), but the gradient of k1 is zero
in expectation, and only the gradient of k2 is, on policy, the unbiased gradient of the reverse KL.

Source: Schulman (2020), joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def kl_k1(logp: Float[Tensor, "*n"], ref_logp: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return -d: unbiased, of either sign.

    Raises: ValueError if shapes differ; broadcasting would pair different rollouts.
    """
    return -_difference(logp, ref_logp)


def kl_k2(logp: Float[Tensor, "*n"], ref_logp: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return d^2 / 2: biased, never negative.

    Raises: ValueError if shapes differ; broadcasting would pair different rollouts.
    """
    return _difference(logp, ref_logp).square() / 2


def kl_k3(logp: Float[Tensor, "*n"], ref_logp: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return exp(d) - 1 - d: unbiased, never negative.

    Raises: ValueError if shapes differ; broadcasting would pair different rollouts.
    """
    d = _difference(logp, ref_logp)
    return d.expm1() - d


def kl_full(logp: Float[Tensor, "*n V"], ref_logp: Float[Tensor, "*n V"]) -> Float[Tensor, "*n"]:
    """Return sum_v p_v (log p_v - log ref_v), the exact KL over the vocabulary. A token of probability 0 adds 0.

    Raises: ValueError if shapes differ; broadcasting would pair different rollouts.
    """
    p = logp.exp()
    return (p * -_difference(logp, ref_logp).masked_fill(p == 0, 0.0)).sum(dim=-1)


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def _difference(logp: Tensor, ref_logp: Tensor) -> Tensor:
    if logp.shape != ref_logp.shape:
        raise ValueError(f"shapes differ: logp {tuple(logp.shape)}, ref_logp {tuple(ref_logp.shape)}")
    return ref_logp - logp
