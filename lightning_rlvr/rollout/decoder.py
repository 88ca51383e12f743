"""How a model's cache is driven: read prompts, extend their responses by a token at a time, drop what has ended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_rlvr.models.forward import PROBE_TOLERANCE, PROBE_TOLERANCE_WIDE
from lightning_rlvr.types import UserError

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


STATES = "conv_states"  # attribute of a cache's layer that holds states instead of, or beside, keys and values


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
        order = torch.arange(len(mask), device=ids.device).repeat_interleave(samples)
        self.cache.reorder_cache(order)  # type: ignore[arg-type] # any layer has it, unlike batch_repeat_interleave
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
            self.cache.reorder_cache(self.slot)  # type: ignore[arg-type]
            self.seen = self.seen[self.slot]
            self.slot = torch.arange(len(order), device=self.slot.device)
        return order


@torch.no_grad()
def check_states(model: PreTrainedModel) -> None:
    """Let a model decode whose layers hold states, if padding and copies do them no harm.

    Found out once for a model: responses to two prompts of different lengths, one of each dropped on the way, against
    each row by itself at once.

    Raises: UserError if the values differ.
    """
    from transformers import DynamicCache

    if model in _CHECKED:
        return
    if not any(hasattr(layer, STATES) for layer in DynamicCache(config=model.config).layers):
        _CHECKED.add(model)
        return
    try:
        with torch.autocast(model.device.type, enabled=False):
            gap, most = _gap(model)
        reason = f"log-probabilities differ by {gap:.2g} nats"
        exact = gap <= PROBE_TOLERANCE.get(model.dtype, PROBE_TOLERANCE_WIDE) * most
    except Exception as error:  # noqa: BLE001 - a model may fail in any way at what it was not made for
        reason, exact = f"it fails with {error!r}", False
    if not exact:
        raise UserError(
            f"the policy must give a response the same log-probabilities token by token and as a whole, but for "
            f"{type(model).__name__} {reason}: the states of its layers do not follow padded prompts, or the rows that "
            "they are of. Set model.policy (in evaluate: models)."
        )
    _CHECKED.add(model)


_CHECKED: WeakSet[nn.Module] = WeakSet()  # models without states, or whose states follow their rows


def _gap(model: PreTrainedModel) -> tuple[float, float]:
    """Return how far log-probabilities of decoded tokens lie from those of whole rows, and the largest of them."""
    generator = torch.Generator().manual_seed(0)
    embedding: Any = model.get_input_embeddings()
    tokens = torch.randint(len(embedding.weight), (4, 8), generator=generator).to(model.device)
    prompt = tokens[:2, :5]
    mask = torch.arange(5, device=model.device) >= torch.tensor([[0], [3]], device=model.device)
    decoder = DynamicDecoder(model)
    found = [decoder.read(prompt, mask, 2).repeat_interleave(2, dim=0), decoder.step(tokens[:, 5])]
    kept = decoder.keep([True, False, False, True])
    found += [decoder.step(tokens[kept, at]) for at in (6, 7)]
    gaps, most = [], []
    for place, row in enumerate(kept):
        whole = torch.cat([prompt[row // 2][mask[row // 2]], tokens[row, 5:]])
        logits = model(input_ids=whole[None], use_cache=False).logits[0, -4:]
        logp = torch.stack([found[0][row], found[1][row], found[2][place], found[3][place]]).float().log_softmax(dim=-1)
        wanted = logits.float().log_softmax(dim=-1)
        gaps.append(float((logp - wanted).abs().max()))
        most.append(float(wanted.abs().max()))
    return max(gaps), max(most)


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
