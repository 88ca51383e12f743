"""Rollouts with a transformers model and its key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_rlvr.models.attention import NotPlainError, attends_plainly
from lightning_rlvr.models.memory import in_smaller_parts
from lightning_rlvr.rollout.decoder import Decoder, DynamicDecoder, check_states
from lightning_rlvr.rollout.sampling import check_finite, draw, uniforms
from lightning_rlvr.types import Engine, Rollouts, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_rlvr.models import Policy


class TransformersEngine(Engine):
    """Samples with a causal language model of transformers.

    A prompt is read once for all its responses. Rows that have ended leave the batch, and where there are more
    prompts than fit, the next ones take their place, longest prompts first.

    Args:
        model: the policy; it is used where it is and put back into its mode.
        eos_ids: tokens that end a response. They count as part of it.
        pad_id: fills the room after the end and before a prompt; never looked at.
        max_rows: the most responses decoded at a time; a group is never split. Halved where memory runs out.
    """

    def __init__(self, model: PreTrainedModel, eos_ids: Sequence[int], pad_id: int, max_rows: int = 256) -> None:
        if not eos_ids:
            raise ValueError("the policy has no end-of-sequence token, so no response could ever end")
        self.model, self.pad_id, self.max_rows = model, pad_id, max_rows
        self.eos_ids = torch.tensor(sorted(set(eos_ids)))

    @classmethod
    def of(cls, policy: Policy, max_rows: int = 256) -> TransformersEngine:
        """Return an engine for a policy, with the tokens that end its responses."""
        return cls(policy.model, policy.eos_ids, policy.tokenizer.pad_token_id, max_rows)

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], samples: int, sampling: Sampling
    ) -> Rollouts:
        """Sample `samples` responses to each prompt: see Engine.generate."""
        if len(seeds) != len(prompts) or samples < 1:
            raise ValueError(f"got {len(prompts)} prompts, {len(seeds)} seeds and {samples} samples for each prompt")
        device = self.model.device
        prompt_ids, prompt_mask = (x.to(device) for x in left_pad(prompts, self.pad_id))
        random = torch.cat([uniforms(seed, samples, sampling.max_new_tokens) for seed in seeds]).to(device)
        self.eos_ids = self.eos_ids.to(device)

        def decode(rows: int) -> _Batch:
            batch = _Batch(prompt_ids, prompt_mask, samples, random, sampling)
            # Kernels and graphs are launched on the current GPU, which need not be the model's.
            here = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
            with torch.inference_mode(), here:
                self._decode(batch, rows)
            return batch

        was_training = self.model.training
        self.model.eval()
        try:
            batch = self._in_memory(decode, samples, len(random))
        finally:
            self.model.train(was_training)
        return batch.rollouts(self.pad_id, torch.float64 if self.model.dtype == torch.float64 else torch.float32)

    def _in_memory(self, decode: Callable[[int], _Batch], samples: int, needed: int) -> _Batch:
        """Return decode(rows); where memory runs out the rows are halved, for what comes after too."""
        rows = min(self.max_rows, needed)
        # A pass through shards waits for other ranks, so it cannot be begun again by one.
        least = rows if any(isinstance(weight, DTensor) for weight in self.model.parameters()) else samples
        others = "data.group_size, sampling.max_new_tokens or data.max_prompt_tokens"
        batch, possible = in_smaller_parts(decode, rows, least, "rollout_rows", others)
        if possible < rows:
            self.max_rows = possible
        return batch

    def _decode(self, batch: _Batch, max_rows: int) -> None:
        from lightning_rlvr.rollout.shared_prefix import SharedPrefixDecoder

        groups = min(len(batch.prompt_ids), max(1, max_rows // batch.samples))
        if attends_plainly(self.model):
            rows = groups * batch.samples
            try:
                self._run(SharedPrefixDecoder(self.model, rows, batch.sampling.max_new_tokens), batch, groups)
                return
            except NotPlainError:  # in the first step: the one token sampled so far is sampled again
                pass
        check_states(self.model)
        self._run(DynamicDecoder(self.model), batch, groups)

    def _run(self, decoder: Decoder, batch: _Batch, groups: int) -> None:
        """Work off all prompts, at most `groups` at a time."""
        waiting = batch.prompt_mask.sum(dim=1).argsort(descending=True, stable=True)
        row = batch.random.new_zeros(0, dtype=torch.long)  # in the batch, of each response in the making
        length, logits = row, batch.random[:0]  # of each so far; of its next token
        while len(row) or len(waiting):
            room = groups - -(-len(row) // batch.samples)
            if len(waiting) and room and (decoder.joins or not len(row)):
                coming, waiting = waiting[:room], waiting[room:]
                first = batch.read(decoder, coming).repeat_interleave(batch.samples, dim=0)
                logits = torch.cat([logits, first]) if len(row) else first
                new = coming[:, None] * batch.samples + torch.arange(batch.samples, device=row.device)
                row, length = torch.cat([row, new.flatten()]), torch.cat([length, torch.zeros_like(new).flatten()])
            token, finite = batch.sample(logits, row, length)
            length = length + 1
            ended = self._ends(token, row, length)
            alive = ~ended & (length < batch.sampling.max_new_tokens)
            batch.truncated[row] = ~ended
            *flags, sound = torch.cat([alive, finite]).tolist()  # a GPU is waited for here alone
            check_finite(sound)
            if not all(flags):
                order = torch.tensor(decoder.keep(flags), dtype=torch.long, device=row.device)
                row, length, token = row[order], length[order], token[order]
            if len(row):
                logits = decoder.step(token)

    def _ends(self, token: Int[Tensor, " R"], row: Int[Tensor, " R"], length: Int[Tensor, " R"]) -> Bool[Tensor, " R"]:
        """Say which responses end with this token; `row` is their place in the batch, `length` theirs so far."""
        return torch.isin(token, self.eos_ids)


class _Batch:
    """Prompts with the randomness of their responses, and what has been sampled."""

    def __init__(
        self,
        prompt_ids: Int[Tensor, "B P"],
        prompt_mask: Bool[Tensor, "B P"],
        samples: int,
        random: Float[Tensor, "N T"],
        sampling: Sampling,
    ) -> None:
        self.prompt_ids, self.prompt_mask = prompt_ids, prompt_mask
        self.samples, self.random, self.sampling = samples, random, sampling
        self.ids = torch.zeros_like(random, dtype=torch.long)
        self.logp, self.entropy = torch.zeros_like(random), torch.zeros_like(random)
        self.length = torch.zeros(len(random), dtype=torch.long, device=random.device)
        self.truncated = torch.zeros(len(random), dtype=torch.bool, device=random.device)

    def read(self, decoder: Decoder, prompts: Int[Tensor, " b"]) -> Float[Tensor, "b V"]:
        """Read some of the prompts, without the padding that is common to them."""
        width = int(self.prompt_mask[prompts].sum(dim=1).max())
        return decoder.read(self.prompt_ids[prompts, -width:], self.prompt_mask[prompts, -width:], self.samples)

    def sample(
        self, logits: Float[Tensor, "R V"], row: Int[Tensor, " R"], at: Int[Tensor, " R"]
    ) -> tuple[Int[Tensor, " R"], Bool[Tensor, " 1"]]:
        """Draw and record the token of some rows at position `at`; return it, and whether all logits were finite."""
        *drawn, finite = draw(logits, self.random[row, at], self.sampling)
        for out, values in zip((self.ids, self.logp, self.entropy), drawn, strict=True):
            out[row, at] = values.to(out.dtype)
        self.length[row] = at + 1
        return drawn[0], finite.all(dim=0, keepdim=True)

    def rollouts(self, pad_id: int, wide: torch.dtype) -> Rollouts:
        """Return all that was sampled."""
        width = int(self.length.max())
        mask = torch.arange(width, device=self.length.device) < self.length[:, None]
        prompt_ids, prompt_mask = (x.repeat_interleave(self.samples, 0) for x in (self.prompt_ids, self.prompt_mask))
        return Rollouts(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            response_ids=self.ids[:, :width].masked_fill(~mask, pad_id),
            mask=mask,
            logp=self.logp[:, :width].to(wide),
            entropy=self.entropy[:, :width].to(wide),
            truncated=self.truncated,
        )


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
