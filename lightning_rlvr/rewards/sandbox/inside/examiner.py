"""Runs the tests of a data set against a candidate in another process, and reports to the parent.

No code of the candidate's runs here. Its functions are stand-ins which send the call over a pipe; what comes back is
plain data, or a `Remote` that is equal to nothing but itself.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from lightning_rlvr.rewards.sandbox.inside.wire import Channel, Gone, decode, encode


class Overtime(BaseException):
    """The time of a test is up. No Exception: tests that catch those must not catch it."""


class Candidate:
    """The other side of the pipe, and a digest of all that came from there."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.seen = hashlib.sha256()

    def ask(self, do: str, name: str, *values: Any) -> Any:
        """Send a request and return its answer, or raise what the candidate raised."""
        self.channel.send({"do": do, "name": name, "values": encode(list(values), _kept)})
        data = self.channel.receive()
        self.seen.update(len(data).to_bytes(4, "big") + data)
        reply = json.loads(data)
        if "raise" in reply:
            raise _exception(str(reply["raise"]))
        return decode(reply["value"], lambda number: Remote(self, number))

    def function(self, name: str) -> Callable[..., Any]:
        """Return a stand-in for the candidate's function."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return self.ask("call", name, None, args, kwargs)

        return call


class Remote:
    """An object that stayed with the candidate: it can be called, iterated over, and its attributes used."""

    def __init__(self, candidate: Candidate, number: int) -> None:
        object.__setattr__(self, "_there", (candidate, number))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it there."""
        return self._there[0].ask("call", "", self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._there[0].ask("get", name, self)

    def __setattr__(self, name: str, value: Any) -> None:
        self._there[0].ask("set", name, self, value)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._there[0].ask("list", "", self))


def _exception(name: str) -> Exception:
    """Return an exception of Python's by name. StopIteration would end a test's loop, as if all were well."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and "Iteration" not in name:
        return kind()
    return RuntimeError(name)


def _kept(value: Any) -> int:
    """Return the number of an object of the candidate's; of ours none leaves."""
    if not isinstance(value, Remote):
        raise TypeError(f"a test must pass plain values, got a {type(value).__name__}")
    number: int = value._there[1]
    return number


def lists(value: Any) -> Any:
    """Return the value with lists in place of tuples: JSON, in which answers are expected, has no other."""
    if isinstance(value, list | tuple):
        return [lists(item) for item in value]
    return {key: lists(item) for key, item in value.items()} if isinstance(value, dict) else value


def assertion(candidate: Candidate, namespace: dict[str, Any], test: CodeType) -> bool:
    """Run a test of the data set: it raises if it fails."""
    exec(test, namespace)
    return True


def called(candidate: Candidate, test: tuple[str, str, str]) -> tuple[Any, Any]:
    """Call a function; return its value and the expected one. Arguments and expected value are JSON."""
    name, arguments, expected = test
    return lists(candidate.ask("call", name, None, json.loads(arguments), {})), json.loads(expected)


def call(candidate: Candidate, namespace: dict[str, Any], test: tuple[str, str, str]) -> bool:
    """Call a function; compare its value."""
    value, wanted = called(candidate, test)
    return bool(value == wanted)


def lenient_call(candidate: Candidate, namespace: dict[str, Any], test: tuple[str, str, str]) -> bool:
    """Call a function; compare its value with the expected one, or with that of a list of one, as APPS' grader does."""
    value, wanted = called(candidate, test)
    accepted = [wanted, *(wanted if isinstance(wanted, list) and len(wanted) == 1 else ())]
    return any(bool(value == one) or bool(value == integer_keys(one)) for one in accepted)


def integer_keys(value: Any) -> Any:
    """Return a dict whose keys all are the texts of integers with those integers; anything else as it is."""
    if not isinstance(value, dict) or not all(re.fullmatch(r"-?[0-9]{1,99}", key) for key in value):
        return value
    return {int(key): item for key, item in value.items()}


_RUNS: dict[str, Callable[..., bool]] = {"assertion": assertion, "call": call, "lenient call": lenient_call}


def _overtime(number: int, frame: Any) -> None:
    raise Overtime


def main(code: CodeType, setup: dict[str, Any]) -> None:
    """Run all tests up to the first that takes too long or leaves no candidate; print a report as JSON.

    `code` is what the tests need around them.
    """
    candidate = Candidate(Channel(*setup["pipe"]))
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)  # tests may print
    namespace: dict[str, Any] = {"__name__": "examiner"}
    signal.signal(signal.SIGALRM, _overtime)
    passed, ended = 0, "done"
    try:
        random.seed(0)
        candidate.channel.receive()
        signal.setitimer(signal.ITIMER_REAL, setup["timeout_s"])
        namespace |= {name: candidate.function(name) for name in setup["names"]}
        exec(code, namespace)
        namespace |= {name: candidate.function(name) for name in setup["names"]}
        for kind, test in setup["tests"]:
            signal.setitimer(signal.ITIMER_REAL, setup["timeout_s"])
            passed += _passes(_RUNS[kind], candidate, namespace, test)
    except Overtime:
        ended = "timeout"
    except Gone:
        ended = "gone"
    except Exception as error:  # noqa: BLE001 - in the code around the tests
        ended = type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    reply = {"passed": passed, "ended": ended, "seen": candidate.seen.hexdigest()[:16]}
    os.write(report, json.dumps(reply).encode("ascii"))


def _passes(run: Callable[..., bool], candidate: Candidate, namespace: dict[str, Any], test: Any) -> bool:
    try:
        return run(candidate, namespace, test)
    except (Exception, SystemExit):  # noqa: BLE001 - a failed assertion, or what came of the candidate's values
        return False
