"""One process in the sandbox: how it is started, read within limits, and killed with all that it started."""

from __future__ import annotations

import contextlib
import marshal
import math
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import Any

from lightning_rlvr.rewards.sandbox import command
from lightning_rlvr.rewards.sandbox.seccomp import filter_program

START_S = 20.0  # a sandbox that has not started by then is an error of ours
_INSIDE = Path(__file__).with_name("inside")
_NAME = "lightning_rlvr.rewards.sandbox.inside"
_BODY = "import marshal,sys;c,setup=marshal.load(open(int(sys.argv[1]),'rb'));status=int(sys.argv[2]);exec(c)"


@dataclass(frozen=True)
class Limits:
    """What one process may use: wall and CPU seconds, MiB of address space, bytes of output.

    Each file and the private /tmp together hold at most 16 MiB; 64 files can be open.
    """

    wall_s: float = 5.0
    memory_mb: int = 512
    output_bytes: int = 4 << 20

    def resources(self, own_users: bool) -> dict[str, int]:
        """Return the limits that the kernel keeps, by their names in `resource`.

        The number of processes and threads is limited where the sandbox's are the only ones that it counts
        (`own_users`); it does not bind root, whom the seccomp filter holds.
        """
        return {
            **({"RLIMIT_NPROC": 256} if own_users else {}),
            "RLIMIT_AS": self.memory_mb << 20,
            "RLIMIT_CPU": math.ceil(self.wall_s) + 1,
            "RLIMIT_FSIZE": command.DISK_BYTES,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
        }


class End(str, Enum):
    """How a process ended."""

    EXIT = "exit"
    TIMEOUT = "timeout"
    FLOOD = "flood"  # more output than the limit
    NO_CODE = "no code"  # the candidate's code does not compile
    NO_START = "no start"  # the sandbox did not come up


@dataclass(frozen=True)
class Run:
    """What became of a process: how it ended, its exit status (128 + n for signal n) and its output."""

    end: End
    code: int = 0
    output: bytes = b""


@dataclass(frozen=True)
class Program:
    """What a process runs: a module of `inside`, the code handed to it, and what else it is told."""

    module: str
    code: str
    more: Mapping[str, Any] = field(default_factory=dict)
    stdin: bytes | int = b""  # bytes, or a descriptor
    stdout: int = subprocess.PIPE
    descriptors: Sequence[int] = ()
    readable: Sequence[str] = ()  # further folders for `sys.path`


@lru_cache
def _code(name: str) -> CodeType:
    return compile((_INSIDE / f"{name}.py").read_text(encoding="utf-8"), f"{name}.py", "exec", dont_inherit=True)


def _sealed(data: bytes) -> int:
    """Return a descriptor of an anonymous file that holds the data and can never change."""
    import fcntl  # not on every platform that imports this module

    descriptor = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(data)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


class Process:
    """A running process of the sandbox. Use it in a `with`: at the end it is dead, and all that it started."""

    def __init__(self, program: Program, limits: Limits, bwrap: str | None) -> None:
        """Start it. `bwrap` is bubblewrap's path; None starts it without namespaces."""
        self.limits = limits
        with contextlib.ExitStack() as stack:
            self._start(program, bwrap, stack)
            self._stack = stack.pop_all()

    def _start(self, program: Program, bwrap: str | None, stack: contextlib.ExitStack) -> None:
        def own(descriptor: int) -> int:
            stack.callback(os.close, descriptor)
            return descriptor

        seccomp = filter_program()
        setup = {
            "limits": self.limits.resources(own_users=bwrap is not None),
            "modules": {f"{_NAME}.{name}": _code(name) for name in ("wire", program.module)},
            "filter": b"" if bwrap else seccomp,
            "code": program.code,
            "path": list(program.readable),
            **program.more,
        }
        source = own(_sealed(marshal.dumps((_code("launch"), setup))))
        descriptors = [source, *program.descriptors]
        if bwrap:
            filters = [own(_sealed(seccomp))] if seccomp else []
            words = command.isolated(bwrap, program.readable, filters)
            descriptors += filters
            folder, environment = "/", {}
        else:
            words = []
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True))
            environment = {**command.ENVIRONMENT, "TMPDIR": folder}
        stdin = own(_sealed(program.stdin)) if isinstance(program.stdin, bytes) else program.stdin
        status, status_end = os.pipe()
        self.status = own(status)
        try:
            self.process = subprocess.Popen(
                [*words, *command.PYTHON, _BODY, str(source), str(status_end)],
                stdin=stdin,
                stdout=program.stdout,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env=environment,
                cwd=folder,
                pass_fds=[*descriptors, status_end],
                start_new_session=True,  # no terminal; and a process group to kill
            )
        finally:
            os.close(status_end)
        stack.callback(self._kill)
        self.ended = own(os.pidfd_open(self.process.pid))

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _kill(self) -> None:
        """Kill the process group; with bubblewrap, that holds process 1 of the namespace, with which all die."""
        os.killpg(self.process.pid, signal.SIGKILL)  # a zombie at least: nobody has waited for it yet
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def finish(self) -> Run:
        """Read the output until the process ends, its time is up, or it has printed too much."""
        output = bytearray()
        ready = b""
        deadline = time.monotonic() + START_S
        assert self.process.stdout is not None
        stdout = self.process.stdout.fileno()
        os.set_blocking(stdout, False)
        with selectors.DefaultSelector() as selector:
            for descriptor in (self.status, stdout, self.ended):
                selector.register(descriptor, selectors.EVENT_READ)
            while True:
                events = {key.fd for key, _ in selector.select(max(0.0, deadline - time.monotonic()))}
                if not events:
                    return Run(End.TIMEOUT if ready else End.NO_START)
                if self.status in events:
                    ready = self.ready()
                    deadline = time.monotonic() + self.limits.wall_s
                    selector.unregister(self.status)
                if stdout in events and not self._drain(stdout, output):
                    selector.unregister(stdout)
                if len(output) > self.limits.output_bytes:
                    return Run(End.FLOOD)
                if self.ended in events:
                    break
        while self._drain(stdout, output) and len(output) <= self.limits.output_bytes:
            pass
        code = self._exit_code()
        if ready != b"r":
            return Run(End.NO_CODE if ready == b"s" else End.NO_START, code)
        return Run(End.FLOOD if len(output) > self.limits.output_bytes else End.EXIT, code, bytes(output))

    def ready(self) -> bytes:
        """Return what it said of its start: r, s (see inside/launch.py), or nothing if it has not come up."""
        os.set_blocking(self.status, False)
        try:
            return os.read(self.status, 1)
        except BlockingIOError:
            return b""

    def _exit_code(self) -> int:
        """Look at the exit status without reaping: until `_kill`, the number of the group must stay ours."""
        status = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        assert status is not None
        return status.si_status if status.si_code == os.CLD_EXITED else 128 + status.si_status

    def _drain(self, stdout: int, output: bytearray) -> bool:
        """Read once; False if there is nothing more for now."""
        try:
            data = os.read(stdout, 1 << 16)
        except BlockingIOError:
            return False
        output += data
        return bool(data)
