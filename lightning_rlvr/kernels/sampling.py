"""Sums over chunks of the vocabulary, for which logits are read once. See rollout/sampling.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_rlvr.kernels import launched_on

MANY = 16  # chunks that a program takes


@triton.jit
def _chunks(logits, greatest, sums, tilts, V, C, of_row, over, MANY: tl.constexpr, CHUNK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1) * MANY + tl.arange(0, MANY)
    at = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    x = tl.load(logits + row * of_row + at, mask=at < V, other=float("-inf")).to(tl.float32)
    top = tl.maximum(tl.max(x, axis=1), -1e30)
    z = (x - top[:, None]) * over
    w = tl.exp(z)
    out = row * C + chunk
    tl.store(greatest + out, top, mask=chunk < C)
    tl.store(sums + out, tl.sum(w, axis=1), mask=chunk < C)
    tl.store(tilts + out, tl.sum(w * tl.maximum(z, -1e30), axis=1), mask=chunk < C)


def chunks(logits: Tensor, temperature: float, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what chunks of `size` logits come to (the last may be shorter), float32 [R, C] each.

    That is the greatest logit m, or -1e30 if that is more; the sum of exp(z), where z = (logit - m) / temperature; and
    the sum of z exp(z). Sums are nan where a logit is nan or inf.

    Args:
        logits: [R, V], rows contiguous in themselves.
        temperature: above 0.
        size: a power of two.
    """
    (rows, vocabulary), count = logits.shape, -(-logits.shape[1] // size)
    greatest, sums, tilts = logits.new_empty(3, rows, count, dtype=torch.float32)
    grid = (rows, triton.cdiv(count, MANY))
    with launched_on(logits):
        _chunks[grid](
            logits, greatest, sums, tilts, vocabulary, count, logits.stride(0), 1.0 / temperature, MANY=MANY, CHUNK=size
        )
    return greatest, sums, tilts
