"""The memory of one process at each moment of a training step, in bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_rlvr.models.attention import attends_plainly
from lightning_rlvr.models.forward import joins
from lightning_rlvr.models.lora import adapted
from lightning_rlvr.models.packing import parts_of
from lightning_rlvr.ops.vocabulary import ACCELERATOR_BYTES, CPU_BYTES
from lightning_rlvr.preflight.trace import optimizer_step, prompt_pass, update_pass
from lightning_rlvr.rollout.linear import packs_weights
from lightning_rlvr.rollout.llama_gpu import merged_bytes
from lightning_rlvr.types import Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_rlvr.preflight.placement import Placement

# Of a response token: sampled (randomness, id, log-probability, entropy, 8 bytes each), and as it is returned.
SAMPLED_BYTES, RETURNED_BYTES = 32, 25
PLANNED_BYTES = 120  # of a response token of all ranks while the objective plans: statistics, order, masks, weights
ADAM_STATES = 2  # assumed of an optimizer that cannot be traced, in the weights' dtype


@dataclass(frozen=True)
class Work:
    """What one process has at hand in a step.

    Args:
        prompts: of a rollout batch, on this rank.
        samples: responses to each.
        prompt_tokens, response_tokens: the most that each has.
        updates: optimizer steps on a rollout batch.
        micro_batch_size: rows of the greatest length in a pass.
        rollout_rows: rows decoded at a time.
        eval_prompts, eval_samples, eval_tokens: the same of validation; 0 prompts without.
        with_entropy: whether the loss reads entropies with their gradient.
        recompute: whether statistics take a pass of their own, at least for the first rollout batch.
        temperature: of sampling.
    """

    prompts: int
    samples: int
    prompt_tokens: int
    response_tokens: int
    updates: int
    micro_batch_size: int
    rollout_rows: int
    eval_prompts: int
    eval_samples: int
    eval_tokens: int
    with_entropy: bool
    recompute: bool
    temperature: float

    def largest_part(self, joined: bool) -> tuple[int, int, int]:
        """Return prompts and rows of the largest micro-batch, and the number of those, if all responses are full."""
        rows = -(-self.prompts // self.updates) * self.samples
        if joined:
            most = min(self.micro_batch_size, rows)
            return most, most, -(-rows // most)
        group = torch.arange(rows) // self.samples
        none = torch.zeros(1).expand(rows, self.response_tokens)
        every = Rollouts(
            prompt_ids=group[:, None].expand(rows, self.prompt_tokens),
            prompt_mask=torch.ones(1, dtype=torch.bool).expand(rows, self.prompt_tokens),
            response_ids=torch.zeros(1, dtype=torch.long).expand(none.shape),
            mask=torch.ones(1, dtype=torch.bool).expand(none.shape),
            logp=none,
            entropy=none,
            truncated=none[:, 0].bool(),
        )
        parts = [group[part] for part in parts_of(every, torch.arange(rows), self.micro_batch_size)]
        sizes = [(len(part.unique()), len(part)) for part in parts]
        largest = max(sizes, key=lambda size: size[0] * self.prompt_tokens + size[1] * self.response_tokens)
        return *largest, len(parts)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process: `parts` are there all the time, `moments` come on top of them, one after another."""

    parts: dict[str, int]
    moments: dict[str, dict[str, int]]

    @property
    def totals(self) -> dict[str, int]:
        """The most at each moment."""
        held = sum(self.parts.values())
        return {name: held + sum(of.values()) for name, of in self.moments.items()}

    @property
    def peak(self) -> int:
        """The most at any moment."""
        return max(self.totals.values())


def estimate(
    model: PreTrainedModel,
    work: Work,
    place: Placement,
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    reference: bool,
    offloaded: bool = False,
) -> Memory:
    """Return the memory of a process from the second step on, if all prompts and responses are as long as they may be.

    What is read from the model is traced (see trace.py); the vocabulary's head, the sampler and the keys and values of
    responses follow the formulas of the code that holds them. An `offloaded` reference is on a GPU for its pass only.
    """
    weights = sum(parameter.nbytes for parameter in model.parameters())
    trained = trained_bytes(model)
    head = model.get_output_embeddings()
    size, hidden = head.weight.shape
    vocabulary = Vocabulary(size, hidden, head.weight.element_size(), place, head.weight.requires_grad)
    stepped = copy.deepcopy(model).float() if place.master_bytes else model  # what the optimizer is given
    masters = trained_bytes(stepped)
    state, extra = optimizer_step(stepped, make_optimizer, place.accelerator) or (ADAM_STATES * masters, masters)
    frozen = weights // place.weights if reference and not adapted(model) else 0
    away = offloaded and place.accelerator
    parts = {
        "weights": weights // place.weights,
        "gradients": trained // place.gradients if place.gradients_stay else 0,
        "optimizer": (state + (masters if place.master_bytes else 0)) // place.optimizer,
        "reference": 0 if away else frozen,
        "communication": trained if place.buckets else 0,
        "batch": work.prompts * work.samples * (work.response_tokens * RETURNED_BYTES + work.prompt_tokens * 9),
    }
    gradients = {} if place.gradients_stay else {"gradients": trained // place.gradients}
    planned = work.prompts * place.world * work.samples * work.response_tokens * PLANNED_BYTES
    moments = {
        "rollout": _rollout(model, work, place, vocabulary),
        "plan": {"statistics of all ranks": planned},
        "update": {**gradients, **_update(model, work, place, vocabulary)},
        "optimizer step": {**gradients, "temporaries": extra // place.optimizer},
    }
    if work.recompute:
        moments["statistics"] = _statistics(model, work, place, vocabulary)
    if frozen and away:
        moments["reference"] = {"reference": frozen, **_statistics(model, work, place, vocabulary)}
    return Memory(parts, moments)


def trained_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the weights that are trained."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


@dataclass(frozen=True)
class Vocabulary:
    """The head over a vocabulary: see ops.vocabulary and rollout.sampling for what each holds."""

    size: int
    hidden: int
    weight_bytes: int
    place: Placement
    trained: bool = True  # whether its weight is

    def head(self, tokens: int, with_entropy: bool, gradient: bool, temperature: float) -> tuple[int, int]:
        """Return the most bytes while values and gradient are formed, and those of the gradient that is kept."""
        most = ACCELERATOR_BYTES if self.place.accelerator else CPU_BYTES
        buffer = min(max(1, most // (4 * self.size)), tokens) * self.size * 4
        factors = 2 if self.place.autocast is not None else self.weight_bytes
        if factors > 4:  # of what the buffer holds
            copies = 3 * buffer if with_entropy else (1 + (temperature != 1.0)) * buffer
        else:  # by kernels nothing but the gradient in the factors' dtype, where that is another
            copies = buffer * factors // 4 if gradient and factors < 4 else 0
        matrix = 0
        if self.place.autocast is not None:  # rounded, and on a CPU widened again
            matrix = self.size * self.hidden * (2 if self.place.accelerator else 6)
        kept = 4 * (tokens + self.size * self.trained) * self.hidden if gradient else 0
        return buffer + (copies if self.place.accelerator else 0) + matrix + kept, kept

    def sampler(self, rows: int) -> int:
        """Return the bytes of the logits of a step's tokens and what is made of them."""
        logits = rows * self.size * (2 if self.place.autocast is not None else self.weight_bytes)
        return 2 * logits + (8 * rows * self.size if self.place.accelerator else 0)


def _rollout(model: PreTrainedModel, work: Work, place: Placement, vocabulary: Vocabulary) -> dict[str, int]:
    """Keys and values of prompts and responses, or what it takes to read the prompts, in training or validation."""
    found: list[dict[str, int]] = []
    shares = attends_plainly(model)
    for prompts, samples, tokens in (
        (work.prompts, work.samples, work.response_tokens),
        (work.eval_prompts, work.eval_samples, work.eval_tokens),
    ):
        if not prompts:
            continue
        groups = min(prompts, max(1, work.rollout_rows // samples))
        rows = groups * samples
        read = prompt_pass(model, groups, work.prompt_tokens, place.autocast)
        cache = read.rounded if shares else read.cache
        own = cache // (groups * work.prompt_tokens) * rows * tokens
        heads = getattr(model.config, "num_attention_heads", 1)
        scores = 0 if shares and place.accelerator else 3 * 4 * rows * heads * (work.prompt_tokens + tokens)
        found.append({
            "keys and values": cache + own,
            "logits": max(vocabulary.sampler(rows) + scores, read.peak - cache),
            "sampled tokens": prompts * samples * tokens * SAMPLED_BYTES,
        })  # fmt: skip
    largest = max(found, key=lambda one: sum(one.values()))
    prepared = _prepared_weights(model, place) if shares else 0
    return {**largest, "prepared weights": prepared, "gathered weights": place.gathered_whole(model)}


def _prepared_weights(model: PreTrainedModel, place: Placement) -> int:
    """Return the bytes of what decoding steps keep of the weights of linear layers: rounded, packed or side by side.

    Under autocast, weights that are gathered come rounded.
    """
    if place.accelerator and place.autocast is None:
        return merged_bytes(model) if place.weights == 1 else 0
    if place.autocast is not None:
        each = place.autocast.itemsize if place.weights == 1 else 0
    else:
        each = 4 if packs_weights(model, "cpu") else 0
    linear = [part.weight for part in model.modules() if type(part) is nn.Linear]
    return sum(weight.numel() for weight in linear if weight.dtype == torch.float32) * each


def _statistics(model: PreTrainedModel, work: Work, place: Placement, vocabulary: Vocabulary) -> dict[str, int]:
    """A pass without gradients: no more than the forward pass of an update, of one layer at a time."""
    prompts, rows, _ = work.largest_part(place.joined or joins(model))
    read = prompt_pass(model, max(1, prompts), work.prompt_tokens, place.autocast)
    own = read.cache // (max(1, prompts) * work.prompt_tokens) * rows * (work.prompt_tokens + work.response_tokens)
    peak, _ = vocabulary.head(rows * work.response_tokens, True, False, work.temperature)
    return {"keys and values": read.cache + own, "logits buffer": peak, "gathered weights": place.gathered_parts(model)}


def _update(model: PreTrainedModel, work: Work, place: Placement, vocabulary: Vocabulary) -> dict[str, int]:
    """Activations and the head's buffer, then the backward pass with the head's gradients waiting."""
    joined = place.joined or joins(model)
    prompts, rows, _ = work.largest_part(joined)
    traced = update_pass(model, prompts, rows, (work.prompt_tokens, work.response_tokens), joined, place)
    tokens = rows * work.response_tokens
    peak, kept = vocabulary.head(tokens, work.with_entropy, True, work.temperature)
    # The embedding's gradient is as large as the weight, and is formed last.
    beyond = max(peak, traced.peak - traced.activations + kept)
    return {"activations": traced.activations, "logits buffer": beyond, "gathered weights": place.gathered_parts(model)}
