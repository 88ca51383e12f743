"""Where the time goes: seconds by part of the work."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class Clock:
    """Adds up wall-clock seconds by part. Parts may repeat; a part inside another is counted in both."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._closed = False

    @contextmanager
    def part(self, name: str, closed: bool = False) -> Iterator[None]:
        """Count the time of the block under `name`; on a GPU, up to the end of its kernels.

        Parts inside a `closed` one are not counted: the rollouts of an evaluation are not those of training.
        """
        if self._closed:
            yield
            return
        start, self._closed = self._now(), closed
        try:
            yield
        finally:
            self._closed = False
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds of an earlier part of the run."""
        for name, more in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + more

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()
