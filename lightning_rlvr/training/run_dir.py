"""Which folder a run writes into: a free one, or that of the run which it continues."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only

from lightning_rlvr.store import compare_manifests, flat
from lightning_rlvr.training.callbacks.run_folder import LOCK, hold
from lightning_rlvr.training.checkpoint import Found, newest_checkpoint
from lightning_rlvr.types import UserError

CONFIG = "config.yaml"
# What may change when a run is continued: where it lies, how long it goes on, what one sees of it.
FREE = (
    "run_dir",
    "ckpt_path",
    "trainer.default_root_dir",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.max_time",
    "trainer.enable_progress_bar",
)


def free_folder(wanted: Path) -> Path:
    """Return the folder, or the first of wanted-2, wanted-3, ... that does not exist or is empty.

    Raises: UserError if it could not be written to, or has no name to add a number to.
    """
    wanted = wanted if wanted.name not in ("", "..") else Path(os.path.normpath(wanted.absolute()))
    if not wanted.name:
        raise UserError(f"run_dir must be a folder with a name, got {wanted}. Set run_dir.")
    there = next(path for path in (wanted, *wanted.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"run_dir must be a folder that can be written, got {wanted}: {there} is not. Set run_dir.")
    folder, number = wanted, 1
    while folder.exists() and any(folder.iterdir()):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def continued(folder: Path, checkpoints: Path, config: Mapping[str, Any]) -> Found | None:
    """Return the checkpoint that a run goes on from in its own folder, None if it begins (again).

    Args:
        folder: of the run.
        checkpoints: the folder that they are in.
        config: of the run as it is now.

    Raises: UserError if the folder is not a run's, another process is at work there, the run was made with another
        config, or none of its checkpoints can be read.
    """
    if free_folder(folder) == folder:
        return None
    known = (folder / CONFIG, folder / LOCK)
    if not any(path.exists() for path in known) and not all(p.name.startswith("events.") for p in folder.iterdir()):
        raise UserError(f"run_dir must be the folder of a run to be continued, got {folder}: it has no {CONFIG}. "
                        "Set run_dir, or ckpt_path to a file.")  # fmt: skip
    held = rank_zero_only(hold)(folder)
    if held is not None:
        held.close()
    found = newest_checkpoint(checkpoints)
    if found is not None:
        stored = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        setting = f"ckpt_path to {found.path} to branch off into a folder of its own"
        compare_manifests(_fixed(stored), _fixed(config), folder, setting)
    return found


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flat(config).items() if key not in FREE}
