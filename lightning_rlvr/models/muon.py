"""Muon in float32: torch's multiplies in bfloat16, which CPUs without instructions for it do ten times slower."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration
STEPS = 5
SCALE = 0.2  # the root mean square of AdamW's updates


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose updates are made orthogonal and as large as AdamW's, for matrices of hidden layers.

    Args:
        params: matrices.
        lr: learning rate, as for AdamW.
        momentum: share of the running mean of gradients that is kept.
        weight_decay: share of a weight, times lr, that it loses in a step.

    Source: Jordan et al. (2024), kellerjordan.github.io/posts/muon; the scale: arXiv 2502.16982.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all matrices that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                mean.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonal(weight.grad.lerp(mean, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * SCALE * max(weight.shape) ** 0.5)


def orthogonal(matrix: Float[Tensor, "A B"]) -> Float[Tensor, "A B"]:
    """Return roughly the nearest matrix whose singular values are all 1: they end between 0.7 and 1.2.

    >>> values = torch.linalg.svdvals(orthogonal(torch.randn(8, 5, generator=torch.Generator().manual_seed(0))))
    >>> bool(values.min() > 0.6), bool(values.max() < 1.3)
    (True, True)
    """
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
