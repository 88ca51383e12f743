"""One decoding step: from logits to a token, with the log-probability and entropy it was drawn with."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_rlvr.kernels import available
from lightning_rlvr.ops.logprob import log_softmax
from lightning_rlvr.types import Sampling, UserError

CHUNK = 256  # tokens of the vocabulary whose probabilities are summed before they are cumulated
BLOCK = 1 << 19  # logits worked on at a time on a CPU


class Draw(NamedTuple):
    """A token of each row and the distribution's values, in nats; `finite` is False of rows in which all that is void.

    To look at that waits for a GPU, which is best done once a step: see `check_finite`.
    """

    token: Int[Tensor, " R"]
    logp: Float[Tensor, " R"]
    entropy: Float[Tensor, " R"]
    finite: Bool[Tensor, " R"]


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
        return Draw(logits.argmax(dim=-1), zero, zero, logits.amax(dim=-1).isfinite())
    if sampling.top_p < 1 or 0 < sampling.top_k < logits.shape[-1]:
        logits = truncate(log_softmax(logits, sampling.temperature), sampling.top_k, sampling.top_p)
        temperature = 1.0
    else:
        temperature = sampling.temperature
    # On a CPU a few rows at a time stay in its cache through all passes over them.
    rows = max(1, BLOCK // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    parts = [_invert(x, u, temperature) for x, u in zip(logits.split(rows), uniform.split(rows), strict=True)]
    return Draw(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _invert(logits: Float[Tensor, "R V"], uniform: Float[Tensor, " R"], temperature: float) -> Draw:
    """Find the token at which the cumulative distribution passes `uniform`: first its chunk, then it.

    Only sums of chunks, and the elements of one chunk a row, are cumulated in float64.
    """
    if available(logits.dtype, logits.device):
        return _invert_by_kernel(logits, uniform[:, None], temperature)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    vocabulary, chunks = logits.shape[-1], -(-logits.shape[-1] // CHUNK)
    top = logits.amax(dim=-1, keepdim=True)
    z = logits.to(wide) - top
    if temperature != 1.0:
        z /= temperature
    z.clamp_(min=torch.finfo(wide).min)  # a probability of 0 then adds 0 to the entropy, not nan
    weight = z.new_empty(len(z), chunks * CHUNK)
    weight[:, vocabulary:] = 0
    torch.exp(z, out=weight[:, :vocabulary])
    weight = weight.view(len(z), chunks, CHUNK)

    by_chunk = weight.sum(dim=-1).double().cumsum(dim=-1)
    total = by_chunk[:, -1:]
    chunk, share = _passed(by_chunk, uniform[:, None])
    within = weight.gather(1, chunk[:, :, None].expand(-1, 1, CHUNK)).squeeze(1).double().cumsum(dim=-1)
    token = (chunk * CHUNK + _passed(within, share)[0]).clamp_(max=vocabulary - 1)

    logp = z.gather(-1, token) - total.log().to(wide)
    z *= weight.view(len(z), -1)[:, :vocabulary]
    entropy = total.log() - z.sum(dim=-1, keepdim=True) / total
    finite = top.squeeze(-1).isfinite()
    return Draw(token.squeeze(-1), logp.squeeze(-1), entropy.squeeze(-1).to(wide), finite)


def _invert_by_kernel(logits: Float[Tensor, "R V"], uniform: Float[Tensor, "R 1"], temperature: float) -> Draw:
    """Do the same with one pass over the logits, which finds the sums of all chunks."""
    from lightning_rlvr.kernels.sampling import chunks

    greatest, sums, tilts = chunks(logits, temperature, CHUNK)
    top = greatest.amax(dim=-1, keepdim=True)
    below = (greatest - top) / temperature  # of each chunk's greatest logit
    by_chunk = (sums * below.exp()).double().cumsum(dim=-1)
    total = by_chunk[:, -1:]
    chunk, share = _passed(by_chunk, uniform)

    places = chunk * CHUNK + torch.arange(CHUNK, device=logits.device)
    last = logits.shape[-1] - 1
    z = (logits.gather(-1, places.clamp(max=last)).float() - top) / temperature
    within = z.exp().masked_fill(places > last, 0.0).double().cumsum(dim=-1)
    place, _ = _passed(within, share)

    logp = z.gather(-1, place) - total.log()
    tilt = ((tilts + sums * below) * below.exp()).sum(dim=-1, keepdim=True)
    entropy = total.log() - tilt / total
    finite = total.isfinite() & (total > 0)
    token = (chunk * CHUNK + place).clamp(max=last)
    return Draw(*(x.squeeze(-1) for x in (token, logp.float(), entropy.float(), finite)))


def check_finite(finite: bool) -> None:
    """Raise UserError if the greatest logit of any row was nan or infinite."""
    if not finite:
        raise UserError(
            "the policy's logits must be finite, got nan or inf while sampling: its weights or activations have "
            "overflowed. Lower the lr of model.optimizer, set trainer.precision or the policy's dtype to bfloat16 or "
            "float32, or check model.policy; train/grad_norm in metrics.csv shows when it began."
        )


def _passed(cumulative: Float[Tensor, "R C"], share: Float[Tensor, "R 1"]) -> tuple[Tensor, Tensor]:
    """Return the first entry above `share` of the total, and which share of that entry lies below it."""
    # In float64 share * total stays below total, so the first entry above it exists and has weight, unless all is nan.
    target = share.clamp(max=1 - 1e-12) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[-1] - 1)
    above = cumulative.gather(-1, index)
    before = cumulative.gather(-1, (index - 1).clamp(min=0)).where(index > 0, 0.0)
    return index, ((target - before) / (above - before)).clamp(0, 1)


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
