"""The optimizer steps of one rollout batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from lightning_rlvr.models.forward import TokenValues, micro_batches, response_loss, sharded
from lightning_rlvr.models.memory import ERRORS, give_back, in_smaller_parts, out_of_memory
from lightning_rlvr.training.distributed import add_ratios, all_ranks, largest, world_size
from lightning_rlvr.training.numbers import leave_out, total
from lightning_rlvr.types import Objective, Ratio, TokenBatch, TokenPlan, UserError

if TYPE_CHECKING:
    from lightning_rlvr.training.experience import StepRecord
    from lightning_rlvr.training.module import RLVRModule

Result = TypeVar("Result")


def update_policy(module: RLVRModule, record: StepRecord) -> tuple[dict[str, Ratio], Tensor]:
    """Take the optimizer steps that the plan foresees; return the metrics of the tokens, and which were clipped [N, T].

    Gradients are summed over micro-batches: the plan's weights hold the denominators of a whole step. Rows that have
    no gradient are not run: see `idle_rows`.
    """
    optimizer = cast(LightningOptimizer, module.optimizers())
    schedule = cast("LRScheduler | None", module.lr_schedulers())
    update, idle = record.stats.update, idle_rows(module.objective, record.plan)
    losses, known = _Losses(module, record), total(record.stats)
    for number in range(int(update.max()) + 1):
        rows = (update == number).nonzero().squeeze(-1)
        # The optimizer, and other ranks, wait for a gradient, be it 0; with sharded weights for each pass.
        count = max(1, int((~idle[rows]).sum()))
        count = largest(count) if sharded(module.policy) else count
        moving = rows[idle[rows].int().argsort(stable=True)[:count].sort().values]
        loss = in_micro_batches(module, partial(_backward, module, losses, moving))
        losses.of_idle(rows[~torch.isin(rows, moving)])
        losses.add({"skipped_rows": Ratio(torch.tensor(len(rows) - len(moving)), torch.tensor(len(rows)))})
        rate, norm = torch.tensor(optimizer.param_groups[0]["lr"]), module.parallel.norm()
        finite = all_ranks(bool((known + loss).isfinite()) & bool(norm.isfinite()))
        if finite:
            module.skipped_in_a_row = 0
            norm = module.parallel.step(optimizer, module.max_grad_norm, norm)
            losses.on_policy = False
            if schedule is not None:
                schedule.step()
        else:
            leave_out(module, record, losses.step)
            module.parallel.drop(optimizer)
        losses.add({"grad_norm": Ratio(norm, norm.new_ones(())), "lr": Ratio(rate, rate.new_ones(()))})
        losses.add({"skipped_updates": Ratio(norm.new_tensor(float(not finite)), norm.new_tensor(float(number == 0)))})
        losses.close_step()
    module.policy.zero_grad()  # the next rollout can use the memory
    if record.stats.mask.device.type == "cpu":
        give_back()
    # A step's loss is the sum over its micro-batches and over ranks, not their mean.
    sums = losses.metrics
    sums["loss"] = Ratio(sums["loss"].numerator * world_size(), sums["grad_norm"].denominator)
    return sums, losses.clipped


def in_micro_batches(module: RLVRModule, work: Callable[[int], Result]) -> Result:
    """Return work(micro-batch size); where memory runs out the size is halved, for the rest of the run."""
    size = module.micro_batch_size
    others = "model.sampling.max_new_tokens or data.max_prompt_tokens, or let a smaller model train"
    least = 1 if module.parallel.begins_again else size
    result, module.micro_batch_size = in_smaller_parts(work, size, least, "model.micro_batch_size", others)
    return result


def _backward(module: RLVRModule, losses: _Losses, rows: Int[Tensor, " M"], size: int) -> Float[Tensor, ""]:
    """Make the gradient of the given rows, one micro-batch at a time; return their loss. It may be begun again."""
    module.policy.zero_grad()
    losses.step = {}
    objective, rollouts = module.objective, losses.record.experience.rollouts
    reference = module.reference if objective.needs_full_kl else None
    parts = micro_batches(module.policy, rollouts, rows, size, reference is not None)
    for i, part in enumerate(parts):
        last = i + 1 == len(parts)
        loss = response_loss(
            module.policy,
            rollouts.rows(part),
            module.sampling.temperature,
            partial(losses.of_rows, part),
            objective.needs_entropy,
            reference,
        )
        with _exchanging(module, last):
            module.parallel.backward(loss * world_size(), last)  # ranks average gradients; the plan's weights sum
        losses.add({"loss": Ratio(loss.detach(), loss.new_ones(()))})
    return losses.step["loss"].numerator


def idle_rows(objective: Objective, plan: TokenPlan) -> Bool[Tensor, " N"]:
    """Return the rows without gradient: no token has an advantage, or a weight of another term.

    With a reference there are none, since the KL to it is logged of all tokens.
    """
    pulled = (plan.advantage != 0) & plan.policy_mask
    for weight in (plan.kl_weight, plan.drift_weight, plan.entropy_weight):
        if weight is not None:
            pulled = pulled | (weight != 0)
    return ~pulled.any(dim=1) & (not objective.needs_reference)


class _Losses:
    """The objective's loss of some rows at a time; its metrics add up beside."""

    def __init__(self, module: RLVRModule, record: StepRecord) -> None:
        self.objective, self.record = module.objective, record
        self.on_policy = True  # as long as the policy is the one that sampled
        self.metrics: dict[str, Ratio] = {}
        self.step: dict[str, Ratio] = {}  # of the optimizer step under way
        self.clipped = torch.zeros_like(record.stats.mask)

    def of_rows(self, part: Int[Tensor, " M"], values: TokenValues, index: Int[Tensor, " n"]) -> Tensor:
        """Return the loss of the rows part[index], whose values are given.

        On policy the ratio is 1 by definition. With old log-probabilities of another pass it would be 1 but for
        rounding, and |log r| has the gradient of its sign.
        """
        rows, now = part[index], values.logp.detach()
        tokens = self._tokens(rows, values, now if self.on_policy else self.record.stats.logp[rows])
        loss, metrics, self.clipped[rows] = self.objective.loss(tokens, self.record.plan.rows(rows))
        self.add(metrics)
        if self.on_policy:
            gap = (self.record.experience.rollouts.logp[rows] - now).abs().masked_fill(~tokens.mask, 0.0)
            self.add({"logp_gap": Ratio(gap.sum(), tokens.mask.sum())})
        return loss

    def of_idle(self, rows: Int[Tensor, " M"]) -> None:
        """Count the tokens of rows that are not run, as unclipped and without gradient; a KL is of those that are."""
        if not len(rows):
            return
        stats = self.record.stats
        values = TokenValues(stats.logp[rows], stats.entropy[rows], None)
        metrics = self.objective.loss(self._tokens(rows, values, stats.logp[rows]), self.record.plan.rows(rows)).metrics
        self.add({name: ratio for name, ratio in metrics.items() if not name.startswith("kl/")})

    def add(self, metrics: dict[str, Ratio]) -> None:
        """Add to the sums of the step under way."""
        add_ratios(self.step, metrics)

    def close_step(self) -> None:
        """Add what the step came to."""
        add_ratios(self.metrics, self.step)
        self.step = {}

    def _tokens(self, rows: Tensor, values: TokenValues, old_logp: Tensor) -> TokenBatch:
        ref_logp = self.record.ref_logp
        return TokenBatch(
            logp=values.logp,
            old_logp=old_logp,
            mask=self.record.stats.mask[rows],
            ref_logp=None if ref_logp is None else ref_logp[rows],
            entropy=values.entropy,
            full_kl=values.full_kl,
        )


@contextmanager
def _exchanging(module: RLVRModule, last: bool) -> Iterator[None]:
    """Watch a backward pass, the last of a step or not, in which ranks may exchange gradients.

    Raises: UserError if memory runs out where other ranks are waited for: a step begun again would meet them in the
        midst of theirs. Before that it may be, since they wait.
    """
    try:
        yield
    except ERRORS as error:
        alone = module.parallel.begins_again and (world_size() == 1 or not last)
        if alone or not out_of_memory(error):
            raise
        raise UserError(
            f"memory ran out on rank {module.global_rank} while ranks exchange gradients, where a step cannot be begun "
            f"again: {error}. Lower model.micro_batch_size."
        ) from error
