"""How a model's cache is driven: read prompts, extend their responses by a token at a time, drop what has ended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


class Decoder(ABC):
    """Responses in the making. A row is one of them; rows are numbered from 0 in the order of `read` and `keep`."""

    joins: bool  # whether prompts may be read while there are rows

    @abstractmethod
    def read(self, ids: Int[Tensor, "B P"], mask: Bool[Tensor, "B P"], samples: int) -> Float[Tensor, "B V"]:
        """Append `samples` rows for each left-padded prompt; return the logits of their first token, once a prompt."""

    @abstractmethod
    def step(self, token: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """Append a token to each row and return the logits of the next."""

    @abstractmethod
    def keep(self, alive: Sequence[bool]) -> list[int]:
        """Drop rows; return, for each row that is left, the number it had."""


class DynamicDecoder(Decoder):
    """Any cache of transformers, grown by concatenation; each row has a copy of its prompt's."""

    joins = False
    SLACK = 0.75  # the cache is copied without the ended rows when no more than this share is left

    cache: DynamicCache
    seen: Bool[Tensor, "S C"]  # by each row of the cache
    slot: Int[Tensor, " R"]  # in the cache, of each row

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def read(self, ids: Int[Tensor, "B P"], mask: Bool[Tensor, "B P"], samples: int) -> Float[Tensor, "B V"]:
        """Start anew with these prompts: there must be no rows."""
        logits, self.cache = read_prompts(self.model, ids, mask)
        self.cache.batch_repeat_interleave(samples)
        self.seen = mask.repeat_interleave(samples, dim=0)
        self.slot = torch.arange(len(self.seen), device=ids.device)
        return logits

    def step(self, token: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """Pass all rows of the cache through the model, ended ones with any token."""
        ids = token.new_zeros(len(self.seen), 1).index_copy(0, self.slot, token[:, None])
        self.seen = torch.cat([self.seen, self.seen.new_ones(len(ids), 1)], dim=1)
        return forward(self.model, ids, self.seen, self.cache)[self.slot]

    def keep(self, alive: Sequence[bool]) -> list[int]:
        """Drop rows, and their part of the cache when there are enough of them."""
        order = [row for row, lives in enumerate(alive) if lives]
        self.slot = self.slot[order]
        if len(order) <= self.SLACK * len(self.seen):
            self.cache.batch_select_indices(self.slot)
            self.seen = self.seen[self.slot]
            self.slot = torch.arange(len(order), device=self.slot.device)
        return order


def read_prompts(
    model: PreTrainedModel, ids: Int[Tensor, "B P"], mask: Bool[Tensor, "B P"]
) -> tuple[Float[Tensor, "B V"], DynamicCache]:
    """Return the logits after left-padded prompts, and the cache that holds them."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    return forward(model, ids, mask, cache), cache


def forward(
    model: PreTrainedModel, ids: Int[Tensor, "R L"], seen: Bool[Tensor, "R S"], cache: DynamicCache
) -> Float[Tensor, "R V"]:
    """Return the logits after the last of the new tokens `ids`; `seen` covers them and what the cache holds."""
    positions = (seen.long().cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    output = model(
        input_ids=ids,
        attention_mask=seen.long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]
