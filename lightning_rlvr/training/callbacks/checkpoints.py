"""Checkpoints of whole steps, by schedule, at the end, and when a signal asks to stop."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lightning_rlvr.training.callbacks.run_folder import log_lines
from lightning_rlvr.training.checkpoint import LAST, place_folder, writes_folders
from lightning_rlvr.training.distributed import gather_objects, largest
from lightning_rlvr.training.random_state import random_state, set_random_state
from lightning_rlvr.types import PREEMPTED, UserError

if TYPE_CHECKING:
    from lightning_rlvr.training.module import RLVRModule


class RunCheckpoints(ModelCheckpoint):
    """ModelCheckpoint that saves between two steps: the last is trained, logged and validated, the next has not begun.

    Lightning's saves before a step is logged and validated, so a run resumed from there lacks both. What is cut off in
    the midst of a step, and groups that dynamic sampling had collected, are done again, with the same random numbers.

    last.ckpt is written by schedule, when training ends, and after the step under way at Ctrl-C (a second one stops at
    once), at SIGTERM (exit status 143), and at the requeue signal of Slurm, which has the job queued again.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._asked = 0  # the signal that asks to stop
        self._requeue: int | None = None  # the signal that also asks to queue the job again
        self._stop_later = False  # whether someone has asked the trainer to stop
        self._handlers: dict[int, Any] = {}  # those that were before
        self._random: list[dict[str, Any]] | None = None  # of the run that is resumed, by rank
        self._last_epoch_saved = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep Lightning from its signal handlers: they save, and communicate, in the midst of a step."""
        self.dirpath = self.dirpath or str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue = environment.requeue_signal
        self._handle(_requeue_at_once, self._requeue)  # while questions are scored and the policy is first validated

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals, where they are ours to handle."""
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved, self._last_epoch_saved = trainer.global_step, trainer.current_epoch
        if (self.monitor or "").startswith("val/") and not cast("RLVRModule", pl_module).rollouts_done:
            self._check_monitor(trainer.callback_metrics)  # of the validation before the first update
        self._handle(self._ask, signal.SIGINT, signal.SIGTERM, self._requeue)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save what the last step came to if that is due; stop here if asked."""
        module, loop = cast("RLVRModule", pl_module), trainer.fit_loop.epoch_loop
        # Lightning counts one more where a run is resumed right after a validation. Where a batch logs less than the
        # one before, it repeats that one's metrics, which a resumed run does not know.
        loop._batches_that_stepped = module.rollouts_done
        for result in loop._results.values():
            if not result.meta.on_epoch:
                result.reset()
        if self._random is not None:
            if len(self._random) == trainer.world_size:
                set_random_state(self._random[trainer.global_rank])
            self._random = None
        if module.groups is not None and module.groups.batches:  # a step may take several rollout batches
            return
        asked = largest(self._asked)
        if asked or self._due(trainer):
            self._save(trainer, last=bool(asked))
        if asked:
            self._stop(trainer, asked)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Do not save: the step is not logged."""
        self._put_off_stop(trainer, cast("RLVRModule", pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not save here."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not save here."""
        self._put_off_stop(trainer, cast("RLVRModule", pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step."""
        self._save(trainer, last=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back; Lightning calls no teardown here."""
        self.teardown(trainer, pl_module, "fit")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random generators of all ranks, and say that as many batches are done as were trained on."""
        checkpoint["random"] = gather_objects(random_state())
        done = cast("RLVRModule", pl_module).rollouts_done
        between_batches(checkpoint["loops"]["fit_loop"], done, trainer.num_training_batches)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the random generators, to be set when the next batch begins."""
        self._random = checkpoint["random"]

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Have what a strategy writes as a folder, too, take its place when it is whole."""
        if not writes_folders(trainer.strategy):
            super()._save_checkpoint(trainer, filepath)
            return
        path = Path(filepath)
        partial = path.with_name(f".{path.name}.partial")
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        trainer.strategy.barrier()
        super()._save_checkpoint(trainer, str(partial))
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            done = cast("RLVRModule", trainer.lightning_module).rollouts_done
            place_folder(partial, path, done, log_lines(Path(trainer.default_root_dir)))
        trainer.strategy.barrier()
        self._last_checkpoint_saved = filepath

    # --- when and what ---------------------------------------------------------------------------

    def _due(self, trainer: Trainer) -> bool:
        steps, epochs, seconds = self._every_n_train_steps, self._every_n_epochs, self._train_time_interval
        if steps:
            return trainer.global_step // steps > self._last_global_step_saved // steps
        if epochs:
            return trainer.current_epoch // epochs > self._last_epoch_saved // epochs
        since = time.monotonic() - (self._last_time_checked or 0.0)
        return bool(trainer.strategy.broadcast(seconds is not None and since >= seconds.total_seconds()))

    def _save(self, trainer: Trainer, last: bool) -> None:
        """Save the best as configured, then last.ckpt, which knows of them; `last` has it written in any case."""
        if getattr(trainer, "fast_dev_run", False):
            return
        candidates = self._monitor_candidates(trainer)
        if not last or self._due(trainer):
            if self.monitor is None or self.monitor in candidates:
                self._save_topk_checkpoint(trainer, candidates)
            self._last_time_checked, self._last_epoch_saved = time.monotonic(), trainer.current_epoch
        if self.save_last or last:
            self.last_model_path = str(Path(cast("str", self.dirpath)) / LAST)
            self._save_checkpoint(trainer, self.last_model_path)
        if not last:
            self._check_monitor(candidates)

    def _put_off_stop(self, trainer: Trainer, module: RLVRModule) -> None:
        """Let the trainer stop only where no groups are collected, which a checkpoint does not hold."""
        if module.groups is not None:
            self._stop_later |= trainer.should_stop
            trainer.should_stop = self._stop_later and not module.groups.batches

    def _check_monitor(self, known: Mapping[str, Any]) -> None:
        if self.monitor is not None and self.monitor not in known:
            raise UserError(
                f"checkpoint.monitor must be a metric of the run, got {self.monitor!r}: no checkpoint would be kept by "
                f"it. There are {', '.join(sorted(known)) or 'none yet (is there data.val?)'}. Set checkpoint.monitor."
            )

    # --- signals ---------------------------------------------------------------------------------

    def _handle(self, handler: Callable[[int, FrameType | None], None], *signals: int | None) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in signals:
                if number is not None:
                    self._handlers.setdefault(number, signal.signal(number, handler))

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = self._asked or number
        rank_zero_info(f"\n{signal.Signals(number).name}: stopping after this step; Ctrl-C stops at once.")

    def _stop(self, trainer: Trainer, asked: int) -> None:
        """End the process, on all ranks after the same step."""
        rank_zero_info(f"saved {self.last_model_path}: the same command with --ckpt_path last goes on from there")
        if asked == self._requeue:
            requeue()
            trainer.strategy.barrier()  # a process that ends may have Slurm end the others
        if not trainer.is_global_zero and isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
            raise SystemExit(0)  # else the first rank is killed before it has said how it ended
        if asked == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(PREEMPTED)


@rank_zero_only
def requeue() -> None:
    """Have Slurm queue this job again."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    subprocess.run(["scontrol", "requeue", job], check=True)


@rank_zero_only
def _requeue_at_once(number: int, frame: FrameType | None) -> None:
    """Have Slurm queue this job again before there is anything to save; the other processes wait for Slurm's end."""
    requeue()
    raise SystemExit(PREEMPTED)


def between_batches(fit_loop: dict[str, Any], done: int, per_epoch: float) -> None:
    """Have the state of Lightning's loops say that `done` batches are behind it and the next has not begun.

    Lightning saves counters as they are in the hook that saves, and guesses from them, when it resumes, where that was;
    for this moment it has no guess. `per_epoch` is the number of batches in an epoch, maybe infinite.
    """
    epochs, batches = (0, done) if per_epoch == float("inf") else divmod(done, int(per_epoch))
    begun = epochs + (batches > 0)

    def counts(begun: int, ended: int) -> dict[str, int]:
        return {"ready": begun, "started": begun, "processed": ended, "completed": ended}

    fit_loop["epoch_progress"] = {"total": counts(begun, epochs), "current": counts(begun, epochs)}
    fit_loop["epoch_loop.batch_progress"] = {
        "total": counts(done, done),
        "current": counts(batches, batches),
        "is_last_batch": False,
    }
    fit_loop["epoch_loop.state_dict"] = {"_batches_that_stepped": done}
