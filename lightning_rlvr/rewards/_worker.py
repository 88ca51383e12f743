"""The worker process of rewards.pool: reads chunks of items from stdin, writes one reply for each item.

It runs as a script and imports the standard library only, so that it starts in milliseconds; the judge's
file is loaded by its path and imports what it needs. Messages are JSON with a 4-byte big-endian length.
"""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its math.py would shadow the standard library's

import importlib.util
import json
import os
import signal
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

LIFE_ITEMS = 10_000  # a worker retires after so many: what sympy leaks or caches goes with it
GRACE_S = 1.0  # the parent kills first; the alarm is for a worker whose parent is gone


def pack(message: Any) -> bytes:
    """Return the message as bytes: its length (4 bytes, big-endian), then JSON in ASCII."""
    data = json.dumps(message).encode("ascii")
    return struct.pack(">I", len(data)) + data


def unpack(buffer: bytearray) -> list[Any]:
    """Take all whole messages off the front of the buffer."""
    messages = []
    while len(buffer) >= 4:
        (length,) = struct.unpack(">I", buffer[:4])
        if len(buffer) < 4 + length:
            break
        messages.append(json.loads(buffer[4 : 4 + length]))
        del buffer[: 4 + length]
    return messages


def _receive(source: BinaryIO, sink: int) -> Any:
    """Return the next message; exit the process at end of file: the parent is gone or closed us.

    As soon as one begins we say so: before that, our death is no item's fault.
    """
    head = source.read(4)
    if len(head) < 4:
        raise SystemExit(0)
    os.write(sink, pack({"taken": True}))
    (length,) = struct.unpack(">I", head)
    data = source.read(length)
    if len(data) < length:
        raise SystemExit(0)
    return json.loads(data)


def _private_channel() -> tuple[BinaryIO, int]:
    """Move the channel off descriptors 0 and 1, so that a stray print cannot corrupt it."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    return source, sink


def _limit_memory(memory_mb: int) -> None:
    """Bound the address space in MiB and write no core files, where the platform can."""
    try:
        import resource
    except ImportError:  # not a POSIX platform
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # elsewhere the limit is refused or ignored
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))


def _load(file: str, function: str) -> Callable[[Any], Any]:
    """Import the judge from its file, without the package around it: `from .number` finds the file beside it."""
    spec = importlib.util.spec_from_file_location("judge", file, submodule_search_locations=[os.path.dirname(file)])
    if spec is None or spec.loader is None:
        raise ImportError(f"no module at {file}")
    module = sys.modules["judge"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    judge: Callable[[Any], Any] = getattr(module, function)
    return judge


def _reply(judge: Callable[[Any], Any], item: Any, limit_s: float) -> dict[str, Any]:
    """Judge one item. The alarm keeps its default action: the kernel ends us, whoever holds the GIL."""
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        return {"value": judge(item)}
    except Exception as error:  # noqa: BLE001 - reported for this item; the others must go on
        return {"error": f"{type(error).__name__}: {str(error)[:200]}", "last": isinstance(error, MemoryError)}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    """Serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    source, sink = _private_channel()
    setup = _receive(source, sink)
    try:
        _limit_memory(setup["memory_mb"])
        sys.path[:] = setup["path"]
        judge = _load(setup["file"], setup["function"])
    except Exception as error:  # noqa: BLE001 - told to the parent, which raises
        os.write(sink, pack({"failed": f"{type(error).__name__}: {error}"}))
        return
    os.write(sink, pack({"ready": True}))
    served = 0
    while True:
        for item in _receive(source, sink):
            reply = _reply(judge, item, setup["timeout_s"] + GRACE_S)
            served += 1
            reply["last"] = reply.get("last", False) or served >= LIFE_ITEMS
            data = pack(reply)
            while data:
                data = data[os.write(sink, data) :]
            if reply["last"]:
                return


if __name__ == "__main__":
    main()
