"""The folder of a run: one process at a time writes into it, and what it logs is of one course of training."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lightning_rlvr.store import whole_file
from lightning_rlvr.training.metrics_file import NAME
from lightning_rlvr.types import UserError

LOGS = (NAME, "samples.jsonl", "order.jsonl")
LOCK = ".lock"


class RunFolder(Callback):
    """Makes the run's folder, holds it against other processes, and has its logs end where the checkpoint was written.

    Args:
        log_lines: where the run goes on in its folder, the lines of each log that the checkpoint knows of; those after
            them are of steps that will be done again. None in a folder of its own.
    """

    def __init__(self, log_lines: Mapping[str, int] | None = None) -> None:
        self._log_lines = log_lines
        self._lock: IO[str] | None = None

    @rank_zero_only
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make and hold the folder; cut its logs. Raises: UserError if another process is at work there."""
        root = Path(trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        self._lock = hold(root)
        if self._log_lines is not None:
            (root / "summary.json").unlink(missing_ok=True)  # of the run as it was cut off
            for name in LOGS:
                cut(root / name, self._log_lines.get(name, 0))
            self._log_lines = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note how long the logs are, once that is on the disk."""
        checkpoint["log_lines"] = log_lines(Path(trainer.default_root_dir)) if trainer.is_global_zero else {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let others have the folder; Lightning calls no teardown here."""
        self.teardown(trainer, pl_module, "fit")


def hold(folder: Path) -> IO[str]:
    """Return a file that holds a folder as long as it is open. Raises: UserError if another process holds it."""
    file = (folder / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(f"another process is at work in {folder}. Wait for it, or set run_dir.") from error
    return file


def log_lines(folder: Path) -> dict[str, int]:
    """Return how many lines each log of a run has, once they are on the disk."""
    paths = [folder / name for name in LOGS]
    return {path.name: _synced_lines(path) for path in paths if path.exists()}


def cut(path: Path, lines: int) -> None:
    """Leave the first lines of a file, whole or not at all; without any, no file."""
    if not path.exists():
        found: list[bytes] = []
    else:
        with path.open("rb") as file:
            found = file.readlines()
    if len(found) < lines:
        rank_zero_warn(f"{path} has {len(found)} lines where the checkpoint counts {lines}: some were removed since")
    if not lines:
        path.unlink(missing_ok=True)
    elif len(found) > lines:
        with whole_file(path) as file:
            file.writelines(found[:lines])


def _synced_lines(path: Path) -> int:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return sum(1 for _ in file)
