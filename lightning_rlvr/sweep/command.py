"""The sweep itself: start what is missing, follow it, end in good order."""

from __future__ import annotations

import argparse
import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from lightning_rlvr.models.cache import cache_root
from lightning_rlvr.store import make_folder
from lightning_rlvr.sweep.board import Board
from lightning_rlvr.sweep.executors import Cluster, Executor, Local, machine_memory
from lightning_rlvr.sweep.experiment import Experiment, Resolve, Run, check, read_experiment
from lightning_rlvr.sweep.process import Setup
from lightning_rlvr.sweep.state import State, beside, is_finished, is_running, last_words, state_of, write_json
from lightning_rlvr.training.callbacks.summary import versions
from lightning_rlvr.types import UserError

POLL = 0.5  # seconds
MEMORY = 0.75  # of the machine's, the budget if none is given


def sweep(
    experiment: Path,
    resolve: Resolve,
    output: Path | None = None,
    threads: int = 1,
    memory: float | None = None,
    retry: bool = False,
    dry_run: bool = False,
    submit: str | None = None,
    submit_folder: Path | None = None,
    submit_parameters: Mapping[str, Any] | None = None,
) -> bool:
    """Do every run of an experiment that is not done; return whether all are finished.

    Each combination of variant and seed is one `fit` in OUTPUT/VARIANT/seed-N, with what it prints in seed-N.log.
    Finished runs are left alone; one that was made from another config, by other versions or with other threads is
    refused. A run that was cut off, or failed and is retried, goes on from its last checkpoint in its folder, and comes
    to what it would have come to. Runs that outlive a sweep that was killed are waited for. Ctrl-C and SIGTERM have the
    runs under way write their checkpoint and stop; a second one kills them. OUTPUT/sweep.json holds all that it takes
    to repeat a run.

    Args:
        experiment: the experiment file, see Experiment.
        resolve: gives the config that arguments of `fit` come to.
        output: folder of the sweep; runs/NAME if not given.
        threads: of each process. As many run at a time as this goes into the cores, within the memory budget.
        memory: GiB for all runs together; three quarters of the machine's if not given.
        retry: whether to do failed runs again.
        dry_run: whether only to print the commands that would be run.
        submit: do the runs as jobs of this cluster (slurm, local), with `submitit`, instead of here.
        submit_folder: where submitit keeps jobs and their logs; OUTPUT/.jobs if not given.
        submit_parameters: of submitit's AutoExecutor: timeout_min, slurm_partition, ...
    """
    if threads < 1:
        raise UserError(f"threads must be at least 1, got {threads}. Set --threads.")
    if memory is not None and memory <= 0:
        raise UserError(f"memory must be a positive number of GiB, got {memory}. Set --memory.")
    console, plan = Console(), read_experiment(experiment)
    check(plan, resolve)
    output = output or Path("runs") / experiment.stem
    texts = {path: path.read_text(encoding="utf-8") for path in plan.files()}
    setup = Setup(output, threads, texts, _commit(experiment.parent), cache_root(None).absolute(), versions())
    runs = plan.runs(output)
    states = {run: state_of(run, setup.manifest, resolve) for run in runs}
    queue = [run for run in runs if states[run] == "waiting" or (retry and states[run] == "failed")]
    if dry_run:
        console.print("\n".join(setup.shown(run) for run in queue), soft_wrap=True, highlight=False, markup=False)
        return False
    states |= dict.fromkeys(queue, "waiting")
    with _alone(output), _stop_signals() as asked:
        _write_manifest(experiment, plan, setup, runs)
        outlived = [run for run in runs if states[run] == "running"]
        executor: Executor
        if submit is None:
            executor = Local(runs, setup, memory or MEMORY * machine_memory(), outlived)
        else:
            folder = submit_folder or output / ".jobs"
            executor = Cluster(setup, submit, folder, submit_parameters or {}, outlived)
        states = _follow(queue, executor, states, Board(runs, states, console), asked)
    return _conclude(states, console, output)


def _follow(
    queue: list[Run], executor: Executor, states: dict[Run, State], board: Board, asked: list[int]
) -> dict[Run, State]:
    """Start the runs of the queue as there is room, until all have ended or someone asks to stop."""
    with board:
        handled = 0
        while queue or executor.under_way():
            if len(asked) > handled:
                handled = len(asked)
                queue.clear()
                executor.stop(handled)
            while queue and executor.room():
                executor.start(queue.pop(0))
            for run in executor.ended():
                states[run] = "finished" if is_finished(run) else "waiting" if asked else "failed"
                board.now(run, states[run])
            for run in executor.under_way():
                if states[run] == "waiting" and is_running(run):
                    states[run] = "running"
                    board.now(run, "running")
            board.draw()
            time.sleep(POLL)
    return states


def _conclude(states: Mapping[Run, State], console: Console, output: Path) -> bool:
    """Say in a few lines how it ended; return whether all runs are finished."""
    failed = [run for run, state in states.items() if state == "failed"]
    for run in failed:
        console.print(f"{run.name} failed; {beside(run, 'log')} ends with", highlight=False, soft_wrap=True)
        console.print(Text(last_words(run), style="dim"), soft_wrap=True)
    finished = sum(state == "finished" for state in states.values())
    console.print(f"{finished} of {len(states)} runs finished: {output.resolve()}", highlight=False, soft_wrap=True)
    if failed:
        console.print(f"{len(failed)} failed: --retry does them again.", highlight=False)
    return finished == len(states)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Hold the folder against a second sweep. Raises: UserError if there is one."""
    make_folder(output, "output")
    with (output / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another sweep is at work in {output}. Wait for it, or set --output.") from error
        yield


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect the signals that ask to stop."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write_manifest(path: Path, plan: Experiment, setup: Setup, runs: Sequence[Run]) -> None:
    contents = {
        "experiment": yaml.safe_load(path.read_text(encoding="utf-8")),
        "commit": setup.commit,
        **setup.manifest,
        "environment": setup.environment,
        "variants": list(plan.variants),
        "seeds": list(plan.seeds),
        "commands": {run.name: setup.command(run) for run in runs},
    }
    write_json(setup.output / "sweep.json", contents)


def _commit(folder: Path) -> str | None:
    """Return the commit of the repository that a folder lies in, with + if files have changed since."""
    try:
        commit, changed = (
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changed)


def main(args: Sequence[str], resolve: Resolve) -> None:
    """`python -m lightning_rlvr sweep`; exit status 1 if not all runs are finished."""
    parser = argparse.ArgumentParser("python -m lightning_rlvr sweep", description="Do every run of an experiment.")
    parser.add_argument("experiment", type=Path, help="experiment file: base, overrides, variants, seeds")
    parser.add_argument("--output", type=Path, help="folder of the sweep (default: runs/NAME)")
    parser.add_argument("--threads", type=int, default=1, help="of each process; other numbers round differently")
    parser.add_argument("--memory", type=float, help="GiB for all runs together (default: 3/4 of the machine's)")
    parser.add_argument("--retry", action="store_true", help="do failed runs again")
    parser.add_argument("--dry_run", action="store_true", help="print the commands only")
    parser.add_argument("--submit", metavar="CLUSTER", help="submit jobs with submitit: slurm, or local")
    parser.add_argument("--submit_folder", type=Path, help="of submitit (default: OUTPUT/.jobs)")
    parser.add_argument("--submit_parameters", type=json.loads, help='of submitit, as JSON: {"timeout_min": 60, ...}')
    chosen = vars(parser.parse_args(args))
    if not sweep(resolve=resolve, **chosen) and not chosen["dry_run"]:
        sys.exit(1)
