"""Where the runs of a sweep are done: as processes on this machine, or as jobs of a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lightning_rlvr.sweep import state
from lightning_rlvr.sweep.experiment import Run
from lightning_rlvr.sweep.process import Setup, execute, finish, start
from lightning_rlvr.types import UserError

GIB = 2**30


class Executor(Protocol):
    """Does runs."""

    def room(self) -> bool:
        """Say whether one more may be started."""

    def start(self, run: Run) -> None:
        """Start a run."""

    def ended(self) -> list[Run]:
        """Return the runs that have ended since the last time."""

    def stop(self, times: int) -> None:
        """Have what is under way stop; called again, with the number of times it was asked, if that takes too long."""

    def under_way(self) -> list[Run]:
        """Return the runs that have been started and not yet ended."""


class Local:
    """Processes on this machine, as many as its cores have room for threads, and its memory for runs.

    A run needs as much memory as the largest that has finished. Before one has, and beyond the budget, runs are done
    one at a time.

    Args:
        runs: all runs of the sweep.
        setup: what they have in common.
        budget: GiB of memory for all runs together.
        outlived: runs under way that an earlier sweep left behind.
    """

    def __init__(self, runs: Sequence[Run], setup: Setup, budget: float, outlived: Sequence[Run] = ()) -> None:
        self._runs, self._setup, self._budget = runs, setup, budget
        self._slots = max(1, cores() // setup.threads)
        self._processes: dict[Run, subprocess.Popen[bytes] | None] = dict.fromkeys(outlived)
        self._stopped = False

    def room(self) -> bool:
        """Say whether cores and memory are left for one more run; the only one always has room."""
        count = len(self._processes)
        if count in (0, self._slots):
            return count == 0
        need = max((_peak_memory(run) for run in self._runs), default=0.0)
        return count < self._slots and need > 0 and (count + 1) * need <= self._budget

    def start(self, run: Run) -> None:
        """Start a process."""
        self._processes[run] = start(run, self._setup)

    def ended(self) -> list[Run]:
        """Collect the processes that have ended, and record how those did that were not stopped."""
        out = []
        for run, process in list(self._processes.items()):
            if state.is_running(run) if process is None else process.poll() is None:
                continue
            del self._processes[run]
            out.append(run)
            if process is not None and not self._stopped:
                finish(run, process.returncode)
        return out

    def stop(self, times: int) -> None:
        """Ask each process to stop, which saves a checkpoint; the second time, kill it. Those of others go on."""
        self._stopped = True
        for run, process in list(self._processes.items()):
            if process is None:
                del self._processes[run]
            elif process.poll() is None and times == 1:
                process.send_signal(signal.SIGINT)
            elif process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    def under_way(self) -> list[Run]:
        """Return the runs whose processes are there."""
        return list(self._processes)


class Cluster:
    """Jobs that `submitit` submits, one of one task for each run. They go on when the sweep ends.

    Args:
        setup: what the runs have in common.
        cluster: slurm, or local for jobs on this machine.
        folder: where submitit keeps jobs and their logs; on a cluster, a folder that all machines share.
        parameters: of submitit's AutoExecutor: timeout_min, cpus_per_task, gpus_per_node, mem_gb, slurm_partition, ...
        outlived: runs under way that an earlier sweep submitted.

    Raises: UserError if submitit is not installed, or refuses.
    """

    def __init__(
        self, setup: Setup, cluster: str, folder: Path, parameters: Mapping[str, Any], outlived: Sequence[Run] = ()
    ) -> None:
        try:
            import submitit
        except ImportError as error:
            raise UserError("--submit needs submitit: pip install 'lightning_rlvr[slurm]'.") from error
        if "timeout_min" not in parameters:
            raise UserError(
                "the jobs of a cluster must have a time limit in minutes: submitit's own is a few, and a run that is "
                "cut off there waits for the next sweep. Set --submit_parameters '{\"timeout_min\": ...}'."
            )
        for name, value in parameters.items():
            if name.removeprefix("slurm_") in ("nodes", "ntasks_per_node", "tasks_per_node") and value != 1:
                raise UserError(
                    f"{name} must be 1, got {value}: a job is one task, which starts a process for each of "
                    "trainer.devices itself. Set --submit_parameters."
                )
        self._setup = setup
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(**{"name": setup.output.name, **parameters})
        except (NameError, ValueError, AssertionError, RuntimeError) as error:
            raise UserError(f"submitit refuses: {error}. Set --submit or --submit_parameters.") from error
        self._jobs: dict[Run, Any] = dict.fromkeys(outlived)

    def room(self) -> bool:
        """Say yes: the cluster queues jobs."""
        return True

    def start(self, run: Run) -> None:
        """Submit a job."""
        self._jobs[run] = self._executor.submit(execute, run, self._setup)

    def ended(self) -> list[Run]:
        """Collect the jobs that have ended."""
        out = [run for run, job in self._jobs.items() if not (state.is_running(run) if job is None else not job.done())]
        for run in out:
            del self._jobs[run]
        return out

    def stop(self, times: int) -> None:
        """Leave the jobs to the cluster."""
        self._jobs.clear()

    def under_way(self) -> list[Run]:
        """Return the runs whose jobs are queued or under way."""
        return list(self._jobs)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_memory() -> float:
    """Return the machine's memory in GiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def _peak_memory(run: Run) -> float:
    summary = state.read_json(run.folder / "summary.json") if state.is_finished(run) else None
    return summary["peak_memory_bytes"] / GIB if summary else 0.0
