"""Ctrl-C between two steps, not inside one."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info


class InterruptBetweenSteps(Callback):
    """Lets the step or validation under way end at Ctrl-C, writes last.ckpt, and only then stops the run.

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
        if self._asked:
            if trainer.checkpoint_callback is not None:
                trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
            raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give SIGINT back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give SIGINT back; Lightning calls no teardown here."""
        self.teardown(trainer, pl_module, "fit")

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        rank_zero_info("\nStopping after this step; Ctrl-C again stops at once.")
