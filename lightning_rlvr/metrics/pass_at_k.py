"""pass@k, avg@k and maj@k, accumulated over batches and ranks."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

from lightning_rlvr.ops.pass_at_k import avg_at_k, maj_at_k, pass_at_k
from lightning_rlvr.types import UserError


class ProblemMean(Metric):
    """The mean of one number per problem; every problem weighs the same, however many samples it had.

    `compute` before any problem was seen, on any rank, raises UserError: there is no such mean, and 0 or
    nan would pass for a result.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    total: Tensor
    problems: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("problems", torch.tensor(0), dist_reduce_fx="sum")

    def add(self, values: Float[Tensor, " B"]) -> None:
        """Add the numbers of B problems."""
        self.total += values.sum().to(self.total)
        self.problems += values.numel()

    def compute(self) -> Tensor:
        """Return the mean over all problems seen, a scalar."""
        if int(self.problems) == 0:
            raise UserError(
                f"{type(self).__name__} must see a problem before its result is read, got none: the mean over "
                "no problems does not exist. Check that the validation set is not empty."
            )
        return self.total / self.problems


class PassAtK(ProblemMean):
    """Mean over problems of the unbiased pass@k (arXiv 2107.03374), from n >= k samples a problem.

    >>> metric = PassAtK(k=2)
    >>> metric.update(torch.tensor([[True, False, False, False], [False, False, False, False]]))
    >>> metric.compute()
    tensor(0.2500)
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise UserError(f"k must be >= 1, got {k}: pass@k draws k of n samples. Set the metric's k.")
        self.k = k

    def update(self, correct: Bool[Tensor, "B n"]) -> None:
        """Add B problems with n samples each. Raises: UserError if k > n."""
        # counted on the CPU: the product runs in float64, which Apple's GPU has not
        c = correct.sum(dim=1).cpu()
        self.add(pass_at_k(torch.full_like(c, correct.shape[1]), c, self.k))


class AvgAtK(ProblemMean):
    """Mean over problems of the share of correct samples.

    >>> metric = AvgAtK()
    >>> metric.update(torch.tensor([[True, False], [True, True]]))
    >>> metric.compute()
    tensor(0.7500)
    """

    def update(self, correct: Bool[Tensor, "B n"]) -> None:
        """Add B problems with n samples each. Raises: ValueError if n = 0."""
        self.add(avg_at_k(correct.cpu()))


class MajAtK(ProblemMean):
    """Mean over problems of the correctness of the majority answer; see `ops.pass_at_k.maj_at_k` for ties.

    >>> metric = MajAtK()
    >>> metric.update(torch.tensor([[0, 0, 1]]), torch.tensor([[True, True, False]]))
    >>> metric.compute()
    tensor(1.)
    """

    def update(self, cluster: Int[Tensor, "B n"], correct: Bool[Tensor, "B n"]) -> None:
        """Add B problems: each sample's answer cluster (-1 if unparsable) and whether it is correct."""
        self.add(maj_at_k(cluster.cpu(), correct.cpu()))
