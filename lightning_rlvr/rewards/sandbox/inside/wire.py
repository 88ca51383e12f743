"""Values over a pipe between examiner and candidate: JSON in frames, so that reading it runs nobody's code.

None, bool, int, float, str and lists are JSON's own; other plain values are {tag: ...}; any other object stays
where it is and crosses as {"handle": number}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

MAX_FRAME = 16 << 20  # bytes
_BIG = 1 << 1000  # JSON's integers end at 4300 digits

Keep = Callable[[Any], int]
Find = Callable[[int], Any]


class Gone(BaseException):
    """The other side closed the channel or broke its rules. No Exception: tests that catch those must not catch it."""


class Channel:
    """Frames of 4 bytes of length (big-endian) and JSON, over two descriptors."""

    def __init__(self, source: int, sink: int) -> None:
        self.source, self.sink = source, sink

    def send(self, message: Any) -> None:
        """Send one message. Raises Gone if nobody reads, ValueError if it is too long."""
        data = json.dumps(message, separators=(",", ":")).encode("ascii")
        if len(data) > MAX_FRAME:
            raise ValueError(f"a message must have at most {MAX_FRAME} bytes, got {len(data)}")
        data = len(data).to_bytes(4, "big") + data
        try:
            while data:
                data = data[os.write(self.sink, data) :]
        except OSError as error:
            raise Gone from error

    def receive(self) -> bytes:
        """Return the next message as it came. Raises Gone at the end and if it is too long."""
        length = int.from_bytes(self._exactly(4), "big")
        if length > MAX_FRAME:
            raise Gone
        return self._exactly(length)

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = os.read(self.source, min(size - len(data), 1 << 16))
            if not piece:
                raise Gone
            data += piece
        return bytes(data)


def encode(value: Any, keep: Keep) -> Any:
    """Return the value as JSON's types; `keep` gives a number for what cannot cross.

    Subclasses cross as the plain type they extend. Sets are in the order of their elements' JSON.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        plain = int.__int__(value)
        return plain if -_BIG < plain < _BIG else {"int": hex(plain)}
    if isinstance(value, float):
        plain_float = float.__float__(value)
        return plain_float if plain_float - plain_float == 0 else {"float": float.__repr__(plain_float)}
    if isinstance(value, list):
        return [encode(item, keep) for item in list.__iter__(value)]
    if isinstance(value, tuple):
        return {"tuple": [encode(item, keep) for item in tuple.__iter__(value)]}
    if isinstance(value, dict):
        return {"dict": [[encode(k, keep), encode(v, keep)] for k, v in dict.items(value)]}
    if isinstance(value, set | frozenset):
        tag = "set" if isinstance(value, set) else "frozenset"
        return {tag: sorted((encode(item, keep) for item in value), key=json.dumps)}
    if isinstance(value, bytes | bytearray):
        return {"bytes" if isinstance(value, bytes) else "bytearray": value.hex()}
    if isinstance(value, complex):
        return {"complex": [encode(value.real, keep), encode(value.imag, keep)]}
    if isinstance(value, range):
        return {"range": [encode(part, keep) for part in (value.start, value.stop, value.step)]}
    return {"handle": keep(value)}


def decode(value: Any, find: Find) -> Any:
    """Return what was encoded; `find` turns the number of a handle into an object.

    Raises: ValueError, TypeError, KeyError or RecursionError for what `encode` cannot have made.
    """
    if isinstance(value, list):
        return [decode(item, find) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, inner),) = value.items()
    if tag == "handle":
        return find(inner)
    if tag == "dict":
        return {decode(key, find): decode(item, find) for key, item in inner}
    make = _MAKE[tag]
    return make(decode(inner, find))


_MAKE: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": float,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda parts: complex(*parts),
    "range": lambda parts: range(*parts),
}
