"""The worker process of rewards.pool: reads chunks of items from stdin, writes one reply for each item.

It runs as a script and imports the standard library only, so that it starts in milliseconds; the judge's
file is loaded by its path and imports what it needs. The process itself judges nothing: once the judge is loaded
and warm, it forks a child that does, and another one, at the cost of milliseconds, when that is killed by its alarm
or has served its time. Messages are JSON with a 4-byte big-endian length.
"""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its math.py would shadow the standard library's

import gc
import importlib.util
import json
import os
import signal
import struct
from collections.abc import Callable
from typing import Any, NoReturn

LIFE_ITEMS = 10_000  # a child retires after so many: what sympy leaks or caches goes with it
RETIRED = 75  # its exit status then

Judge = Callable[[Any], Any]


def pack(message: Any) -> bytes:
    """Return the message as bytes: its length (4 bytes, big-endian), then JSON in ASCII."""
    return framed(json.dumps(message))


def framed(text: str) -> bytes:
    """Return a message that is JSON already as bytes."""
    data = text.encode("ascii")
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


def _read(source: int, size: int) -> bytes:
    """Read so many bytes and no more; exit the process at end of file: the pool is gone or closed us."""
    data = b""
    while len(data) < size:
        more = os.read(source, size - len(data))
        if not more:
            raise SystemExit(0)
        data += more
    return data


def _send(sink: int, message: Any) -> None:
    data = pack(message)
    while data:
        data = data[os.write(sink, data) :]


def _receive(source: int, sink: int) -> Any:
    """Return the next message. As soon as one begins we say so: before that, our death is no item's fault."""
    head = _read(source, 4)
    _send(sink, {"taken": True})
    return json.loads(_read(source, struct.unpack(">I", head)[0]))


def _private_channel() -> tuple[int, int]:
    """Move the channel off descriptors 0 and 1, so that a stray print cannot corrupt it."""
    source, sink = os.dup(0), os.dup(1)
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


def _load(file: str, function: str) -> Judge:
    """Import the judge from its file, without the package around it: `from .number` finds the file beside it.

    A function `warm` of that file is called once.
    """
    spec = importlib.util.spec_from_file_location("judge", file, submodule_search_locations=[os.path.dirname(file)])
    if spec is None or spec.loader is None:
        raise ImportError(f"no module at {file}")
    module = sys.modules["judge"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module, "warm"):
        module.warm()
    judge: Judge = getattr(module, function)
    return judge


def _reply(judge: Judge, item: Any, limit_s: float, slice_s: float) -> dict[str, Any]:
    """Judge one item. The alarms keep their default action: the kernel ends us, whoever holds the GIL."""
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    signal.setitimer(signal.ITIMER_PROF, slice_s)
    try:
        return {"value": judge(item)}
    except Exception as error:  # noqa: BLE001 - reported for this item; the others must go on
        return {"error": f"{type(error).__name__}: {str(error)[:200]}", "last": isinstance(error, MemoryError)}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _serve(judge: Judge, source: int, sink: int) -> NoReturn:
    """Judge chunk after chunk; exit with RETIRED when the rest of a chunk is better left to a fresh process."""
    served = 0
    while True:
        chunk = _receive(source, sink)
        for item in chunk["items"]:
            reply = _reply(judge, item, chunk["limit_s"], chunk["slice_s"])
            served += 1
            reply["last"] = reply.get("last", False) or served >= LIFE_ITEMS
            _send(sink, reply)
            if reply["last"]:
                raise SystemExit(RETIRED)


def _fork(judge: Judge, source: int, sink: int) -> int:
    """Start a child that serves; a SIGTERM to us ends both. Return its id."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until it is clear who handles it how
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        _serve(judge, source, sink)

    def end(*_: Any) -> NoReturn:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    return child


def _end_like(code: int) -> NoReturn:
    """End as the child did: by its signal or with its exit status."""
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(abs(code))


def main() -> None:
    """Serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, signal.SIG_DFL)
    source, sink = _private_channel()
    setup = _receive(source, sink)
    try:
        _limit_memory(setup["memory_mb"])
        sys.path[:] = setup["path"]
        judge = _load(setup["file"], setup["function"])
    except Exception as error:  # noqa: BLE001 - told to the parent, which raises
        _send(sink, {"failed": f"{type(error).__name__}: {error}"})
        return
    gc.freeze()  # what is loaded stays shared with the children
    _send(sink, {"ready": True})
    while True:
        _, status = os.waitpid(_fork(judge, source, sink), 0)
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGALRM:
            _send(sink, {"timed_out": True, "last": True})
        elif code == -signal.SIGPROF:
            _send(sink, {"put_off": True, "last": True})
        elif code != RETIRED:
            _end_like(code)


if __name__ == "__main__":
    main()
