"""The backbone's pass over a batch: each prompt once, responses of like length side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_rlvr.models.lean import lean_layers
from lightning_rlvr.types import Rollouts

if TYPE_CHECKING:
    from torch import nn

# Padding, in tokens, that a pass may hold before a further one is cheaper: it reads the weights anew, and on an
# accelerator launches some thousand kernels. The same where attention alone is padded, and further calls are its own.
CPU_PADDING, ACCELERATOR_PADDING = 64, 1024
# Memory that a response's copy of its prompt's keys and values takes, as a share of what computing the prompt leaves
# for the backward pass: 0.05 to 0.1 in models of 1.9 M to 1.5 B parameters.
COPIED = 0.1


# Read by transformers' sdpa attention at each call.
GROUPED = "TRANSFORMERS_SDPA_FORCE_GQA"


class States(NamedTuple):
    """Hidden states that predict the counted response tokens: row after row, in the order of `rows`."""

    hidden: Float[Tensor, "K H"]
    rows: Int[Tensor, " N"]


def packed_states(backbone: nn.Module, rollouts: Rollouts) -> States:
    """Run the model without its head over prompts and counted response tokens, with gradients where those are on.

    Rows beside each other that have the same prompt share its pass, and their gradients meet in it. Responses go on
    from its key-value cache, longest first, in as many passes as keep padding small.
    """
    with keys_as_they_are(rollouts.prompt_ids.device):
        return _packed_states(backbone, rollouts)


def _packed_states(backbone: nn.Module, rollouts: Rollouts) -> States:
    prompts, prompt_of = distinct_prompts(rollouts)
    start = int(rollouts.prompt_mask.any(dim=0).int().argmax())
    ids, seen = rollouts.prompt_ids[prompts, start:], rollouts.prompt_mask[prompts, start:]
    read = PromptStates(backbone, ids, seen)
    lengths = rollouts.mask.sum(dim=1)
    order = lengths.argsort(descending=True, stable=True)
    hidden = []
    padding = CPU_PADDING if lengths.device.type == "cpu" else ACCELERATOR_PADDING
    for part in passes(lengths[order].tolist(), padding):
        rows = order[part]
        width = max(1, int(lengths[rows[0]]))
        states = read.answered(prompt_of[rows], rollouts.response_ids[rows, : width - 1]).flatten(0, 1)
        counted = rollouts.mask[rows, :width].flatten().nonzero().squeeze(-1)
        hidden.append(states if len(counted) == len(states) else states[counted])
    return States(torch.cat(hidden), order)


class PromptStates:
    """What a model's pass over prompts gives to responses that go on from them.

    Args:
        backbone: the model without its head.
        ids: of the prompts, padded on the left.
        seen: false in padding.
    """

    def __init__(self, backbone: nn.Module, ids: Int[Tensor, "B P"], seen: Bool[Tensor, "B P"]) -> None:
        from transformers import DynamicCache

        cache = DynamicCache()  # made without the config it keeps all of a prompt, also where attention slides
        self.backbone, self.seen = backbone, seen
        self.last = run_backbone(backbone, ids, seen, cache)[:, -1]
        self.held = [(keys, values) for keys, values, *_ in cache]

    def answered(self, whose: Int[Tensor, " N"], response: Int[Tensor, "N t"]) -> Float[Tensor, "N t+1 H"]:
        """Return the states that predict each token of a response and the one after it, to prompts `whose`."""
        from transformers import DynamicCache

        states = self.last[whose, None]
        if response.shape[1] == 0:
            return states
        # What lies behind a response's end needs no mask: no token looks ahead.
        known = torch.cat([self.seen[whose], torch.ones_like(response, dtype=torch.bool)], dim=1)
        shared = DynamicCache([(keys[whose], values[whose]) for keys, values in self.held])
        return torch.cat([states, run_backbone(self.backbone, response, known, shared)], dim=1)


@contextmanager
def keys_as_they_are(device: torch.device) -> Iterator[None]:
    """On a CPU, let attention under a mask read a key once for all query heads that share it.

    By default it is copied for each of them, and the copies are kept for the backward pass: 4 % of the memory of an
    update of SmolLM2-135M. What is computed is the same. On other devices such kernels are none of the fast ones.
    """
    before = os.environ.get(GROUPED)
    if device.type == "cpu":
        os.environ[GROUPED] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(GROUPED, None)
        else:
            os.environ[GROUPED] = before


def joined_states(backbone: nn.Module, rollouts: Rollouts) -> States:
    """Run the model without its head over each prompt with its response, in one pass and without a cache.

    All processes make the same number of passes, and a layer is computed from its input alone: what sharded weights
    and recomputed activations need.
    """
    start, width = int(rollouts.prompt_mask.any(dim=0).int().argmax()), max(1, int(rollouts.mask.any(dim=0).sum()))
    ids = torch.cat([rollouts.prompt_ids[:, start:], rollouts.response_ids[:, : width - 1]], dim=1)
    seen = torch.cat([rollouts.prompt_mask[:, start:], rollouts.mask[:, : width - 1]], dim=1)
    states = run_backbone(backbone, ids, seen)[:, -width:]
    return States(states[rollouts.mask[:, :width]], torch.arange(len(ids), device=ids.device))


def run_backbone(backbone: nn.Module, ids: Tensor, seen: Tensor, cache: object | None = None) -> Tensor:
    """Return the last hidden states of `ids`; `seen` also covers what the cache holds."""
    positions = (seen.long().cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with lean_layers(backbone):
        output = backbone(
            input_ids=ids,
            attention_mask=seen.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
    return output.last_hidden_state


def distinct_prompts(rollouts: Rollouts) -> tuple[Int[Tensor, " B"], Int[Tensor, " N"]]:
    """Return the first row of each run of rows with the same prompt, and the number of each row's run."""
    ids = rollouts.prompt_ids.masked_fill(~rollouts.prompt_mask, -1)
    new = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    new[1:] = (ids[1:] != ids[:-1]).any(dim=1)
    return new.nonzero().squeeze(-1), new.cumsum(dim=0) - 1


def passes(lengths: list[int], most: int) -> Iterator[slice]:
    """Cut rows, longest first, so that the padding up to the longest of a pass is `most` tokens at most."""
    begin = padding = 0
    for row, length in enumerate(lengths):
        padding += lengths[begin] - length
        if padding > most:
            yield slice(begin, row)
            begin, padding = row, 0
    yield slice(begin, len(lengths))


def parts_of(rollouts: Rollouts, rows: Int[Tensor, " M"], size: int) -> list[Int[Tensor, " m"]]:
    """Cut the given rows into parts that take at most as much memory as `size` rows of the greatest length would.

    A prompt is computed once in a part and copied for each of its rows, so rows that share one stay together unless
    they alone are too many.
    """
    run_of = distinct_prompts(rollouts)[1].tolist()
    prompt, response = rollouts.prompt_mask.sum(dim=1).tolist(), rollouts.mask.sum(dim=1).tolist()
    chosen = rows.tolist()
    own = [ceil(COPIED * p) + r for p, r in zip(prompt, response, strict=True)]
    budget = size * max(prompt[row] + own[row] for row in chosen)
    parts: list[list[int]] = []
    used, last_run = budget, -1
    for run, group in groupby(chosen, key=run_of.__getitem__):
        together = sorted(group, key=response.__getitem__, reverse=True)
        fits = prompt[together[0]] + sum(own[row] for row in together) <= budget
        for piece in [together] if fits else [[row] for row in together]:
            taken, shared = sum(own[row] for row in piece), prompt[piece[0]]
            if used + taken + shared * (run != last_run) > budget:
                parts.append([])
                used, last_run = 0, -1
            used += taken + shared * (run != last_run)
            parts[-1] += piece
            last_run = run
    return [torch.tensor(part, device=rows.device) for part in parts]
