"""What stands between the products of a layer: RMSNorm, the sum before it, and the gate of a MLP.

Each reads and writes every number once. See models/lean.py and rollout/llama_gpu.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_rlvr.kernels import launched_on

GATED = 1024  # numbers of a row that a program takes
PROGRAMS = 528  # that add up a weight's gradient: four for each multiprocessor of an H100


@triton.jit
def _norm(x, y, weight, out, scales, epsilon, E, ADD: tl.constexpr, KEEP: tl.constexpr, WIDE: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    inside, where = at < E, row * E + at
    value = tl.load(x + where, mask=inside, other=0.0)
    if ADD:
        more = tl.load(y + where, mask=inside, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) + more).to(x.dtype.element_ty)
        tl.store(x + where, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / E + epsilon)
    if KEEP:
        tl.store(scales + row, scale)
    normed = (wide * scale).to(x.dtype.element_ty).to(tl.float32)  # rounded as in transformers
    tl.store(out + where, normed * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32), mask=inside)


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """Add y to x in place, if there is one; return the sum's RMSNorm, [N, E] as x, in the given dtype."""
    out = torch.empty_like(x, dtype=dtype)
    more = x if y is None else y
    with launched_on(x):
        _norm[(len(x),)](x, more, weight, out, x, epsilon, x.shape[1], y is not None, False, _power(x.shape[1]))
    return out


def norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return an RMSNorm of x [N, E], contiguous, and 1 / sqrt(mean(x^2) + epsilon) of each row [N], float32."""
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    scale = x.new_empty(len(x), dtype=torch.float32)
    with launched_on(x):
        _norm[(len(x),)](x, x, weight, out, scale, epsilon, x.shape[1], False, True, _power(x.shape[1]))
    return out, scale


@triton.jit
def _norm_pull(pull, x, weight, scales, of_x, of_weight, N, E, WEIGHT: tl.constexpr, WIDE: tl.constexpr):
    program, at = tl.program_id(0), tl.arange(0, WIDE)
    inside = at < E
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros([WIDE], tl.float32)
    where = program.to(tl.int64) * E + at
    for row in range(program, N, tl.num_programs(0)):
        g = tl.load(pull + where, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + row)
        along = tl.sum(g * w * value, axis=0) / E * scale * scale * scale
        tl.store(of_x + where, g * w * scale - value * along, mask=inside)
        if WEIGHT:
            sums += g * value * scale
        where += tl.num_programs(0).to(tl.int64) * E
    if WEIGHT:
        tl.store(of_weight + program * E + at, sums, mask=inside)


def norm_pull(
    pull: Tensor, x: Tensor, weight: Tensor, scale: Tensor, weight_needed: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and, if needed, of the weight from that of `norm`; all [N, E] are contiguous."""
    rows, width = x.shape
    programs = min(rows, PROGRAMS)
    of_x = torch.empty_like(x)
    parts = scale.new_empty(programs if weight_needed else 1, width)
    with launched_on(x):
        _norm_pull[(programs,)](pull, x, weight, scale, of_x, parts, rows, width, weight_needed, _power(width))
    return of_x, parts.sum(dim=0).to(weight.dtype) if weight_needed else None


def _power(width: int) -> int:
    power: int = triton.next_power_of_2(width)
    return power


@triton.jit
def _gated(gate, up, out, of_row, F, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < F
    g = tl.load(gate + row * of_row + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * of_row + at, mask=inside, other=0.0).to(tl.float32)
    activated = (g * tl.sigmoid(g)).to(out.dtype.element_ty).to(tl.float32)  # rounded as by silu itself
    tl.store(out + row * F + at, activated * u, mask=inside)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, [N, F], of both, whose rows are alike in memory and contiguous in themselves."""
    rows, width = gate.shape
    out = gate.new_empty(rows, width)
    with launched_on(gate):
        _gated[(rows, triton.cdiv(width, GATED))](gate, up, out, gate.stride(0), width, BLOCK=GATED)
    return out


@triton.jit
def _gated_pull(pull, gate, up, of_gate, of_up, F, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, where = at < F, row * F + at
    g = tl.load(gate + where, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + where, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(pull + where, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(g)
    tl.store(of_gate + where, p * u * share * (1.0 + g * (1.0 - share)), mask=inside)
    tl.store(of_up + where, p * g * share, mask=inside)


def gated_pull(pull: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up from that of `gated`; all are [N, F] and contiguous."""
    rows, width = gate.shape
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    with launched_on(gate):
        _gated_pull[(rows, triton.cdiv(width, GATED))](pull, gate, up, of_gate, of_up, width, BLOCK=GATED)
    return of_gate, of_up
