"""A pool of killable worker processes with a time limit for every item.

Verifiers such as math-verify can be driven into computations that hold the GIL for minutes, so they run in
processes that are killed from outside. Workers are started by subprocess from a script with light imports:
they inherit neither the parent's threads nor its descriptors nor its environment. POSIX only.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_rlvr.rewards import _worker
from lightning_rlvr.types import UserError

SLICE_S = 0.1  # of CPU time: an item that takes longer is put off until all others are done: it must not hold them up
GRACE_S = 1.0  # for a worker's own alarm, which ends what takes too long, before the pool kills the worker
CHUNK_ITEMS = 16
CHUNK_BYTES = 32 * 1024  # below the size of a pipe's buffer: handing out a chunk does not block
START_S = 60.0  # a worker that cannot import its judge in that time is reported, not waited for
PASSED_ON = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")  # what Python itself may need to start


@dataclass(frozen=True)
class Outcome:
    """What became of one item: its value, or else that time ran out, or else an error in words."""

    value: Any = None
    timed_out: bool = False
    error: str | None = None


class _Worker:
    """One worker process, the items it was handed, and when it must have answered."""

    def __init__(self, setup: dict[str, Any]) -> None:
        environment = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
        environment |= {key: os.environ[key] for key in PASSED_ON if key in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-s", _worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
            start_new_session=True,  # Ctrl-C in the terminal does not reach it
        )
        self.owner = os.getpid()
        self.limit_s = 0.0  # for each item of the chunk at hand
        self.ready = False
        self.taken = False  # whether it has begun to read the chunk: until then no item is to blame
        self.pending: deque[int] = deque()
        self.deadline = time.monotonic() + START_S
        self._buffer = bytearray()
        self._send(_worker.pack(setup))

    def hand(self, indices: Sequence[int], items: Sequence[str], limit_s: float, slice_s: float) -> None:
        """Send a chunk of items (JSON texts). That a worker died before is noticed when its output ends."""
        self.pending.extend(indices)
        self.limit_s = limit_s
        if self.ready:
            self.wait()
        self.taken = False
        self._send(_worker.framed(f'{{"limit_s": {limit_s}, "slice_s": {slice_s}, "items": [{",".join(items)}]}}'))

    def wait(self) -> None:
        """Give it from now on its limit for the next sign of life."""
        self.deadline = time.monotonic() + (self.limit_s + GRACE_S if self.ready else START_S)

    def read(self) -> list[Any] | None:
        """Return the messages that have come, None at the end of the worker's output."""
        data = os.read(self.fileno(), 1 << 16)
        if not data:
            return None
        self._buffer += data
        self.wait()
        return _worker.unpack(self._buffer)

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def stop(self) -> None:
        """End and reap the process and its child; in a forked child of ours, only let go of it."""
        if os.getpid() == self.owner:
            self.process.terminate()
            try:
                self.process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        else:
            self.process.poll()  # not our child: marks it as done with
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def _send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        try:
            while data:
                data = data[os.write(self.process.stdin.fileno(), data) :]
        except BrokenPipeError:
            return  # read() meets the end of its output


def _stop_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().stop()


class WorkerPool:
    """Maps items to results in worker processes, in the order of the items.

    `file` and `function` name the judge: a function of one JSON value that returns one, in a file that is
    loaded by its path (without the package around it). An item that takes more than `timeout_s` seconds of
    wall time is given up and its process killed and replaced; the other items of its chunk go to another. What takes
    more than a tenth of a second of CPU time is done again when all else is done, with its whole limit.
    `memory_mb` bounds a worker's address space in MiB, on Linux. Workers start at the first call, and again
    after `close`. Calls from several threads take turns. Raises UserError if a worker cannot start.
    """

    def __init__(self, file: str | Path, function: str, workers: int, timeout_s: float, memory_mb: int) -> None:
        for ok, key, value, rule in (
            (workers >= 1, "workers", workers, "at least 1 process"),
            (0 < timeout_s < math.inf, "timeout_s", timeout_s, "a finite number of seconds above 0"),
            (memory_mb >= 128, "memory_mb", memory_mb, "at least 128 MiB: Python and sympy need as much"),
        ):
            if not ok:
                raise UserError(f"{key} must be {rule}, got {value}. Set reward.init_args.{key}.")
        self._arguments = (str(file), function, workers, timeout_s, memory_mb)
        self._count, self._timeout_s = workers, timeout_s
        self._setup = {
            "file": os.path.abspath(file),
            "function": function,
            "memory_mb": memory_mb,
            "path": [os.path.abspath(entry) for entry in sys.path],
        }
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        weakref.finalize(self, _stop_all, self._workers)  # also runs when the interpreter exits

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy as a fresh pool: processes cannot be shared."""
        return type(self), self._arguments

    def map(self, items: Sequence[Any]) -> list[Outcome]:
        """Judge JSON values. An interrupt or error on our side kills the workers before it goes on."""
        with self._lock:
            if any(worker.owner != os.getpid() for worker in self._workers):
                _stop_all(self._workers)  # we are a fork: they are the parent's
            try:
                return _Job(self._workers, self._setup, self._count, self._timeout_s, items).run()
            except BaseException:
                _stop_all(self._workers)
                raise

    def close(self) -> None:
        """Kill and reap all workers. May be called twice; the next `map` starts new ones."""
        with self._lock:
            _stop_all(self._workers)

    def pids(self) -> list[int]:
        """Return the process ids of the workers alive now."""
        return [worker.process.pid for worker in self._workers]


class _Job:
    """One call of `map`: the queue of item indices, and what has been found."""

    def __init__(
        self, workers: list[_Worker], setup: dict[str, Any], count: int, timeout_s: float, items: Sequence[Any]
    ) -> None:
        self.workers, self.setup, self.timeout_s = workers, setup, timeout_s
        self.items = [json.dumps(item) for item in items]
        self.queue, self.put_off = deque(range(len(items))), deque[int]()
        self.found: dict[int, Outcome] = {}
        self.chunk = max(1, min(CHUNK_ITEMS, math.ceil(len(items) / count)))
        self.count = min(count, math.ceil(len(items) / self.chunk))

    def run(self) -> list[Outcome]:
        """Hand out, collect and replace until every item has its outcome."""
        while len(self.found) < len(self.items):
            self._hand_out()
            busy = [worker for worker in self.workers if worker.pending]
            wait = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
            answered = _readable(busy, wait)
            for worker in answered:
                self._collect(worker)
            for worker in busy:
                overdue = worker.pending and worker.deadline <= time.monotonic()
                if overdue and worker not in answered and not _readable([worker], 0):
                    self._give_up(worker, Outcome(timed_out=True))
        return [self.found[index] for index in range(len(self.items))]

    def _hand_out(self) -> None:
        for worker in [w for w in self.workers if not w.pending and w.process.poll() is not None]:
            self._retire(worker)  # died while idle: no item's fault
        while self.queue or self.put_off:
            idle = next((worker for worker in self.workers if not worker.pending), None)
            if idle is None and len(self.workers) >= self.count:
                return
            if idle is None:
                idle = _Worker(self.setup)
                self.workers.append(idle)
            first = bool(self.queue)
            indices = self._chunk() if first else [self.put_off.popleft()]
            slice_s = SLICE_S if first else 0.0
            idle.hand(indices, [self.items[index] for index in indices], self.timeout_s, slice_s)

    def _chunk(self) -> list[int]:
        indices, size = [self.queue.popleft()], 0
        while self.queue and len(indices) < self.chunk:
            size += len(self.items[indices[-1]])
            if size + len(self.items[self.queue[0]]) > CHUNK_BYTES:
                break
            indices.append(self.queue.popleft())
        return indices

    def _collect(self, worker: _Worker) -> None:
        messages = worker.read()
        if messages is None:
            code = worker.process.wait()
            self._give_up(worker, Outcome(error=f"the worker died with exit status {code}"))
            return
        for message in messages:
            if "failed" in message:
                raise UserError(f"a verifier process cannot start: {message['failed']}. Is its package installed?")
            if "ready" in message:
                worker.ready = True
                worker.wait()
            if "ready" in message or "taken" in message:
                worker.taken = worker.ready and "taken" in message
                continue
            self._note(worker.pending.popleft(), message)
            if message.get("last"):  # another process will take over
                self._take_back(worker)

    def _note(self, index: int, message: dict[str, Any]) -> None:
        if "put_off" in message:
            self.put_off.append(index)
        else:
            self.found[index] = Outcome(message.get("value"), "timed_out" in message, message.get("error"))

    def _give_up(self, worker: _Worker, outcome: Outcome) -> None:
        if not worker.ready:
            why = f"none within {START_S:g} s" if outcome.timed_out else outcome.error
            raise UserError(
                f"a verifier process must report that it is ready, got: {why}. It may lack memory to import "
                f"its package: raise reward.init_args.memory_mb, now {self.setup['memory_mb']}."
            )
        if worker.taken:
            self.found[worker.pending.popleft()] = outcome
        self._retire(worker)

    def _take_back(self, worker: _Worker) -> None:
        self.queue.extendleft(reversed(worker.pending))
        worker.pending.clear()

    def _retire(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.stop()
        self._take_back(worker)


def _readable(workers: Sequence[_Worker], wait_s: float) -> list[_Worker]:
    """Return the workers whose output can be read, after at most `wait_s` seconds."""
    poll = select.poll()
    for worker in workers:
        poll.register(worker, select.POLLIN)
    ready = {descriptor for descriptor, _ in poll.poll(math.ceil(wait_s * 1000))}
    return [worker for worker in workers if worker.fileno() in ready]
