"""Runs the candidate's code and answers calls of its functions.

Nothing in this process is to be trusted once the candidate's code has begun, this file least of all: it knows
neither tests nor expected values, and all it can do is to answer calls.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
from types import CodeType, ModuleType
from typing import Any

from lightning_rlvr.rewards.sandbox.inside.wire import Channel, Gone, decode, encode


class Server:
    """The candidate's namespace, and the objects of its that could not cross."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self.namespace = namespace
        self.kept: list[Any] = []

    def keep(self, value: Any) -> int:
        """Keep an object here and return its number."""
        self.kept.append(value)
        return len(self.kept) - 1

    def answer(self, message: dict[str, Any]) -> Any:
        """Do what the examiner asks for: call, get, set or list."""
        target, *values = decode(message["values"], self.kept.__getitem__)
        name = message["name"]
        if message["do"] == "call":
            function = self._function(name) if target is None else target
            return function(*values[0], **values[1])
        if message["do"] == "get":
            return getattr(target, name)
        if message["do"] == "set":
            return setattr(target, name, values[0])
        return list(target)

    def _function(self, name: str) -> Any:
        """Return the method of a new object of the class Solution, if that has one of the name, else the function.

        What a prelude imports may have the same name: itertools.count.
        """
        solution: Any = self.namespace.get("Solution")
        return getattr(solution(), name) if hasattr(solution, name) else self.namespace[name]


def main(code: CodeType, setup: dict[str, Any]) -> None:
    """Serve until the examiner is gone. Standard input and output move away: the candidate may print."""
    channel = Channel(os.dup(0), os.dup(1))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    channel.send(None)  # about to begin: from here on time counts
    module = sys.modules["candidate"] = ModuleType("candidate")  # where dataclasses look for what annotations name
    exec(code, module.__dict__)
    server = Server(module.__dict__)
    while True:
        try:
            message = json.loads(channel.receive())
        except Gone:
            return
        try:
            reply = {"value": encode(server.answer(message), server.keep)}
        except Exception as error:  # noqa: BLE001 - the examiner raises it again
            kinds = [kind.__name__ for kind in type(error).__mro__]
            reply = {"raise": next(kind for kind in kinds if hasattr(builtins, kind))}
        channel.send(reply)
