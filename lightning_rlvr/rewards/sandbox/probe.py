"""What the machine gives: the highest level at which programs can be contained here, found by trying."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

from lightning_rlvr.rewards.sandbox import command
from lightning_rlvr.rewards.sandbox.process import START_S, End, Limits, Process, Program
from lightning_rlvr.rewards.sandbox.seccomp import filter_program

_log = logging.getLogger(__name__)


class Level(IntEnum):
    """How well a program is contained; see the package's docstring for what each level cannot contain."""

    none = 0
    limited = 1
    isolated = 2


@dataclass(frozen=True)
class Ground:
    """The level that the machine gives, why it gives no higher one, and whether it has seccomp filters."""

    level: Level
    missing: str = ""
    seccomp: bool = False
    bwrap: str | None = None


# Run in the sandbox with the paths that it must not reach: prints what it could do.
_BREAKOUTS = """
import os
if os.getuid() == 0: print("be root")
if os.getpid() > 9: print("see other processes")
if set(os.environ) - {"PYTHONHASHSEED", "LC_ALL", "LC_CTYPE", "PWD"}: print("read the environment")
for path in PATHS:
    try: os.listdir(path)
    except OSError: pass
    else: print("read " + path)
for path in ("/", os.path.dirname(os.__file__), *PATHS):
    try: open(os.path.join(path, "sandbox-probe"), "x").close()
    except OSError: pass
    else: print("write to " + path)
try:
    import socket
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 9))
except OSError: pass
else: print("reach the network")
"""


@lru_cache
def probe() -> Ground:
    """Try the levels, once a process, and log what was found.

    Raises nothing: a machine without any gives Level.none.
    """
    ground = _probe()
    filtered = "with" if ground.seccomp else "without"
    _log.info("programs can be %s here, %s a seccomp filter. %s", ground.level.name, filtered, ground.missing)
    return ground


def _probe() -> Ground:
    if sys.platform != "linux":
        return Ground(Level.none, f"it needs Linux, and this is {sys.platform}")
    try:
        failed = _try("", None)
    except (OSError, AttributeError) as error:  # kernels before 5.3 and their imitations
        failed = str(error)
    if failed:
        return Ground(Level.none, f"a process with limits does not start: {failed}")
    seccomp = bool(filter_program())
    failed = "bubblewrap is not installed: pip install lightning_rlvr[code]"
    for bwrap in command.find_bwrap():
        try:
            failed = _refusal(bwrap) or _try(_breakouts(), bwrap)
        except (OSError, subprocess.TimeoutExpired) as error:
            failed = str(error)
        if not failed:
            return Ground(Level.isolated, "", seccomp, bwrap)
        failed = f"{bwrap} gives no namespaces: {failed}"
    return Ground(Level.limited, failed, seccomp)


def _breakouts() -> str:
    return f"PATHS = {[os.path.expanduser('~/.cache'), os.getcwd(), '/etc', '/proc']!r}\n{_BREAKOUTS}"


def _try(code: str, bwrap: str | None) -> str:
    """Run a script; return what it printed, or how it failed. Empty if all is well."""
    with Process(Program("script", code), Limits(), bwrap) as process:
        run = process.finish()
    if run.end is not End.EXIT or run.code:
        return f"{run.end.value}, exit status {run.code}"
    return ", ".join(f"it could {line}" for line in run.output.decode("utf-8", "replace").splitlines())


def _refusal(bwrap: str) -> str:
    """Return bubblewrap's own words if it does not start an empty program."""
    words = [*command.isolated(bwrap, (), ()), *command.PYTHON, ""]
    run = subprocess.run(words, capture_output=True, stdin=subprocess.DEVNULL, env={}, timeout=START_S, check=False)
    return run.stderr.decode("utf-8", "replace").strip()[:300] if run.returncode else ""
