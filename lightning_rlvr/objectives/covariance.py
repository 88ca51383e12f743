"""Clip-Cov and KL-Cov: restraint where log-probability and advantage go together ("w/ Clip", "w/ Cov")."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lightning_rlvr.objectives.checks import check, check_share, check_weight
from lightning_rlvr.objectives.grpo import GRPO
from lightning_rlvr.objectives.surrogates import Surrogate, Unclipped, check_token_surrogate
from lightning_rlvr.ops.covariance import token_covariance
from lightning_rlvr.ops.selection import highest, lowest, share_count, token_lottery
from lightning_rlvr.types import TokenPlan, TokenStats


@dataclass(frozen=True)
class ClipCov(GRPO):
    """Clip-Cov: among tokens with low < Cov_t < high, random ones lose their gradient.

    `fraction` of all tokens of the rollout batch are drawn, or all candidates if they are fewer. When the
    plan is made the ratio is 1 and no token is clipped, so every token in the band is a candidate. The draw is a
    function of row id and position: it does not depend on layout, ranks or generator state. Tokens that lose
    their gradient stay in the denominators.

    Args:
        cov_low, cov_high: the band of covariances, in nats times advantage.
        fraction: share of all tokens that are drawn.
        kl_coef: see GRPO. All others: see PolicyObjective.

    Source: arXiv 2505.22617, section 4; values of its release.
    """

    cov_low: float = 1.0
    cov_high: float = 5.0
    fraction: float = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.cov_low < self.cov_high, "cov_high", self.cov_high, f"above cov_low ({self.cov_low})", "empty band")
        check_share(self.fraction, "fraction")
        check_token_surrogate(self.surrogate)

    def plan(self, stats: TokenStats) -> TokenPlan:
        """Draw the tokens whose gradient is dropped."""
        counted = stats.counted()
        covariance = token_covariance(stats.logp.flatten()[counted], stats.token_advantage().flatten()[counted])
        candidates = ((covariance > self.cov_low) & (covariance < self.cov_high)).nonzero().squeeze(-1)
        count = min(share_count(self.fraction, len(counted)), len(candidates))
        width = stats.mask.shape[1]
        tickets = token_lottery(stats.row_id[counted // width], counted % width)[candidates]
        dropped = torch.zeros(len(counted), dtype=torch.bool, device=counted.device)
        dropped[candidates[lowest(tickets, count)]] = True
        spread = stats.spread(dropped)
        # Without advantage a token has no policy gradient, whatever its ratio.
        advantage = stats.token_advantage().masked_fill(spread, 0.0)
        return self.make_plan(stats, advantage=advantage, kl=self.kl_coef, classes={"dropped": spread})


@dataclass(frozen=True)
class KLCov(GRPO):
    """KL-Cov: the unclipped surrogate, and beta * |log r| on the share of tokens with the highest covariance.

    |log r| has no gradient at r = 1: with one update a rollout batch the penalty does nothing.

    Args:
        fraction: share of all tokens that are held; 0.002 for 7B models.
        beta: weight of |log r| on them.
        kl_coef: see GRPO. All others: see PolicyObjective.

    Source: arXiv 2505.22617, section 4.
    """

    surrogate: Surrogate = field(default_factory=Unclipped)
    fraction: float = 0.002
    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.fraction, "fraction")
        check_weight(self.beta, "beta")

    def inert(self, updates_per_rollout: int) -> list[str]:
        """Say if the penalty cannot act."""
        reached = self.beta > 0 and self.fraction > 0
        return drift_inert(reached, "beta and fraction", updates_per_rollout) + super().inert(updates_per_rollout)

    def plan(self, stats: TokenStats) -> TokenPlan:
        """Choose the tokens that are held."""
        counted = stats.counted()
        covariance = token_covariance(stats.logp.flatten()[counted], stats.token_advantage().flatten()[counted])
        held = stats.spread(highest(covariance, share_count(self.fraction, len(counted))))
        return self.make_plan(
            stats, kl=self.kl_coef, drift=held.to(stats.logp.dtype) * self.beta, classes={"held": held}
        )


def drift_inert(reached: bool, keys: str, updates_per_rollout: int) -> list[str]:
    """Say why a penalty on |log r| cannot act: it reaches no token, or there is one update a rollout batch."""
    if not reached:
        return [f"the penalty on |log r| reaches no token. Set {keys} of model.objective.init_args to more than 0."]
    if updates_per_rollout > 1:
        return []
    return [
        "the penalty on |log r| has no gradient at r = 1, and with model.updates_per_rollout 1 every gradient is taken "
        "there: it does nothing. Set model.updates_per_rollout to 2 or more."
    ]
