"""One decoding step: from logits to a token, with the log-probability and entropy it was drawn with."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_rlvr.ops.logprob import entropy, log_softmax, token_logp
from lightning_rlvr.types import Sampling


class Draw(NamedTuple):
    """A token of each row and the distribution's values, in nats."""

    token: Int[Tensor, " R"]
    logp: Float[Tensor, " R"]
    entropy: Float[Tensor, " R"]


def seed_of(*parts: int | str) -> int:
    """Return a seed (63 bits) that depends on all parts and nothing else: not on the process, not on time.

    Randomness named by what it is for (run, step, question) needs no generator state to be saved, and does not
    change with the batch, the ranks or a resume.

    >>> seed_of(1, "rollout", 0, "gsm8k/17") == seed_of(1, "rollout", 0, "gsm8k/17")
    True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def uniforms(seed: int, samples: int, length: int) -> Float[Tensor, "samples length"]:
    """Return the uniform random numbers in [0, 1), float64, that decide `samples` responses to one prompt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(samples, length, generator=generator, dtype=torch.float64)


def draw(logits: Float[Tensor, "R V"], uniform: Float[Tensor, " R"], sampling: Sampling) -> Draw:
    """Sample one token for each row by the inverse of the cumulative distribution.

    Returns the log-probability and entropy of the distribution really sampled from: temperature, then top-k,
    then top-p, renormalised. Greedy decoding (temperature 0) is a point mass: both are 0.
    """
    if sampling.temperature == 0:
        zero = torch.zeros(len(logits), dtype=torch.float32, device=logits.device)
        return Draw(logits.argmax(dim=-1), zero, zero)
    logp = truncate(log_softmax(logits, sampling.temperature), sampling.top_k, sampling.top_p)
    # In float64 u * total stays below total, so the first entry above it exists and has probability.
    cumulative = logp.double().exp().cumsum(dim=-1)
    target = uniform.clamp(max=1 - 1e-12) * cumulative[:, -1]
    token = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)
    return Draw(token, token_logp(logp, token), entropy(logp))


def truncate(logp: Float[Tensor, "R V"], top_k: int, top_p: float) -> Float[Tensor, "R V"]:
    """Keep the `top_k` likeliest tokens (0: all), then the smallest set of mass >= `top_p`, and renormalise.

    Ties are kept in order of token id, so exactly top_k tokens remain and the likeliest token always does.
    """
    vocabulary = logp.shape[-1]
    if (top_k == 0 or top_k >= vocabulary) and top_p >= 1:
        return logp
    ordered, index = logp.sort(dim=-1, descending=True, stable=True)
    if 0 < top_k < vocabulary:
        ordered[:, top_k:] = -torch.inf
        ordered = ordered.log_softmax(dim=-1)
    if top_p < 1:
        p = ordered.exp()
        before = p.cumsum(dim=-1) - p
        ordered = ordered.masked_fill(before >= top_p, -torch.inf).log_softmax(dim=-1)
    return torch.full_like(logp, -torch.inf).scatter(-1, index, ordered)
