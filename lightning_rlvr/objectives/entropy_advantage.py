"""Advantages shaped by entropy ("w/ Adv")."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_rlvr.objectives.checks import check, check_weight
from lightning_rlvr.objectives.grpo import GRPO
from lightning_rlvr.types import TokenPlan, TokenStats


@dataclass(frozen=True)
class EntropyAdvantage(GRPO):
    """GRPO with A_t + min(alpha * H_t, |A_t| / kappa) for the advantage, H detached.

    The bound by |A_t| / kappa with kappa > 1 keeps the advantage's sign, and a token without advantage gets
    none.

    Args:
        alpha: weight of the entropy.
        kappa: how small the addition stays beside the advantage; more than 1.
        kl_coef: see GRPO. All others: see PolicyObjective.

    Source: arXiv 2506.14758.
    """

    alpha: float = 0.4
    kappa: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight(self.alpha, "alpha")
        check(self.kappa > 1, "kappa", self.kappa, "more than 1", "else the addition may turn an advantage's sign")

    def plan(self, stats: TokenStats) -> TokenPlan:
        """Shape each token's advantage."""
        advantage = stats.token_advantage()
        addition = (self.alpha * stats.entropy).minimum(advantage.abs() / self.kappa)
        return self.make_plan(stats, advantage=advantage + addition, kl=self.kl_coef)
