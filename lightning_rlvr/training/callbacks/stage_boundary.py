"""What happens where one stage of the curriculum ends and the next begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info

from lightning_rlvr.models.lora import adapted
from lightning_rlvr.training.datamodule import datamodule_of
from lightning_rlvr.types import UserError

if TYPE_CHECKING:
    from lightning_rlvr.training.module import RLVRModule


class StageBoundary(Callback):
    """Restarts optimizer, schedule and reference before the first batch of a stage, if the curriculum says so."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be restarted."""
        module, curriculum = cast("RLVRModule", pl_module), datamodule_of(trainer).curriculum
        restarts = curriculum.at_boundary == "restart" and curriculum.stages > 1
        if not restarts or module.reference is None:
            return
        if adapted(module.policy):
            raise UserError(
                "at_boundary must be carry_over for a policy with adapters and an objective that reads the reference, "
                "got restart: the reference is what lies beneath the adapters and cannot become the policy. "
                "Set data.curriculum.at_boundary, or model.policy to one without LoRA."
            )
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise UserError(
                "at_boundary must be carry_over with DeepSpeed and an objective that reads the reference, got restart: "
                "its checkpoints leave the reference out. Set data.curriculum.at_boundary, or trainer.strategy."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compare the stage of this batch with that of the batch before it."""
        module = cast("RLVRModule", pl_module)
        sampler, number = module.sampler, module.rollouts_done
        if sampler is None or number == 0 or datamodule_of(trainer).curriculum.at_boundary != "restart":
            return
        stage = sampler.batch(number).stage
        if stage != sampler.batch(number - 1).stage:
            module.restart()
            rank_zero_info(f"stage {stage} of the curriculum begins: optimizer, schedule and reference restarted")
