"""Surrogates: what the policy term of an objective looks like, token by token.

Each is a frozen dataclass, chosen in YAML as `model.objective.init_args.surrogate`, so that any objective can be put on
any surrogate (SENT on DAPO's clip, say). r = exp(logp - old_logp). Uncounted positions of all inputs hold 0, and nobody
looks at what the result holds there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_rlvr.objectives.checks import check
from lightning_rlvr.ops.surrogate import PolicyTerm, clipped_surrogate

RATIO = "the ratio is bounded {}"


class Surrogate(ABC):
    """A policy term: a loss for each token from probabilities and advantages."""

    @abstractmethod
    def __call__(
        self,
        logp: Float[Tensor, "N T"],
        old_logp: Float[Tensor, "N T"],
        advantage: Float[Tensor, "N T"],
        mask: Bool[Tensor, "N T"],
    ) -> PolicyTerm:
        """Return the term."""


@dataclass(frozen=True)
class Clipped(Surrogate):
    """-min(r A, clip(r, 1 - low, 1 + high) A).

    A clipped token, and one without advantage, has gradient 0 also where r overflows.

    Source: PPO, arXiv 1707.06347; unequal bounds ("clip-higher", 0.2 and 0.28) DAPO, arXiv 2503.14476.
    """

    low: float = 0.2
    high: float = 0.2

    def __post_init__(self) -> None:
        check(0 < self.low < 1, "surrogate.init_args.low", self.low, "in (0, 1)", RATIO.format("below by 1 - low"))
        check(self.high > 0, "surrogate.init_args.high", self.high, "positive", RATIO.format("above by 1 + high"))

    def __call__(
        self,
        logp: Float[Tensor, "N T"],
        old_logp: Float[Tensor, "N T"],
        advantage: Float[Tensor, "N T"],
        mask: Bool[Tensor, "N T"],
    ) -> PolicyTerm:
        """Return the clipped term."""
        return clipped_surrogate(logp - old_logp, advantage, self.low, self.high)


@dataclass(frozen=True)
class Unclipped(Surrogate):
    """-r A. Source: KL-Cov, arXiv 2505.22617; the release of SENT, arXiv 2512.04359."""

    def __call__(
        self,
        logp: Float[Tensor, "N T"],
        old_logp: Float[Tensor, "N T"],
        advantage: Float[Tensor, "N T"],
        mask: Bool[Tensor, "N T"],
    ) -> PolicyTerm:
        """Return the unclipped term; a token without advantage has gradient 0 also where r overflows."""
        ratio = (logp - old_logp).masked_fill(advantage == 0, 0.0).exp()
        return PolicyTerm(-ratio * advantage, torch.zeros_like(mask))


@dataclass(frozen=True)
class SequenceClipped(Clipped):
    """-min(s A, clip(s, 1 - low, 1 + high) A), with one ratio for a whole response.

    s = exp(1/|o| sum_t (logp_t - old_logp_t)). Every token carries its response's term, so that the mean over the
    tokens of a response, then over responses (`sequence_mean`), is GSPO's objective.

    Source: GSPO, arXiv 2507.18071; bounds of its section 5.
    """

    low: float = 3e-4
    high: float = 4e-4

    def __call__(
        self,
        logp: Float[Tensor, "N T"],
        old_logp: Float[Tensor, "N T"],
        advantage: Float[Tensor, "N T"],
        mask: Bool[Tensor, "N T"],
    ) -> PolicyTerm:
        """Return the term of the response at each of its tokens."""
        lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio = (logp - old_logp).sum(dim=1, keepdim=True) / lengths
        return clipped_surrogate(log_ratio.expand(mask.shape), advantage, self.low, self.high)


@dataclass(frozen=True)
class ClippedWeight(Surrogate):
    """-sg(clip(r, 1 - low, 1 + high)) A logp: the importance weight is clipped, and no token loses its gradient.

    `sg` stops the gradient. low 1 leaves the weight unbounded below, as CISPO does.

    Source: CISPO, arXiv 2506.13585, equations 4 and 5, which publish no value for high.
    """

    low: float = 1.0
    high: float = 0.28

    def __post_init__(self) -> None:
        check(0 < self.low <= 1, "surrogate.init_args.low", self.low, "in (0, 1]", RATIO.format("below by 1 - low"))
        check(self.high > 0, "surrogate.init_args.high", self.high, "positive", RATIO.format("above by 1 + high"))

    def __call__(
        self,
        logp: Float[Tensor, "N T"],
        old_logp: Float[Tensor, "N T"],
        advantage: Float[Tensor, "N T"],
        mask: Bool[Tensor, "N T"],
    ) -> PolicyTerm:
        """Return the weighted term; `clipped` says where the weight was cut, its gradient is not."""
        ratio = (logp - old_logp).detach().exp()
        bounded = ratio.clamp(1 - self.low, 1 + self.high)
        return PolicyTerm(-bounded * advantage * logp, bounded != ratio)


def check_token_surrogate(surrogate: Surrogate) -> None:
    """Raise UserError for a surrogate of whole responses, where no single token can be left out."""
    check(
        not isinstance(surrogate, SequenceClipped),
        "surrogate",
        surrogate,
        "a surrogate of single tokens",
        "a token cannot lose its gradient where one ratio stands for the whole response",
    )
