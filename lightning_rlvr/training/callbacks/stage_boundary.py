"""What happens where one stage of the curriculum ends and the next begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_rlvr.training.datamodule import datamodule_of

if TYPE_CHECKING:
    from lightning_rlvr.training.module import RLVRModule


class StageBoundary(Callback):
    """Restarts optimizer, schedule and reference before the first batch of a stage, if the curriculum says so."""

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
