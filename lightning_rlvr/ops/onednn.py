"""Linear layers by oneDNN, which on a CPU are faster in float32 than those of BLAS."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def linear(x: Float[Tensor, "N E"], weight: Tensor, bias: Float[Tensor, " F"] | None = None) -> Float[Tensor, "N F"]:
    """Return x @ weight.T + bias; the weight [F, E] may be packed. Code is kept for each N, a megabyte or so."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
