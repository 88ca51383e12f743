"""The vocabulary head between its products: logits are read once for their values, and once for their gradient.

See ops/linear_logprob.py for what is computed, and ops/vocabulary.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_rlvr.kernels import launched_on

BLOCK = 4096  # of the vocabulary, at a time
FLOOR = -1e4  # for the log-probability -inf beside p = 0, with which it makes 0


@triton.jit
def _values(logits, target, logp, entropy, total, V, over, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    row, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    top, mass, tilt = -1e30, 0.0, 0.0  # the greatest so far; the sums of exp(z - top) and of exp(z - top) (z - top)
    for at in range(0, V, BLOCK):
        z = tl.load(logits + row * V + at + n, mask=at + n < V, other=float("-inf")) * over
        higher = tl.maximum(top, tl.max(z, axis=0))
        shrink, w = tl.exp(top - higher), tl.exp(z - higher)
        if ENTROPY:
            tilt = shrink * (tilt + mass * (top - higher)) + tl.sum(w * tl.maximum(z - higher, -1e30), axis=0)
        mass = shrink * mass + tl.sum(w, axis=0)
        top = higher
    log_mass = tl.log(mass)
    tl.store(total + row, top + log_mass)
    tl.store(logp + row, tl.load(logits + row * V + tl.load(target + row)) * over - top - log_mass)
    if ENTROPY:
        tl.store(entropy + row, log_mass - tilt / mass)


def values(logits: Tensor, target: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probability of each target, entropy (void if not asked for), and logsumexp, all [N], of logits [N, V].

    Logits are float32 and contiguous; they are divided by the temperature.
    """
    (rows, vocabulary), out = logits.shape, logits.new_empty(3, len(logits))
    with launched_on(logits):
        _values[(rows,)](logits, target, *out, vocabulary, 1.0 / temperature, with_entropy, BLOCK, num_warps=8)
    logp, entropy, total = out
    return logp, entropy, total


@triton.jit
def _gradient(
    logits,
    target,
    entropy,
    total,
    pull_logp,
    pull_entropy,
    out,
    V,
    over,
    LOWEST: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < V
    z = tl.load(logits + row * V + n, mask=inside, other=float("-inf")) * over
    logp = z - tl.load(total + row)
    of_logp = tl.load(pull_logp + row)
    pull = -of_logp
    if ENTROPY:
        pull -= tl.load(pull_entropy + row) * (tl.maximum(logp, LOWEST) + tl.load(entropy + row))
    gradient = tl.exp(logp) * pull + tl.where(n == tl.load(target + row), of_logp, 0.0)
    tl.store(out + row * V + n, gradient * over, mask=inside)


def gradient(
    logits: Tensor,
    target: Tensor,
    entropy: Tensor | None,
    total: Tensor,
    pull_logp: Tensor,
    pull_entropy: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Fill `out` [N, V] with the gradient of the logits, which it may be itself, from those of what `values` returned.

    Both of `entropy` and `pull_entropy`, or none, are given.
    """
    rows, vocabulary = logits.shape
    asked = entropy is not None and pull_entropy is not None
    of = (entropy, pull_entropy) if asked else (total, total)
    with launched_on(logits):
        _gradient[(rows, triton.cdiv(vocabulary, BLOCK))](
            logits,
            target,
            of[0],
            total,
            pull_logp,
            of[1],
            out,
            vocabulary,
            1.0 / temperature,
            FLOOR,
            asked,
            BLOCK,
            num_warps=8,
        )
