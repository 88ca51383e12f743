"""Measures over n samples a problem: pass@k, avg@k and maj@k.

Shapes: B problems, n samples each. Results are float64, one per problem; their mean over problems is the
benchmark's number; ops/bootstrap.py has its interval.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_rlvr.types import UserError

UNPARSED = -1
"""Cluster label of a sample without an answer that could be parsed; it does not vote."""


def pass_at_k(n: Int[Tensor, " B"], c: Int[Tensor, " B"], k: int) -> Float[Tensor, " B"]:
    """Estimate, without bias, the chance that k samples hold a correct one: 1 - C(n-c, k) / C(n, k).

    `c` of `n` samples of each problem are correct. In product form, prod_j (n - c - j) / (n - j) over
    j < k: no binomial coefficient overflows.

    Raises: UserError if k < 1 or k > n for some problem (the estimator does not exist there); ValueError
    unless 0 <= c <= n.
    Source: Chen et al. (2021), arXiv 2107.03374, eq. 1.

    >>> pass_at_k(torch.tensor([4, 4]), torch.tensor([1, 0]), 2).tolist()
    [0.5, 0.0]
    """
    if bool(((c < 0) | (c > n)).any()):
        raise ValueError(f"c must lie in [0, n], got c = {c.tolist()} of n = {n.tolist()}: c counts correct samples.")
    fewest = int(n.min()) if n.numel() else k
    if not 1 <= k <= fewest:
        raise UserError(
            f"k must lie in [1, n], got k = {k} with n = {fewest} samples a problem: pass@k needs n >= k. "
            "Set the metric's k, or sample more responses a prompt."
        )
    drawn = torch.arange(k, device=n.device, dtype=torch.float64)
    total = n.double()[:, None] - drawn  # [B, k] samples left, >= 1
    wrong = total - c.double()[:, None]  # [B, k] wrong ones left; passes through 0 if n - c < k
    return 1 - (wrong / total).prod(dim=1)


def avg_at_k(correct: Bool[Tensor, "B n"]) -> Float[Tensor, " B"]:
    """Return the share of correct samples of each problem: avg@k with k = n, also called mean@k.

    Raises: ValueError if n = 0.

    >>> avg_at_k(torch.tensor([[True, False], [True, True]])).tolist()
    [0.5, 1.0]
    """
    _need_samples(correct)
    return correct.double().mean(dim=1)


def maj_at_k(cluster: Int[Tensor, "B n"], correct: Bool[Tensor, "B n"]) -> Float[Tensor, " B"]:
    """Return the expected correctness of the majority answer of each problem: maj@k with k = n.

    Samples with equal `cluster` labels gave the same answer; label -1 marks an unparsable sample, which
    does not vote. Clusters tied for the most votes are each chosen with equal chance, and the result is the
    expectation over that choice, so it depends neither on the order of samples nor on a seed. Where members
    of a cluster were judged differently, the cluster counts as the share of its correct ones. A problem
    without votes scores 0.

    Raises: ValueError if n = 0 or a label is below -1.
    Source: Wang et al. (2022), arXiv 2203.11171 (self-consistency); the ties are ours.

    >>> maj_at_k(torch.tensor([[7, 7, 3], [1, 2, -1]]),
    ...          torch.tensor([[True, True, False], [True, False, False]])).tolist()
    [1.0, 0.5]
    """
    _need_samples(correct)
    if bool((cluster < UNPARSED).any()):
        raise ValueError(f"cluster labels must be >= -1, got {int(cluster.min())}: -1 marks an unparsable sample.")
    rows = [_majority(labels, good) for labels, good in zip(cluster, correct.double(), strict=True)]
    return torch.stack(rows) if rows else correct.new_zeros(0, dtype=torch.float64)


def _majority(labels: Int[Tensor, " n"], correct: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    votes = labels != UNPARSED
    if not bool(votes.any()):
        return correct.new_zeros(())
    _, member, sizes = labels[votes].unique(return_inverse=True, return_counts=True)
    share = correct.new_zeros(sizes.numel()).index_add(0, member, correct[votes]) / sizes
    majority: Tensor = share[sizes == sizes.max()].mean()
    return majority


def _need_samples(correct: Tensor) -> None:
    if correct.shape[1] == 0:
        raise ValueError(f"correct must hold at least one sample a problem, got shape {tuple(correct.shape)}.")
