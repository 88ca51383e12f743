"""Checkpoints: written whole or not at all, checked when read, and what they must hold to be continued.

They are files; those of DeepSpeed, and of FSDP2 where each process writes its part, are folders.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_rlvr.store import sync_folder, whole_file
from lightning_rlvr.types import UserError

# Attributes of the module that are saved.
COUNTS = (
    "rollouts_done",
    "batches_trained",
    "skipped_in_a_row",
    "objective_state",
    "reference_moved",
    "recording_agrees",
)
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
ABOUT = "about.json"  # in a folder: what `Found` holds of it
UNREADABLE = (OSError, RuntimeError, ValueError, TypeError, KeyError, EOFError, UnpicklingError)


class CheckpointFiles(TorchCheckpointIO):
    """Reads and writes checkpoints, each with a checksum of every part of it inside.

    A file is put in its place when it is whole and on the disk. The last.ckpt that a new one replaces is kept as
    previous.ckpt, so that a file that goes bad later is not the only one. Nothing is unpickled but tensors and plain
    values (weights_only), whatever is asked for.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint. Raises: UserError if the disk refuses it; the file that was there stays."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path, path.with_name(PREVIOUS) if path.name == LAST else None) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch wraps what the disk says
            reason = " ".join(str(error.__context__ or error).split())[:200]
            free = shutil.disk_usage(path.parent).free / 2**30
            raise UserError(
                f"the checkpoint {path} cannot be written: {reason} ({free:.2f} GiB are free). The one before it is "
                "kept. Free some space and continue with --ckpt_path last, or set run_dir."
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
        """Read a checkpoint. Raises: UserError if it is damaged, or holds what is neither tensor nor plain value."""
        fault = damage(Path(path))
        if fault is None:
            try:
                return torch.load(path, map_location=map_location, weights_only=True)
            except UNREADABLE as error:
                fault = str(error).split("\n")[0]
        raise UserError(f"the checkpoint {path} cannot be read: {fault}. Set ckpt_path to another, or to last.")


def writes_folders(strategy: Strategy) -> bool:
    """Whether the checkpoints of a strategy are folders, in which each process writes its part."""
    parts = isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint
    return parts or isinstance(strategy, DeepSpeedStrategy)


def place_folder(partial: Path, path: Path, rollouts_done: int, log_lines: Mapping[str, int]) -> None:
    """Let a folder that all processes have written be a checkpoint; the last.ckpt before it is kept."""
    (partial / ABOUT).write_text(json.dumps({"rollouts_done": rollouts_done, "log_lines": log_lines}), encoding="utf-8")
    for file in (entry for entry in partial.rglob("*") if entry.is_file()):
        with file.open("rb") as written:
            os.fsync(written.fileno())
    previous = path.with_name(PREVIOUS)
    if path.name == LAST and path.exists():
        shutil.rmtree(previous, ignore_errors=True)
        path.rename(previous)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    sync_folder(path.parent)


class Found(NamedTuple):
    """A checkpoint to continue from: its place, the rollout batches trained, and the lines that each log had then."""

    path: Path
    rollouts_done: int
    log_lines: dict[str, int]


def is_checkpoint(path: Path) -> bool:
    """Whether a file or folder is a checkpoint at a glance; `damage` reads it."""
    return (path / ABOUT).is_file() if path.is_dir() else zipfile.is_zipfile(path)


def damage(path: Path) -> str | None:
    """Say what is wrong with a checkpoint file, None if it reads as it was written. A folder's parts are not read."""
    if path.is_dir():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (*UNREADABLE, zipfile.BadZipFile, NotImplementedError, struct.error, zlib.error) as error:
        return str(error) or type(error).__name__
    return None if bad is None else f"its part {bad} fails the checksum"


def newest_checkpoint(folder: Path) -> Found | None:
    """Return the checkpoint in a folder that is farthest and whole, None if there is none at all.

    Damaged ones are warned of. Raises: UserError if there are checkpoints and none can be read.
    """
    found, faults = [], {}
    for path in sorted(folder.glob("*.ckpt")):
        try:
            if path.is_dir():
                found.append(Found(path, **json.loads((path / ABOUT).read_text(encoding="utf-8"))))
                continue
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if "optimizer_states" in stored:
                found.append(Found(path, stored["rollouts_done"], stored["log_lines"]))
        except UNREADABLE as error:
            faults[path] = " ".join(str(error).split())[:200]
    for candidate in sorted(found, key=lambda f: (f.rollouts_done, f.path.name == LAST), reverse=True):
        fault = damage(candidate.path)
        if fault is None:
            for path, reason in faults.items():
                rank_zero_warn(f"{path} is damaged ({reason}): continuing from {candidate.path}")
            return candidate
        faults[candidate.path] = fault
    if faults:
        path, reason = next(iter(faults.items()))
        raise UserError(
            f"no checkpoint in {folder} can be read, such as {path.name}: {reason}. Remove {folder} to begin the run "
            "anew, or set ckpt_path."
        )
    return None


def check_checkpoint(
    checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor], objective_state: Mapping[str, float]
) -> None:
    """Compare a checkpoint with the weights and the objective's state at hand.

    Raises: UserError if weights of the policy are missing or have another shape, the checkpoint is not one of ours,
        it holds the state of another objective, or lacks a reference that is no longer the initial policy.
    """
    stored = checkpoint.get("state_dict", weights)  # a strategy of sharded weights has loaded and removed them
    mine = {name: weight for name, weight in weights.items() if name.startswith("policy.")}
    wrong = [name for name, weight in mine.items() if name not in stored or stored[name].shape != weight.shape]
    if wrong or not set(COUNTS) <= checkpoint.keys():
        example = f", such as {wrong[0]}" if wrong else ""
        raise UserError(
            f"the checkpoint is not of this policy: {len(wrong)} of {len(mine)} weights are missing or have another "
            f"shape{example}. Set ckpt_path, or model.policy."
        )
    if checkpoint["objective_state"].keys() != objective_state.keys():
        raise UserError(
            f"the checkpoint holds the state {checkpoint['objective_state']} of another objective. "
            "Set ckpt_path, or model.objective to the one that it was trained with."
        )
    referred = [name for name in weights if name.startswith("reference.")]
    if checkpoint["reference_moved"] and referred and referred[0] not in stored:
        raise UserError(
            "the checkpoint is of a run that restarted at a stage boundary with an objective that reads no reference, "
            "so the reference that this objective reads is lost. Set ckpt_path, or model.objective."
        )
