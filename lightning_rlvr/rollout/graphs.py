"""Decoding steps as CUDA graphs: their kernels are short and many, and launching each takes longer than it runs.

A graph does what was done while it was captured, with the same memory and the same sizes. The number of rows is
therefore taken from the powers of two, and all else that changes from step to step is read from tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from lightning_rlvr.models.forward import sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Graphs:
    """Graphs by a key; they share memory, so what one has computed is lost in the next."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._known: dict[Hashable, torch.cuda.CUDAGraph] = {}

    @classmethod
    def of(cls, model: PreTrainedModel) -> Graphs | None:
        """Return room for graphs of a model, or None where there can be none: off CUDA, and with gathered weights.

        Hooks on those wait for events, which a graph cannot.
        """
        return cls() if model.device.type == "cuda" and not sharded(model) else None

    def run(self, key: Hashable, compute: Callable[[], None]) -> None:
        """Do what `compute` does: at first by itself, so that its kernels are made; captured then, by its graph later.

        What it reads and writes must stay in place, and it must not wait for what it computes.
        """
        if key in self._known:
            self._known[key].replay()
        else:
            compute()
            self._known[key] = self._capture(compute)

    def clear(self) -> None:
        """Forget all graphs, whose tensors have moved. Their memory goes with the last of them."""
        self._known.clear()
        self._pool = torch.cuda.graph_pool_handle()

    def _capture(self, compute: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool)
            try:
                compute()
            except BaseException:
                with suppress(RuntimeError):  # says again, in other words, that the capture is void
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph


def rows_for(rows: int, most: int) -> int:
    """Return a number of rows that has room for `rows`, of which there are `most` at most.

    >>> [rows_for(rows, 24) for rows in (1, 5, 16, 17)]
    [1, 8, 16, 24]
    """
    return min(most, 1 << (rows - 1).bit_length())
