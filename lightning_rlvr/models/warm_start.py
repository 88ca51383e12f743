"""The supervised warm start: teaches a small causal model to answer in a teacher's manner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_rlvr.models.muon import Muon
from lightning_rlvr.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WARMUP_SHARE = 0.05  # of the steps, in which the learning rate climbs
DECAY_SHARE = 0.6  # of the steps, the last ones, in which it falls to 0
MAX_GRAD_NORM = 1.0
WEIGHT_DECAY = 0.01
IGNORED = -100


class Batch(NamedTuple):
    """Right-padded prompts with solutions. `labels` holds solution and EOS; elsewhere IGNORED."""

    input_ids: Tensor  # [N, L]
    labels: Tensor  # [N, L]


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterator[tuple[str, str]],
    *,
    steps: int,
    batch_size: int,
    lr: float,
) -> list[float]:
    """Minimise the cross entropy of solution tokens and EOS; return the loss of each step, in nats a token.

    Muon turns the matrices between embedding and logits, which for such a model takes half the examples that
    AdamW takes; AdamW does the rest, at the same rate.
    The model is changed in place and left in training mode.

    Raises: UserError if `examples` ends before the steps are done.
    """
    from tqdm import tqdm

    optimizers = _optimizers(model, lr)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps)) for optimizer in optimizers
    ]
    model.train()
    losses: list[float] = []
    with tqdm(total=steps * batch_size, desc="warm start", unit=" examples", mininterval=1.0) as bar:
        for _ in range(steps):
            batch = collate(list(islice(examples, batch_size)), batch_size, tokenizer)
            losses.append(_step(model, batch, optimizers))
            for schedule in schedules:
                schedule.step()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update(batch_size)
    return losses


def collate(examples: Sequence[tuple[str, str]], batch_size: int, tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Lay out prompt, solution, EOS from the left, padded on the right.

    Raises: UserError if there are fewer examples than `batch_size`.
    """
    if len(examples) < batch_size:
        raise UserError(
            f"A teacher must yield examples without end, but it stopped {batch_size - len(examples)} short of "
            f"a batch of {batch_size}: the warm start takes steps * batch_size examples. "
            "Set model.policy.init_args.teacher."
        )
    prompts = tokenizer([prompt for prompt, _ in examples], add_special_tokens=False)["input_ids"]
    solutions = tokenizer([solution for _, solution in examples], add_special_tokens=False)["input_ids"]
    eos = tokenizer.eos_token_id
    length = max(len(p) + len(s) for p, s in zip(prompts, solutions, strict=True)) + 1
    input_ids = torch.full((batch_size, length), tokenizer.pad_token_id)
    labels = torch.full((batch_size, length), IGNORED)
    for row, (prompt, solution) in enumerate(zip(prompts, solutions, strict=True)):
        end = len(prompt) + len(solution) + 1
        input_ids[row, :end] = torch.tensor([*prompt, *solution, eos])
        labels[row, len(prompt) : end] = input_ids[row, len(prompt) : end]
    return Batch(input_ids, labels)


def _optimizers(model: PreTrainedModel, lr: float) -> list[torch.optim.Optimizer]:
    embedding = model.get_input_embeddings().weight
    hidden = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim != 2 or p is embedding]
    return [
        Muon(hidden, lr=lr, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY),
    ]


def _rate(step: int, steps: int) -> float:
    """Return the share of the learning rate: a climb, level ground, then down to 0."""
    return min(1.0, (step + 1) / (WARMUP_SHARE * steps), (1 - step / steps) / DECAY_SHARE)


def _step(model: PreTrainedModel, batch: Batch, optimizers: Sequence[torch.optim.Optimizer]) -> float:
    # Padding is on the right, so causal attention keeps it out of what counts and no mask is needed.
    logits = model(input_ids=batch.input_ids[:, :-1], use_cache=False).logits  # [N, L - 1, V]
    loss = cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED)
    model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    for optimizer in optimizers:
        optimizer.step()
    return float(loss.detach())
