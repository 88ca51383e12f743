"""What the ranks hold of a rollout batch, put together on the first of them, which writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_rlvr.rollout import concatenate
from lightning_rlvr.training.distributed import gather_on_first, world_size
from lightning_rlvr.types import Rollouts

T = TypeVar("T")


def on_first_rank(mine: T) -> T | None:
    """Return the rows of all ranks on the first, in the CPU's memory, and None on the others; all must call it.

    Args:
        mine: tuples, mappings and dataclasses of this rank's rows: tensors [N] and [N, T], and lists of N. What is
            none of these is taken to be the same on all ranks. With one process it is returned as it is.
    """
    if world_size() == 1:
        return mine
    parts = gather_on_first(_together([mine], lambda tensors: tensors[0].cpu()))
    return None if parts is None else _together(parts, _stacked)


def _together(parts: Sequence[Any], of_tensors: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    """Return one thing of the shape that all parts have."""
    first = parts[0]
    if isinstance(first, Rollouts) and len(parts) > 1:
        return concatenate(parts)  # whose prompts are padded on the left
    if isinstance(first, Tensor):
        return of_tensors(parts)
    if isinstance(first, list):
        return [item for part in parts for item in part]
    if isinstance(first, Mapping):
        return {key: _together([part[key] for part in parts], of_tensors) for key in first}
    if isinstance(first, tuple):
        items = [_together(items, of_tensors) for items in zip(*parts, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else tuple(items)
    if is_dataclass(first):
        names = [field.name for field in fields(first)]
        made = {name: _together([getattr(part, name) for part in parts], of_tensors) for name in names}
        return replace(first, **made)  # type: ignore[type-var]
    return first


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return the rows of all, padded on the right to the widest."""
    if tensors[0].dim() == 2:
        width = max(tensor.shape[1] for tensor in tensors)
        tensors = [pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors]
    return torch.cat(list(tensors))
