"""Triton kernels: import their modules only where they are `available`, as there may be no Triton elsewhere."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available(dtype: torch.dtype, device: torch.device) -> bool:
    """Say whether there are kernels for numbers of that dtype there. Sums are float32."""
    return device.type == "cuda" and dtype in DTYPES and find_spec("triton") is not None and _run(dtype, device)


@cache
def _run(dtype: torch.dtype, device: torch.device) -> bool:
    """Say whether one of them runs; found out once. Triton compiles them when they are first called."""
    from lightning_rlvr.kernels.layers import gated

    try:
        one = torch.ones(1, 1, dtype=dtype, device=device)
        float(gated(one, one))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - no compiler, a driver or a GPU that Triton does not know
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        warnings.warn(
            f"Triton cannot run kernels for {dtype} on {device}, so torch does their work, which is slower: {reason}. "
            "It needs a C compiler, and a driver and a GPU that it knows.",
            stacklevel=3,
        )
        return False
    return True


def launched_on(x: Tensor) -> AbstractContextManager[object]:
    """Return the context in which kernels are launched on a tensor's GPU: Triton takes the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
