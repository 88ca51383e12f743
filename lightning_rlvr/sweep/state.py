"""What a run's folder says of it: whether it waits, runs, has finished or failed, and how far it is.

Beside OUTPUT/VARIANT/seed-N lie seed-N.json, the record of how the run was started and ended, and seed-N.log, what it
printed. While it runs its process holds a lock on seed-N.lock, so that a sweep that was killed and started again knows
of the runs that outlived it.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from lightning_rlvr.store import compare_manifests, flat
from lightning_rlvr.sweep.experiment import Resolve, Run
from lightning_rlvr.types import UserError

State = Literal["waiting", "running", "finished", "failed"]
LOG_LINES = 8  # shown of a run that failed
GRACE = 1.0  # seconds
PLACES = ("run_dir", "trainer.default_root_dir")  # in a config, where things go: no part of what they are


@dataclass(frozen=True)
class Progress:
    """How far a run is: rollout batches done, and its last held-out accuracy (avg@k), None before the first."""

    done: int
    accuracy: float | None


def beside(run: Run, ending: str) -> Path:
    """Return the file of a run that lies beside its folder."""
    return run.folder.with_name(f"{run.folder.name}.{ending}")


def state_of(run: Run, manifest: dict[str, Any], resolve: Resolve) -> State:
    """Return a run's state.

    Raises: UserError if its folder holds a finished run, or one under way, of another config, number of threads or
    version, or what no sweep made; it says what differs.
    """
    record = read_json(beside(run, "json"))
    if record is None:
        if run.folder.exists() and any(run.folder.iterdir()):
            raise UserError(f"{run.folder} must be free or a run of this sweep, and is neither. Set --output.")
        return "waiting"
    running, finished = is_running(run), is_finished(run)
    if running or finished:
        compare_manifests(flat(record["manifest"]), flat(manifest), run.folder, "--output")
    if running:
        return "running"
    if finished:
        compare_manifests(_config_of(run.folder), _wanted(run, resolve), run.folder, "--output")
        return "finished"
    return "waiting" if record["exit"] is None else "failed"


def is_finished(run: Run) -> bool:
    """Say whether the run came to its end; the exit status is not known if it outlived the sweep that started it."""
    record, summary = read_json(beside(run, "json")), read_json(run.folder / "summary.json")
    if record is None or summary is None:
        return False
    return record["exit"] in (0, None) and summary["status"] == "finished"


def is_running(run: Run) -> bool:
    """Say whether a process holds the run."""
    if not beside(run, "lock").exists():
        return False
    try:
        with _lock(run, fcntl.LOCK_SH):
            return False
    except BlockingIOError:
        return True


@contextmanager
def claim(run: Run) -> Iterator[int]:
    """Hold the run; the descriptor that is yielded holds it on in a process that inherits it, until that ends.

    Raises: BlockingIOError if another process holds it.
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + GRACE
    while is_running(run) and time.monotonic() < deadline:  # it may only just be asked whether it runs
        time.sleep(GRACE / 10)
    with _lock(run, fcntl.LOCK_EX) as descriptor:
        yield descriptor


@contextmanager
def _lock(run: Run, kind: int) -> Iterator[int]:
    descriptor = os.open(beside(run, "lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON file's contents, None if it is not there or not whole."""
    try:
        contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return contents


def progress_of(run: Run) -> Progress:
    """Read how far a run is."""
    rows: list[dict[str, str]] = []
    try:
        with (run.folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError:
        pass
    done = sum(bool(row.get("train/reward")) for row in rows)
    held_out = [value for row in rows for key, value in row.items() if key and key.startswith("val/avg@") and value]
    return Progress(done, float(held_out[-1]) if held_out else None)


def last_words(run: Run) -> str:
    """Return the last lines of the run's log, without progress bars that were drawn over."""
    try:
        text = beside(run, "log").read_bytes().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return "\n".join([line for line in lines if line][-LOG_LINES:])


def planned(run: Run) -> int | None:
    """Return the rollout batches of the whole run, as its curriculum and config have it; None before it trains."""
    curriculum = read_json(run.folder / "curriculum.json")
    if curriculum is None:
        return None
    settings = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
    trainer, updates = settings["trainer"], settings["model"]["updates_per_rollout"]
    bounds = [curriculum["batches"] * trainer["max_epochs"]] if (trainer["max_epochs"] or 0) > 0 else []
    bounds += [-(-trainer["max_steps"] // updates)] if trainer["max_steps"] > 0 else []
    return min(bounds, default=None)


def _config_of(folder: Path) -> dict[str, Any]:
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return {key: value for key, value in flat(config).items() if key not in PLACES}


def _wanted(run: Run, resolve: Resolve) -> dict[str, Any]:
    return {key: value for key, value in flat(resolve(run.arguments)).items() if key not in PLACES}
