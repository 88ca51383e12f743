"""Work that asks for more memory than there is: told from other errors, and done again in smaller parts."""

from __future__ import annotations

import ctypes
import gc
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from lightning_rlvr.types import UserError

# What the allocators of a CPU say, in a RuntimeError like any other.
SAID = ("not enough memory", "DefaultCPUAllocator", "bad_alloc", "Cannot allocate memory", "bad allocation")
ERRORS = (RuntimeError, MemoryError)  # what running out of memory is raised as; `out_of_memory` tells it apart

Result = TypeVar("Result")


def out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out, of a GPU or of the machine."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)


def in_smaller_parts(work: Callable[[int], Result], size: int, least: int, key: str, others: str) -> tuple[Result, int]:
    """Return work(size) and the size, halved as often as memory ran out; said once for each halving.

    `work` is begun anew each time, so it must leave nothing behind when it fails. `key` names the setting that `size`
    is of, `others` settings that help where `size` cannot go below `least`.

    Raises: UserError if memory runs out at the least size.
    """
    while True:
        try:
            return work(size), size
        except ERRORS as error:
            if not out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0] or type(error).__name__
            if size <= least:
                raise UserError(f"memory ran out at {key} {size} ({reason}). Lower {key} or {others}.") from error
        # Here the error is gone, and with it the frames that held what had been computed.
        free_memory()
        smaller = max(least, size // 2)
        warnings.warn(
            f"memory ran out ({reason}): {key} is halved from {size} to {smaller} and the work done again. Results do "
            f"not depend on it. Set {key} to {smaller} to begin with it.",
            stacklevel=2,
        )
        size = smaller


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def give_back() -> None:
    """Give the system back what was freed in the midst of other things, if the C library is glibc.

    It keeps such pages otherwise: those of an update's activations, while the next rollout takes others.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
