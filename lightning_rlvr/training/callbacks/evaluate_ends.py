"""Validation before the first update and after the last."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer


class EvaluateEnds(Callback):
    """Runs the validation loop when training starts and, if the last step was not validated, when it ends.

    Lightning validates during training only; what a run gained needs both ends.
    """

    def __init__(self) -> None:
        self._validated_at: int | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the step."""
        self._validated_at = trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the policy as it was loaded; not in a run that was resumed."""
        if trainer.fit_loop.epoch_loop.batch_progress.total.completed == 0:
            self._validate(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the trained policy."""
        if self._validated_at != trainer.global_step:
            self._validate(trainer)

    def _validate(self, trainer: Trainer) -> None:
        if not trainer.enable_validation:
            return
        # As the training loop itself does between two batches.
        first = trainer._logger_connector._first_loop_iter
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        trainer._logger_connector._first_loop_iter = first
