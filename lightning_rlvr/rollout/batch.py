"""Rollouts put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from lightning_rlvr.rollout.transformers_engine import left_pad
from lightning_rlvr.types import Rollouts, Sampling

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


def as_told(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[tuple[Sequence[int], Sequence[float], bool]],
    sampling: Sampling,
    pad_id: int,
) -> Rollouts:
    """Return what another program says that it sampled; it tells no entropies, which are nan but for greedy tokens.

    Args:
        prompts: token ids of each.
        responses: prompt-major, as many to each prompt: token ids, their log-probabilities, whether it was cut.
        sampling: how they were sampled. Of a greedy one all log-probabilities and entropies are 0.
        pad_id: fills the room.
    """
    ids, logp, truncated = zip(*responses, strict=True)
    samples, greedy = len(ids) // len(prompts), sampling.temperature == 0
    prompt_ids, prompt_mask = (x.repeat_interleave(samples, dim=0) for x in left_pad(prompts, pad_id))
    mask = torch.arange(max(map(len, ids))) < torch.tensor([len(row) for row in ids])[:, None]
    told = pad_sequence([torch.tensor(row, dtype=torch.float32) for row in logp], True)
    return Rollouts(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=pad_sequence([torch.tensor(row, dtype=torch.long) for row in ids], True, pad_id),
        mask=mask,
        logp=torch.zeros_like(told) if greedy else told,
        entropy=torch.full(mask.shape, 0.0 if greedy else torch.nan).masked_fill(~mask, 0.0),
        truncated=torch.tensor(truncated),
    )
