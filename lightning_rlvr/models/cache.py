"""Folders that are built once and then shared by every process and run."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from lightning_rlvr.store import user_path
from lightning_rlvr.types import UserError


def cache_root(cache_dir: str | None) -> Path:
    """Return `cache_dir`, or $LIGHTNING_RLVR_CACHE, or ~/.cache/lightning_rlvr."""
    chosen = cache_dir or os.environ.get("LIGHTNING_RLVR_CACHE") or "~/.cache/lightning_rlvr"
    return user_path(chosen, "model.policy.init_args.cache_dir, data.cache_dir or $LIGHTNING_RLVR_CACHE")


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Call `build` on an empty folder and rename it to `folder`, unless `folder` exists.

    A build that fails or is killed leaves no `folder`. Where several processes build at a time, the first to
    finish wins and the others drop theirs.

    Raises: UserError if the cache cannot be written, also in the midst of the build (a full disk).
    """
    if folder.is_dir():
        return
    building = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"The cache must be a writable folder, got {folder.parent}: policies are kept there once made "
            f"({error}). Set model.policy.init_args.cache_dir or $LIGHTNING_RLVR_CACHE."
        ) from error
    try:
        build(building)
        building.rename(folder)
    except Exception as error:
        if not _is_of_the_disk(error):
            raise
        if not folder.is_dir():
            raise UserError(
                f"The cache must take a whole policy, got {folder.parent}: making one there failed ({error}). Free "
                "some space, or set model.policy.init_args.cache_dir or $LIGHTNING_RLVR_CACHE."
            ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _is_of_the_disk(error: Exception) -> bool:
    """Say whether the operating system refused; safetensors wraps that in an exception of its own."""
    return isinstance(error, OSError) or "(os error " in str(error)
