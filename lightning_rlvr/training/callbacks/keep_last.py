"""last.ckpt is the last complete step, at the end of a run and at Ctrl-C."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

if TYPE_CHECKING:
    from lightning_rlvr.training.module import RLVRModule


class KeepLastCheckpoint(Callback):
    """Writes checkpoints/last.ckpt after the last batch, and at Ctrl-C once the step or validation under way has ended.

    A checkpoint from the middle of a step would hold a policy that no batch count belongs to. A second Ctrl-C
    stops at once and leaves the checkpoints that there are.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over SIGINT, where signals are ours to handle."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop here if asked: the last step is complete and logged, the next has not begun."""
        groups = cast("RLVRModule", pl_module).groups
        if self._asked and (groups is None or groups.batches == 0):  # a step may take several rollout batches
            self._save(trainer)
            raise KeyboardInterrupt

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the checkpoint of the last batch; a moment later Lightning would count its epoch as closed."""
        if trainer.is_last_batch or trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step:
            self._save(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give SIGINT back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give SIGINT back; Lightning calls no teardown here."""
        self.teardown(trainer, pl_module, "fit")

    @staticmethod
    def _save(trainer: Trainer) -> None:
        if trainer.checkpoint_callback is not None and not getattr(trainer, "fast_dev_run", False):
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        rank_zero_info("\nStopping after this step; Ctrl-C again stops at once.")
