"""Updates that are not finite are left out, their rollout batch is kept, and a run that makes only such ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_rlvr.training.distributed import gather_objects
from lightning_rlvr.training.replay import save_replay
from lightning_rlvr.types import Ratio, TokenStats, UserError

if TYPE_CHECKING:
    from lightning_rlvr.training.experience import StepRecord
    from lightning_rlvr.training.module import RLVRModule

KEPT = 3  # rollout batches in failed/: each holds a whole policy
OVERFLOW = "model.optimizer (a lower lr), trainer.precision and the policy's dtype (bfloat16 or float32)"
RATIO = "model.updates_per_rollout and model.optimizer (a lower lr): the policy has left the one that sampled"
KL = "model.objective (kl_estimator, a smaller weight of the KL): the policy has left its reference"


def leave_out(module: RLVRModule, record: StepRecord, metrics: Mapping[str, Ratio]) -> None:
    """Leave out an update whose statistics, loss or gradient are not finite, on all ranks; the gradient is still there.

    The rollout batch goes to failed/NUMBER in the run's folder, for the first few of a run.

    Raises: UserError if it is the `max_skipped_updates`-th in a row; it says what was not finite first.
    """
    _, what = min(gather_objects(first_non_finite(module, record, metrics)))
    kept = _keep(module, record)
    module.skipped_in_a_row += 1
    rank_zero_warn(
        f"update {module.skipped_in_a_row} in a row left out, in rollout batch {record.number}: not all of its "
        f"numbers are finite, first {what}." + (f" The batch is kept in {kept}." if kept else "")
    )
    if module.skipped_in_a_row >= module.max_skipped_updates:
        raise UserError(
            f"{module.skipped_in_a_row} updates in a row were left out, since not all of their numbers were finite, "
            f"first {what}. The policy is as it was before them; `compare` replays the batches in "
            f"{Path(module.trainer.default_root_dir) / 'failed'}. model.max_skipped_updates says how many are borne."
        )


def total(stats: TokenStats) -> Float[Tensor, ""]:
    """Return a sum that is finite if, and only if, all statistics of counted tokens are."""
    return stats.logp[stats.mask].sum() + stats.entropy[stats.mask].sum() + stats.advantage.sum()


def without_nan(stats: TokenStats) -> TokenStats:
    """Return the statistics with 0 for what is not finite: a plan can be made of them, though no update will be."""
    clean = {name: getattr(stats, name).nan_to_num(0.0, 0.0, 0.0) for name in ("logp", "entropy", "advantage")}
    return replace(stats, **clean)


def first_non_finite(module: RLVRModule, record: StepRecord, metrics: Mapping[str, Ratio]) -> tuple[int, str]:
    """Name the first value of this rank that is not finite, with the keys to look at, after its place in the order.

    Values are looked at in the order in which they are computed. Of ranks, the one with the least place has the cause:
    all have the gradient that comes of it.
    """
    place = 0
    for place, (what, values, keys) in enumerate(_values(module, record, metrics)):
        bad = int((~values.isfinite()).sum())
        if bad:
            return place, f"{what} ({bad} of {values.numel()} values); see {keys}"
    return place + 1, "a value that is gone by now"


def _values(module: RLVRModule, record: StepRecord, metrics: Mapping[str, Ratio]) -> Iterator[tuple[str, Tensor, str]]:
    stats, plan, mask = record.stats, record.plan, record.stats.mask
    rollouts = record.experience.rollouts
    yield "the log-probabilities (logp) recorded while sampling", rollouts.logp[mask], OVERFLOW
    if module.vllm is None:  # which tells none
        yield "the entropies recorded while sampling", rollouts.entropy[mask], OVERFLOW
    yield "the log-probabilities (logp) of the training pass", stats.logp[mask], OVERFLOW
    yield "the entropies of the training pass", stats.entropy[mask], OVERFLOW
    yield "the advantages, though every reward is finite", stats.advantage, "model.reward (the size of its scores)"
    if record.ref_logp is not None:
        yield "the reference's log-probabilities", record.ref_logp[mask], "model.policy"
    for name in ("advantage", "weight", "kl_weight", "drift_weight", "entropy_weight"):
        if getattr(plan, name) is not None:
            yield f"the plan's {name}", getattr(plan, name), "model.objective"
    for name, keys in (("kl/old", RATIO), ("kl/all", KL), ("loss", "model.objective")):
        if name in metrics:
            yield f"the term train/{name} of the loss", torch.as_tensor(metrics[name].numerator).reshape(1), keys
    for name, parameter in module.policy.named_parameters():
        if parameter.grad is not None:
            yield f"the gradient of {name}, though the loss is finite", parameter.grad, OVERFLOW


def _keep(module: RLVRModule, record: StepRecord) -> Path | None:
    """Keep the batch, all ranks together; return where, on the first rank, if it could be kept."""
    folder = Path(module.trainer.default_root_dir) / "failed" / f"{record.number:06d}"
    if gather_objects(len(list(folder.parent.glob("[0-9]*"))))[0] >= KEPT:
        return None
    try:
        save_replay(folder, module, record)
    except Exception as error:  # noqa: BLE001 - a full disk, in whatever words: training must not end over it
        rank_zero_warn(f"the batch could not be kept in {folder}: {error}")
        return None
    return folder
