"""Rollout batches for later comparison of objectives."""

from __future__ import annotations

from pathlib import Path

from lightning_rlvr.training.experience import StepObserver, StepRecord
from lightning_rlvr.training.module import RLVRModule
from lightning_rlvr.training.replay import save_replay
from lightning_rlvr.types import UserError


class SaveRollouts(StepObserver):
    """Writes rollout batches, with the policy before its update, to rollouts/ in the run's folder.

    `python -m lightning_rlvr compare` replays them under any objectives.

    Args:
        every_n_batches: write every n-th rollout batch; 0 writes none.
    """

    def __init__(self, every_n_batches: int = 0) -> None:
        if every_n_batches < 0:
            raise UserError(
                f"every_n_batches must be 0 or more, got {every_n_batches}. Set save_rollouts.every_n_batches."
            )
        self.every_n_batches = every_n_batches

    def on_planned(self, module: RLVRModule, record: StepRecord) -> None:
        """Write the batch if it is its turn."""
        if self.every_n_batches and record.number % self.every_n_batches == 0:
            folder = Path(module.trainer.default_root_dir) / "rollouts" / f"{record.number:06d}"
            save_replay(folder, module, record)
