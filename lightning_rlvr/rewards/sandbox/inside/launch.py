"""The first code of ours in a sandbox process: sets its limits, says that it is ready, hands over.

Runs as the body of `python -c` with `setup` (see process.py) and `status`, a descriptor: "r" on it says that what
follows is the program's doing, "s" that the candidate's code does not compile. It is closed before that code runs.
"""

from __future__ import annotations

import builtins
import os
import resource
import sys
from types import CodeType, ModuleType
from typing import Any


def restrict(filter_program: bytes) -> None:
    """Load a seccomp filter into this process for good (bubblewrap does it at the isolated level)."""
    import ctypes

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    libc = ctypes.CDLL(None, use_errno=True)
    program = Program(len(filter_program) // 8, filter_program)
    zero = ctypes.c_ulong(0)
    no_new_privileges, seccomp, filter_mode = 38, 22, ctypes.c_ulong(2)
    for arguments in (
        (no_new_privileges, ctypes.c_ulong(1), zero, zero, zero),
        (seccomp, filter_mode, ctypes.byref(program), zero, zero),
    ):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "the kernel refused the seccomp filter")


def compiled(code: str) -> CodeType | None:
    """Compile the candidate's code; None if it is none."""
    try:
        return compile(code, "main.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return None


def launch(setup: dict[str, Any], status: int) -> None:
    """Run the program named in the setup."""
    for name, value in setup["limits"].items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    sys.path[:] = [*(entry for entry in sys.path if entry), *setup["path"]]
    modules = {}
    for name, body in setup["modules"].items():
        modules[name] = sys.modules[name] = ModuleType(name)
        exec(body, modules[name].__dict__)
    if setup["filter"]:
        restrict(setup["filter"])
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # `site` has them, left out with the installed packages
    code = compiled(setup["code"])
    os.write(status, b"s" if code is None else b"r")
    os.close(status)
    if code is not None:
        modules[name].main(code, setup)


if __name__ == "__main__":
    launch(setup, status)  # both put there by the command line
