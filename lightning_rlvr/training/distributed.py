"""What the training step needs from the other ranks. With one process nothing is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from lightning_rlvr.types import Ratio, TokenStats


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process among them."""
    return dist.get_rank() if world_size() > 1 else 0


def largest(here: int) -> int:
    """Return the largest of the values of all ranks."""
    if world_size() == 1:
        return here
    agreed = torch.tensor(here, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return int(agreed)


def all_ranks(here: bool) -> bool:
    """Return whether `here` is true on every rank."""
    return not largest(not here)


def gather_objects(mine: Any) -> list[Any]:
    """Return the objects of all ranks, by rank."""
    out = [mine] * world_size()
    if len(out) > 1:
        dist.all_gather_object(out, mine)
    return out


def gather_on_first(mine: Any) -> list[Any] | None:
    """Return the objects of all ranks, by rank, on the first; None on the others."""
    if world_size() == 1:
        return [mine]
    out = [None] * world_size() if rank() == 0 else None
    dist.gather_object(mine, out)
    return out


def gather_shares(mine: Sequence[float]) -> list[float]:
    """Return the values of all ranks, where rank r holds every world-th from the r-th on; all hold equally many."""
    if world_size() == 1:
        return list(mine)
    sent = torch.tensor(mine, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    parts = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(parts, sent)
    return [float(value) for value in torch.stack(parts, dim=1).flatten()]


def gather_stats(stats: TokenStats) -> tuple[TokenStats, slice]:
    """Return the statistics of the rows of all ranks, and which of these rows are this rank's.

    Raises: ValueError if the ranks hold different numbers of rows.
    """
    world = world_size()
    if world == 1:
        return stats, slice(None)
    rows, width = stats.mask.shape
    extremes = torch.tensor([rows, -rows, width], device=stats.mask.device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if extremes[0] != -extremes[1]:
        raise ValueError(f"ranks must hold equally many rows, got {-int(extremes[1])} to {int(extremes[0])}")
    gathered = {}
    for field in fields(stats):
        value = getattr(stats, field.name)
        if not isinstance(value, Tensor):  # the objective's state, the same on all ranks
            gathered[field.name] = value
            continue
        if value.dim() == 2:
            value = pad(value, (0, int(extremes[2]) - width))
        sent = value.to(torch.uint8) if value.dtype == torch.bool else value
        parts = [torch.empty_like(sent) for _ in range(world)]
        dist.all_gather(parts, sent.contiguous())
        gathered[field.name] = torch.cat(parts).to(value.dtype)
    return TokenStats(**gathered), slice(rank() * rows, (rank() + 1) * rows)


def reduce_ratios(ratios: Mapping[str, Ratio]) -> dict[str, float]:
    """Sum numerators and denominators over ranks and divide; nothing counted gives nan.

    All ranks must pass the same names.
    """
    names = sorted(ratios)
    sums = torch.tensor([[float(x) for x in ratios[name]] for name in names], dtype=torch.float64).reshape(-1, 2)
    if world_size() > 1:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        sums = sums.to(device)
        dist.all_reduce(sums)
    return dict(zip(names, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))


def add_ratios(sums: dict[str, Ratio], more: Mapping[str, Ratio]) -> None:
    """Add `more` to `sums` in place, name by name."""
    for name, (numerator, denominator) in more.items():
        total, count = sums.get(name, (0.0, 0.0))
        sums[name] = Ratio(total + numerator, count + denominator)
