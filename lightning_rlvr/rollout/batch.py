"""Rollouts put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch.nn.functional import pad

from lightning_rlvr.types import Rollouts

LEFT_PADDED = ("prompt_ids", "prompt_mask")


def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
    """Return the rows of all parts, prompts padded on the left and responses on the right to the widest."""
    joined = {}
    for field in fields(Rollouts):
        values = [getattr(part, field.name) for part in parts]
        if values[0].dim() == 2:
            width = max(value.shape[1] for value in values)
            left = field.name in LEFT_PADDED
            values = [pad(v, (width - v.shape[1], 0) if left else (0, width - v.shape[1])) for v in values]
        joined[field.name] = torch.cat(values)
    return Rollouts(**joined)
