"""Linear layers of a decoding step, where few rows meet all weights: moving those is most of the work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear, pad
from torch.overrides import TorchFunctionMode

from lightning_rlvr.ops import onednn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_PACKED = 2 * 2**30  # bytes of all weights: more are not held twice
LIKELY_ROWS = 32  # of a step, which oneDNN is told of
# Products have a multiple of so many rows: of each number oneDNN keeps code for each layer, 0.4 MB.
ROWS = 16


def packs_weights(model: PreTrainedModel, device: str) -> bool:
    """Whether rollouts of a model on a type of device hold its weights a second time, as oneDNN likes them best."""
    here = device == "cpu" and model.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return here and sum(weight.nbytes for weight in model.parameters()) <= MOST_PACKED


def linears(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """Return the context of decoding steps, for as long as no weight of the model changes.

    On a CPU, float32 weights (see `packs_weights`) are packed once, instead of rearranged by BLAS at every step. The
    layers of SmolLM2-135M are 1.25 (256 rows) to 2 times (8 rows) as fast on two cores (AMD EPYC, AVX-512), those of
    W1 in benchmarks/ 1.1 to 1.5 times at 64 rows and more. The result differs by rounding.

    Under autocast each weight is rounded once and kept, instead of at every step: to read it in float32 and write it
    in bfloat16 takes four times as long as to multiply with it. The result is the same.
    """
    kind = model.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return PreparedOnce(lambda weight: weight.to(dtype), linear)
    return PreparedOnce(packed, multiplied) if packs_weights(model, kind) else nullcontext()


class PreparedOnce(TorchFunctionMode):
    """Multiplies with float32 weights of linear layers that were prepared when they were first met.

    Args:
        prepare: makes of a weight what is kept of it.
        multiply: takes an input, what was made of the weight, and the bias if there is one.
    """

    def __init__(self, prepare: Callable[[Tensor], Tensor], multiply: Callable[..., Tensor]) -> None:
        super().__init__()
        self.prepare, self.multiply = prepare, multiply
        self.weights: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take linear layers over, and leave all else as it is."""
        weight = args[1] if func is linear and not kwargs else None
        if not isinstance(weight, torch.nn.Parameter) or weight.dtype != torch.float32:
            return func(*args, **(kwargs or {}))
        if id(weight) not in self.weights:
            self.weights[id(weight)] = self.prepare(weight.detach())
        return self.multiply(args[0], self.weights[id(weight)], *args[2:])


def packed(weight: Tensor) -> Tensor:
    """Return a weight as `multiplied` takes it."""
    ready: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, LIKELY_ROWS)
    return ready


def multiplied(x: Float[Tensor, "*N E"], ready: Tensor, bias: Tensor | None = None) -> Float[Tensor, "*N F"]:
    """Return what a linear layer makes of x, with some rows more than there are: see ROWS."""
    rows = x.shape[:-1].numel()
    whole, more = x.reshape(rows, -1), -rows % ROWS
    if more:
        whole = pad(whole, (0, 0, 0, more))
    return onednn.linear(whole, ready, bias)[:rows].view(*x.shape[:-1], -1)
