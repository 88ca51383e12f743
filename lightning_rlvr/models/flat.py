"""One pass over the tokens of a batch: each prompt once, each response once, and no padding.

What a layer does to a token by itself, which is all but attention, it does to the tokens of all rows in a line. For
attention, prompts lie side by side, and so do responses of like length, each behind the keys and values of its prompt.
A weight is used once, so its gradient is formed and added at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_rlvr.models import llama
from lightning_rlvr.models.attention import NotPlainError, beyond_softmax
from lightning_rlvr.models.lean import lean_layers
from lightning_rlvr.models.packing import (
    ACCELERATOR_PADDING,
    CPU_PADDING,
    States,
    distinct_prompts,
    keys_as_they_are,
    passes,
)
from lightning_rlvr.types import Rollouts

NAME = "lightning_rlvr_flat"
LAYOUT = "flat_layout"  # attribute of the mask that stands for a layout in the model's call


def flat_states(backbone: nn.Module, rollouts: Rollouts) -> States:
    """Run the model without its head over prompts and counted response tokens, with gradients where those are on.

    Rows beside each other that have the same prompt share it. The model must be one that `attends_plainly`.

    Raises: NotPlainError if it does not after all.
    """
    prompts, prompt_of = distinct_prompts(rollouts)
    seen, lengths = rollouts.prompt_mask[prompts], rollouts.mask.sum(dim=1)
    order = lengths.argsort(descending=True, stable=True)
    read = torch.arange(rollouts.mask.shape[1], device=order.device) < lengths[order, None] - 1
    ids = torch.cat([rollouts.prompt_ids[prompts][seen], rollouts.response_ids[order][read]])
    layout = Layout(seen.sum(dim=1).tolist(), lengths[order].tolist(), prompt_of[order].tolist(), ids.device)
    with keys_as_they_are(ids.device):
        return States(flat_pass(backbone, ids, layout), order)


def flat_pass(backbone: Any, ids: Int[Tensor, " N"], layout: Layout) -> Float[Tensor, "K H"]:
    """Return the states that predict the tokens of each response, row after row, from the tokens that are read."""
    if llama.runs(backbone):
        return llama.run(backbone, ids, layout.position, layout.attend).index_select(0, layout.predicting)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)  # the model hands it to its attention as it is
    setattr(mask, LAYOUT, layout)
    config = backbone.config
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        with lean_layers(backbone):
            states: Tensor = backbone(
                input_ids=ids[None],
                attention_mask=mask,
                position_ids=layout.position[None],
                use_cache=False,
            ).last_hidden_state[0]
    finally:
        config._attn_implementation = before
    return states.index_select(0, layout.predicting)


class Layout:
    """Where tokens lie that are read: those of prompts, then those of responses, without the last of each.

    Args:
        prompts: tokens of each prompt.
        responses: tokens of each response, in descending order.
        whose: the prompt of each response.
        device: of the model.
    """

    def __init__(
        self, prompts: Sequence[int], responses: Sequence[int], whose: Sequence[int], device: torch.device
    ) -> None:
        read = [max(0, length - 1) for length in responses]
        ends, starts = list(accumulate(prompts)), accumulate(read, initial=sum(prompts))
        places = [range(length) for length in prompts]
        places += [range(prompts[p], prompts[p] + length) for p, length in zip(whose, read, strict=True)]
        self.position = _joined(places, device)
        before = [
            part
            for p, start, length in zip(whose, starts, responses, strict=False)
            if length
            for part in (range(ends[p] - 1, ends[p]), range(start, start + length - 1))
        ]
        self.predicting = _joined(before, device)
        self.prompts, self.answers = Block(prompts, device), []
        rows = sum(length > 0 for length in read)
        padding = CPU_PADDING if device.type == "cpu" else ACCELERATOR_PADDING
        for part in passes(read[:rows], padding) if rows else ():
            self.answers.append(Answers(read[part], whose[part], prompts, device))

    def attend(
        self,
        module: nn.Module,
        query: Float[Tensor, "N H D"],
        key: Float[Tensor, "N K D"],
        value: Float[Tensor, "N K E"],
        **kwargs: Any,
    ) -> Float[Tensor, "N H E"]:
        """Return the attention of each token to those of its row up to it."""
        sizes = [block.tokens for block in (self.prompts, *self.answers)]
        (q, *queries), (k, *keys), (v, *values) = (x.split(sizes) for x in (query, key, value))

        def attended(block: Block, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (block.padded(q), k, v))
            return block.unpadded(sdpa_attention_forward(module, q, k, v, mask, is_causal=True, **kwargs)[0])

        kind = query.device.type  # autocast would make a mask of another dtype anew in each layer, and keep it
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
        k, v = self.prompts.padded(k), self.prompts.padded(v)
        out = [attended(self.prompts, q, k, v, None)]
        for block, q, *own in zip(self.answers, queries, keys, values, strict=True):
            all_k, all_v = (
                torch.cat([of_prompts.index_select(0, block.whose), block.padded(x)], dim=1)
                for of_prompts, x in zip((k, v), own, strict=True)
            )
            out.append(attended(block, q, all_k, all_v, block.mask(dtype)))
        return torch.cat(out)


def _joined(parts: Sequence[range], device: torch.device) -> Int[Tensor, " N"]:
    return torch.cat([torch.arange(part.start, part.stop) for part in [range(0), *parts]]).to(device)


class Block:
    """Rows of tokens that attend together."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.rows, self.width, self.tokens = len(lengths), max(lengths), sum(lengths)
        places = [range(row * self.width, row * self.width + length) for row, length in enumerate(lengths)]
        full = self.tokens == self.rows * self.width
        self.place = None if full else _joined(places, device)

    def padded(self, x: Float[Tensor, "M H D"]) -> Float[Tensor, "n T H D"]:
        """Lay the tokens of rows side by side."""
        if self.place is not None:
            x = _Padded.apply(x, self.place, self.rows * self.width)
        return x.reshape(self.rows, self.width, *x.shape[1:])

    def unpadded(self, x: Float[Tensor, "n T H D"]) -> Float[Tensor, "M H D"]:
        """Undo `padded`."""
        y: Tensor = x.flatten(0, 1)
        return y if self.place is None else _Unpadded.apply(y, self.place)


class Answers(Block):
    """Responses of like length."""

    def __init__(
        self, lengths: Sequence[int], whose: Sequence[int], prompts: Sequence[int], device: torch.device
    ) -> None:
        super().__init__(lengths, device)
        self.whose = torch.tensor(whose, device=device)
        of = [prompts[p] for p in whose]
        self.longest = max(prompts)
        self.of = torch.tensor(of[:1] if min(of) == self.longest else of, device=device)  # one stands for all
        self._mask: Tensor | None = None

    def mask(self, dtype: torch.dtype) -> Float[Tensor, "m 1 T C"]:
        """Return what is added to the scores of each token with those of its prompt and its response."""
        if self._mask is None:
            at = torch.arange(self.longest, device=self.of.device) < self.of[:, None, None, None]
            own = torch.ones(self.width, self.width, dtype=torch.bool, device=at.device).tril()
            seen = torch.cat([at.expand(-1, -1, self.width, -1), own.expand(len(at), 1, -1, -1)], dim=-1)
            self._mask = torch.zeros(seen.shape, dtype=dtype, device=at.device).masked_fill_(~seen, -torch.inf)
        return self._mask


class _Padded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(place)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, place, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return gradient.index_select(0, place), None, None


class _Unpadded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.size = len(x)
        return x.index_select(0, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.size, *gradient.shape[1:]).index_copy_(0, place, gradient), None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    layout = getattr(attention_mask, LAYOUT, None)
    if layout is None or beyond_softmax(kwargs):
        raise NotPlainError(type(module).__name__)
    in_line = (x[0].transpose(0, 1) for x in (query, key, value))  # of [1, H, N, D]
    return layout.attend(module, *in_line, scaling=scaling, dropout=dropout)[None], None


AttentionInterface.register(NAME, _attend)
