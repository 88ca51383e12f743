"""Semantic entropy of sampled answers to one question: cluster them by meaning, take the entropy of the masses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Estimator = Literal["discrete", "rao_blackwell", "likelihood"]
Unparsable = Literal["own_cluster_each", "one_cluster"]


def cluster_groups(
    groups: Sequence[Sequence[str | None]],
    equivalent: Callable[[Sequence[tuple[str, str]]], Sequence[bool]],
    unparsable: Unparsable = "own_cluster_each",
) -> list[list[int]]:
    """Label the answers to each question with their clusters: an answer belongs to the first representative it equals.

    Representatives are, in sample order, the answers that equal no representative before them: well defined also
    where equivalence fails to be transitive. `equivalent` judges pairs (representative, answer) of all questions in
    one call, once for each cluster of the question that has most; identical texts are never compared. `None` is an
    unparsable answer: each is a cluster of its own, or those of a question are one. Labels are 0, 1, ... in order of
    first appearance.

    Source: arXiv 2512.04359, section on semantic entropy; clustering by meaning, arXiv 2302.09664.

    >>> same = lambda pairs: [{a, b} == {"1/2", "0.5"} for a, b in pairs]
    >>> cluster_groups([["1/2", "3", "0.5", None], ["3", "3"]], same)
    [[0, 1, 0, 2], [0, 0]]
    """
    unlabelled = [list(dict.fromkeys(a for a in answers if a is not None)) for answers in groups]
    representative: list[dict[str, str]] = [{} for _ in groups]
    while any(unlabelled):
        pairs = [(first, text) for first, *others in filter(None, unlabelled) for text in others]
        verdicts = iter(equivalent(pairs) if pairs else [])
        for number, texts in enumerate(unlabelled):
            if not texts:
                continue
            first, *others = texts
            same = {text for text in others if next(verdicts)}
            representative[number] |= dict.fromkeys([first, *same], first)
            unlabelled[number] = [text for text in others if text not in same]
    return [_number(answers, named, unparsable) for answers, named in zip(groups, representative, strict=True)]


def _number(answers: Sequence[str | None], representative: dict[str, str], unparsable: Unparsable) -> list[int]:
    """Number the clusters of one question in order of first appearance."""
    labels: dict[str | int, int] = {}
    alone = (i if unparsable == "own_cluster_each" else -1 for i in range(len(answers)))
    names = [i if a is None else representative[a] for a, i in zip(answers, alone, strict=True)]
    return [labels.setdefault(name, len(labels)) for name in names]


def semantic_entropy(
    labels: Int[Tensor, " M"],
    logp: Float[Tensor, " M"] | None = None,
    lengths: Int[Tensor, " M"] | None = None,
    estimator: Estimator = "discrete",
) -> float:
    """Return H_SE = -sum_k p_k log p_k over the clusters of M sampled answers, in nats.

    The mass of a cluster before normalisation is, by estimator:

    - discrete: the number of its samples
    - rao_blackwell: the sum over its samples of exp(logp / length), the length-normalised likelihood
    - likelihood: the sum over its samples of exp(logp), the likelihood of the whole response

    `logp` is the summed log-probability of each response in nats, `lengths` its number of tokens. All sums are
    in log space and float64: exp(-800) is 0 even there.

    Raises: ValueError without samples, without the inputs that the estimator reads, or if logp is not finite.
    Source: arXiv 2512.04359; estimators after arXiv 2302.09664.

    >>> round(semantic_entropy(torch.tensor([0, 0, 1, 1])), 6)
    0.693147
    """
    if len(labels) == 0:
        raise ValueError("semantic entropy needs at least one sampled answer")
    log_weight = torch.zeros(len(labels), dtype=torch.float64)
    if estimator in ("rao_blackwell", "likelihood"):
        if logp is None or not logp.isfinite().all():
            raise ValueError(f"the {estimator} estimator needs a finite logp for each sample, got {logp}")
        log_weight = logp.double()
    elif estimator != "discrete":
        raise ValueError(f"unknown estimator {estimator!r}: discrete, rao_blackwell or likelihood")
    if estimator == "rao_blackwell":
        if lengths is None or (lengths < 1).any():
            raise ValueError(f"the rao_blackwell estimator needs the length of each sample (>= 1), got {lengths}")
        log_weight = log_weight / lengths.double()
    clusters: dict[int, list[float]] = {}
    for label, weight in zip(labels.tolist(), log_weight.tolist(), strict=True):
        clusters.setdefault(label, []).append(weight)
    log_mass = [_logsumexp(weights) for weights in clusters.values()]
    total = _logsumexp(log_mass)
    return max(0.0, -math.fsum(math.exp(x - total) * (x - total) for x in log_mass))


def _logsumexp(values: list[float]) -> float:
    most = max(values)
    return most + math.log(math.fsum(math.exp(x - most) for x in values))
