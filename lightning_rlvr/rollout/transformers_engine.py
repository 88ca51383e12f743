"""Rollouts with a transformers model and its key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_rlvr.rollout.batch import concatenate
from lightning_rlvr.rollout.sampling import draw, uniforms
from lightning_rlvr.types import Engine, Rollouts, Sampling

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


class TransformersEngine(Engine):
    """Samples with a causal language model of transformers.

    A prompt is read once and its cache shared among its responses; rows that have ended leave the batch.

    Args:
        model: the policy; it is used where it is and put back into its mode.
        eos_ids: tokens that end a response. They count as part of it.
        pad_id: fills the room after the end and before a prompt; never looked at.
        max_rows: the most responses decoded at a time; a group is never split.
    """

    def __init__(self, model: PreTrainedModel, eos_ids: Sequence[int], pad_id: int, max_rows: int = 256) -> None:
        if not eos_ids:
            raise ValueError("the policy has no end-of-sequence token, so no response could ever end")
        self.model, self.pad_id, self.max_rows = model, pad_id, max_rows
        self.eos_ids = torch.tensor(sorted(set(eos_ids)))

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], samples: int, sampling: Sampling
    ) -> Rollouts:
        """Sample `samples` responses to each prompt: see Engine.generate."""
        if len(seeds) != len(prompts) or samples < 1:
            raise ValueError(f"got {len(prompts)} prompts, {len(seeds)} seeds and {samples} samples for each prompt")
        prompt_ids, prompt_mask = left_pad(prompts, self.pad_id)
        random = torch.stack([uniforms(seed, samples, sampling.max_new_tokens) for seed in seeds])
        per_chunk = max(1, self.max_rows // samples)
        was_training = self.model.training
        self.model.eval()
        try:
            chunks = [
                self._decode(
                    prompt_ids[i : i + per_chunk], prompt_mask[i : i + per_chunk], random[i : i + per_chunk], sampling
                )
                for i in range(0, len(prompts), per_chunk)
            ]
        finally:
            self.model.train(was_training)
        return concatenate(chunks)

    def _decode(
        self,
        prompt_ids: Int[Tensor, "B P"],
        prompt_mask: Bool[Tensor, "B P"],
        random: Float[Tensor, "B G T"],
        sampling: Sampling,
    ) -> Rollouts:
        device, eos_ids = self.model.device, self.eos_ids.to(self.model.device)
        samples, random = random.shape[1], random.flatten(0, 1).to(device)
        ids = torch.full(random.shape, self.pad_id, device=device)
        mask = torch.zeros(random.shape, dtype=torch.bool, device=device)
        width = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        logp, entropy = (torch.zeros(random.shape, dtype=width, device=device) for _ in range(2))

        logits, cache = self._prefill(prompt_ids.to(device), prompt_mask.to(device), samples)
        seen = prompt_mask.to(device).repeat_interleave(samples, dim=0)
        rows = torch.arange(len(random), device=device)  # the rows still in the batch
        alive = torch.ones_like(rows, dtype=torch.bool)  # those among them that have not ended
        for t in range(sampling.max_new_tokens):
            token, *statistics = draw(logits, random[rows, t], sampling)
            live = rows[alive]
            ids[live, t], mask[live, t] = token[alive], True
            for out, value in zip((logp, entropy), statistics, strict=True):
                out[live, t] = value[alive].to(out.dtype)
            alive = alive & ~torch.isin(token, eos_ids)
            if not alive.any() or t + 1 == sampling.max_new_tokens:
                break
            if alive.sum() <= 0.75 * len(rows):  # to drop rows is to copy the cache, so not for each of them
                rows, token, seen = rows[alive], token[alive], seen[alive]
                cache.batch_select_indices(alive.nonzero().squeeze(-1))
                alive = alive[alive]
            seen = torch.cat([seen, seen.new_ones(len(rows), 1)], dim=1)
            logits = self._forward(token[:, None], seen, cache)
        truncated = torch.zeros(len(random), dtype=torch.bool, device=device)
        truncated[rows[alive]] = True
        prompt_ids, prompt_mask = (x.to(device).repeat_interleave(samples, dim=0) for x in (prompt_ids, prompt_mask))
        used = slice(0, t + 1)
        return Rollouts(
            prompt_ids, prompt_mask, ids[:, used], mask[:, used], logp[:, used], entropy[:, used], truncated
        )

    def _prefill(self, prompt_ids: Tensor, prompt_mask: Tensor, samples: int) -> tuple[Tensor, DynamicCache]:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        logits = self._forward(prompt_ids, prompt_mask, cache)
        cache.batch_repeat_interleave(samples)
        return logits.repeat_interleave(samples, dim=0), cache

    def _forward(self, ids: Tensor, seen: Tensor, cache: DynamicCache) -> Tensor:
        positions = (seen.long().cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self.model(
            input_ids=ids,
            attention_mask=seen.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
    """Pad token ids on the left to the longest prompt; the mask is True on the prompt's own tokens.

    Raises: ValueError without prompts or with an empty one.

    >>> left_pad([[5], [6, 7]], pad_id=0)[0].tolist()
    [[0, 5], [6, 7]]
    """
    if not prompts or not all(prompts):
        raise ValueError("rollouts need at least one prompt, and each prompt at least one token")
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
    lengths = torch.tensor([len(p) for p in prompts])
    return ids, torch.arange(width) >= (width - lengths)[:, None]
