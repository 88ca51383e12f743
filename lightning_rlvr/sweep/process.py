"""One run of a sweep as a process of its own."""

from __future__ import annotations

import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_rlvr.sweep import state
from lightning_rlvr.sweep.experiment import Run
from lightning_rlvr.types import PREEMPTED, UserError

PROGRAM: tuple[str, ...] = (sys.executable, "-m", "lightning_rlvr")
ASIDE = ".unfinished"  # where what was left of unfinished runs that are made otherwise now is kept
SAME = ("manifest", "command", "configs")  # what a run must have in common with its beginning to go on from there


@dataclass(frozen=True)
class Setup:
    """What the runs of a sweep have in common.

    Args:
        output: the folder of the sweep.
        threads: of each process. Sums round differently with another number, so it is part of what a run is; so is the
            cache: a policy that was warmed up with other threads has other weights, so each number has its own.
        configs: the text of each config that runs read, as it was when the sweep was started.
        commit: of the experiment's repository, if it lies in one.
        cache: the folder that each number of threads has a cache in.
        versions: of Python and the packages that results depend on.
        program: what `fit` and its arguments are put after.
    """

    output: Path
    threads: int
    configs: dict[Path, str]
    commit: str | None
    cache: Path
    versions: dict[str, str | None]
    program: tuple[str, ...] = field(default_factory=lambda: PROGRAM)

    @property
    def manifest(self) -> dict[str, Any]:
        """What, beside its config, a run's numbers depend on."""
        return {"threads": self.threads, "versions": self.versions}

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that each run is given."""
        threads, cache = str(self.threads), str(self.cache / f"threads-{self.threads}")
        return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "LIGHTNING_RLVR_CACHE": cache}

    @property
    def configs_digest(self) -> str:
        """A hash of all configs, by which a run that is taken up again knows that they are as they were."""
        texts = sorted((str(path), text) for path, text in self.configs.items())
        return hashlib.sha256(repr(texts).encode()).hexdigest()[:16]

    def command(self, run: Run) -> list[str]:
        """Return the command of a run."""
        return [*self.program, "fit", *run.arguments, f"--run_dir={run.folder}"]

    def shown(self, run: Run) -> str:
        """Return the command of a run as one could type it."""
        assignments = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*assignments, shlex.join(self.command(run))])

    def check_configs(self) -> None:
        """Raise UserError if a config has changed since the sweep was started: its runs would not be comparable."""
        for path, text in self.configs.items():
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                raise UserError(
                    f"the configs of a sweep must stay as they are while it runs, but {path} has changed. Put it back "
                    "and start the sweep again: it goes on from there; or give the new one another --output."
                )


def start(run: Run, setup: Setup) -> subprocess.Popen[bytes]:
    """Start a run in its folder; one that was begun there and cut off, or failed, goes on from its last checkpoint.

    What was begun by another command, with other configs or by other versions is moved to OUTPUT/.unfinished.

    Raises: BlockingIOError if it is under way in another process.
    """
    setup.check_configs()
    with state.claim(run) as descriptor:
        record = {
            "manifest": setup.manifest,
            "command": setup.command(run),
            "configs": setup.configs_digest,
            "environment": setup.environment,
            "commit": setup.commit,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "exit": None,
        }
        begun = state.read_json(state.beside(run, "json")) or {}
        goes_on = all(begun.get(key) == record[key] for key in SAME)
        if not goes_on:
            _move_aside(run, setup.output)
        state.write_json(state.beside(run, "json"), record)
        with state.beside(run, "log").open("ab") as log:
            return subprocess.Popen(
                [*setup.command(run), *(["--ckpt_path=last"] if goes_on else [])],
                env={**_outside_slurm(), **setup.environment, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the sweep alone, which asks its runs to stop once
                pass_fds=(descriptor,),
            )


def finish(run: Run, code: int) -> None:
    """Record how the process of a run ended by itself; one that saved when it was asked to stop was cut off."""
    if code == PREEMPTED:
        return
    path = state.beside(run, "json")
    state.write_json(path, {**(state.read_json(path) or {}), "exit": code})


def execute(run: Run, setup: Setup) -> None:
    """Do a run from beginning to end, as the job of a cluster does.

    Does nothing if that is done already, or another process has it in hand.

    Raises: RuntimeError if it fails, with its last words.
    """
    if state.is_finished(run):
        return
    try:
        process = start(run, setup)
    except BlockingIOError:
        return
    signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
    code = process.wait()
    finish(run, code)
    if code:
        raise RuntimeError(f"{run.name} ended with status {code}:\n{state.last_words(run)}")


def _outside_slurm() -> dict[str, str]:
    """Return the environment without Slurm's, so that Lightning starts the processes of a run itself."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}


def _move_aside(run: Run, output: Path) -> None:
    remains = [path for path in (run.folder, state.beside(run, "log")) if path.exists()]
    if not remains:
        return
    number, aside = 1, output / ASIDE
    while (place := aside / f"{run.variant}-seed-{run.seed}-{number}").exists():
        number += 1
    place.mkdir(parents=True)
    for path in remains:
        path.rename(place / path.name)
