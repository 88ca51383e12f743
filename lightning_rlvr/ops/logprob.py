"""From logits to the log-probability of the chosen token and the entropy of the distribution."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def log_softmax(logits: Float[Tensor, "*n V"], temperature: float = 1.0) -> Float[Tensor, "*n V"]:
    """Return log-probabilities at `temperature`, at least in float32 (half-precision logits are raised).

    Raises: ValueError if temperature is not positive: greedy decoding has no distribution to score.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive to define log-probabilities, got {temperature}")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return (wide / temperature if temperature != 1.0 else wide).log_softmax(dim=-1)


def token_logp(logp: Float[Tensor, "*n V"], token_ids: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Pick the log-probability of each chosen token, in nats."""
    return logp.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def entropy(logp: Float[Tensor, "*n V"]) -> Float[Tensor, "*n"]:
    """Return H = -sum_v p_v log p_v over the full vocabulary, in nats. A token of probability 0 adds 0.

    >>> entropy(torch.tensor([0.5, 0.5, 0.0]).log())
    tensor(0.6931)
    """
    p = logp.exp()
    return -(p * logp.masked_fill(p == 0, 0.0)).sum(dim=-1)
