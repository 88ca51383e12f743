"""The optimizer steps of one rollout batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from lightning_rlvr.models.forward import response_logp
from lightning_rlvr.training.distributed import add_ratios, world_size
from lightning_rlvr.types import Ratio, TokenBatch

if TYPE_CHECKING:
    from lightning_rlvr.training.experience import StepRecord
    from lightning_rlvr.training.module import RLVRModule


def update_policy(module: RLVRModule, record: StepRecord) -> tuple[dict[str, Ratio], Tensor]:
    """Take the optimizer steps that the plan foresees; return the metrics of the tokens, and which were clipped [N, T].

    Gradients are summed over micro-batches: the plan's weights hold the denominators of a whole step.
    """
    optimizer = cast(LightningOptimizer, module.optimizers())
    schedule = cast("LRScheduler | None", module.lr_schedulers())
    update = record.stats.update
    sums: dict[str, Ratio] = {}
    clipped = torch.zeros_like(record.stats.mask)
    for number in range(int(update.max()) + 1):
        optimizer.zero_grad()
        micro_batches = (update == number).nonzero().squeeze(-1).split(module.micro_batch_size)
        for i, rows in enumerate(micro_batches):
            tokens = _tokens(module, record, rows)
            loss, metrics, clipped[rows] = module.objective.loss(tokens, record.plan.rows(rows))
            with _synchronised(module, i + 1 == len(micro_batches)):
                module.manual_backward(loss * world_size())  # ranks average gradients; the plan's weights sum
            add_ratios(sums, {**metrics, "loss": Ratio(loss.detach(), loss.new_ones(()))})
        bound = float("inf") if module.max_grad_norm is None else module.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(module.policy.parameters(), bound)
        rate = norm.new_tensor(optimizer.param_groups[0]["lr"])
        add_ratios(sums, {"grad_norm": Ratio(norm, norm.new_ones(())), "lr": Ratio(rate, norm.new_ones(()))})
        optimizer.step()
        if schedule is not None:
            schedule.step()
    # A step's loss is the sum over its micro-batches and over ranks, not their mean.
    sums["loss"] = Ratio(sums["loss"].numerator * world_size(), sums["grad_norm"].denominator)
    return sums, clipped


def _tokens(module: RLVRModule, record: StepRecord, rows: Tensor) -> TokenBatch:
    """Run the policy over the given rows, with gradients."""
    part = record.experience.rollouts.rows(rows)
    values = response_logp(
        module.policy,
        part,
        module.sampling.temperature,
        module.objective.needs_entropy,
        module.reference if module.objective.needs_full_kl else None,
    )
    return TokenBatch(
        logp=values.logp,
        old_logp=record.stats.logp[rows],
        mask=part.mask,
        ref_logp=None if record.ref_logp is None else record.ref_logp[rows],
        entropy=values.entropy,
        full_kl=values.full_kl,
    )


def _synchronised(module: RLVRModule, last: bool) -> AbstractContextManager[None]:
    """Let ranks exchange gradients at the last backward pass of a step only."""
    wrapped = getattr(module.trainer, "model", None)
    return nullcontext() if last or not isinstance(wrapped, DistributedDataParallel) else wrapped.no_sync()
