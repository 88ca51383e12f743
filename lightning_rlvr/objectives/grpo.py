"""Group Relative Policy Optimization and the objectives that are GRPO with other settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_rlvr.objectives.base import PolicyObjective
from lightning_rlvr.objectives.checks import check_weight
from lightning_rlvr.objectives.surrogates import Clipped, ClippedWeight, SequenceClipped, Surrogate
from lightning_rlvr.ops.reduce import Aggregation
from lightning_rlvr.types import TokenPlan, TokenStats


@dataclass(frozen=True)
class GRPO(PolicyObjective):
    """GRPO: the clipped surrogate on group advantages, with an optional KL penalty on every token.

    J = E[ 1/G sum_i 1/|o_i| sum_t ( min(r_t A_i, clip(r_t, 1 - low, 1 + high) A_i) - kl_coef KL_t ) ]

    Args:
        kl_coef: weight of the KL, on every token; 0 turns it off and loads no reference.
        surrogate, aggregation, fixed_length, scale_by_std, kl_estimator, kl_to: see PolicyObjective.

    Source: arXiv 2402.03300.
    """

    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight(self.kl_coef, "kl_coef")

    @property
    def uses_kl(self) -> bool:
        """Whether there is a KL penalty."""
        return self.kl_coef > 0

    def plan(self, stats: TokenStats) -> TokenPlan:
        """Give every counted token its row's advantage and the same KL weight."""
        return self.make_plan(stats, kl=self.kl_coef)


@dataclass(frozen=True)
class DrGRPO(GRPO):
    """Dr.GRPO: no division by the group's standard deviation, and a fixed number of tokens as denominator.

    Args:
        fixed_length: the tokens that a response counts for, usually the most that it may have. To be set.
        kl_coef: see GRPO. surrogate, kl_estimator, kl_to: see PolicyObjective.

    Source: arXiv 2503.20783.
    """

    aggregation: Aggregation = "fixed_length"
    scale_by_std: bool = False


@dataclass(frozen=True)
class DAPO(GRPO):
    """DAPO's loss: a higher upper clip (0.28), the mean over all tokens, no KL.

    The rest of DAPO is not a loss: `model.dynamic_sampling` refills groups whose rewards are all equal, and
    `rewards.SoftOverlong` is its length penalty.

    Source: arXiv 2503.14476.
    """

    surrogate: Surrogate = field(default_factory=lambda: Clipped(low=0.2, high=0.28))
    aggregation: Aggregation = "token_mean"


@dataclass(frozen=True)
class GSPO(GRPO):
    """GSPO: GRPO with one clipped ratio for a whole response. Source: arXiv 2507.18071."""

    surrogate: Surrogate = field(default_factory=SequenceClipped)


@dataclass(frozen=True)
class CISPO(GRPO):
    """CISPO: the importance weight is clipped and detached; every token keeps a gradient.

    Source: arXiv 2506.13585.
    """

    surrogate: Surrogate = field(default_factory=ClippedWeight)
    aggregation: Aggregation = "token_mean"
