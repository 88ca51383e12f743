"""Triton kernels: import their modules only where they are `available`, as there may be no Triton elsewhere."""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available(dtype: torch.dtype, device: torch.device) -> bool:
    """Say whether there are kernels for numbers of that dtype there. Sums are float32."""
    return device.type == "cuda" and dtype in DTYPES and find_spec("triton") is not None


def launched_on(x: Tensor) -> AbstractContextManager[object]:
    """Return the context in which kernels are launched on a tensor's GPU: Triton takes the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
