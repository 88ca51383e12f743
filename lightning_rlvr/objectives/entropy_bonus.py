"""Entropy in the loss: a fixed bonus, and one that acts only where entropy is short."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_rlvr.objectives.checks import check, check_weight
from lightning_rlvr.objectives.grpo import GRPO
from lightning_rlvr.types import TokenPlan, TokenStats


@dataclass(frozen=True)
class EntropyBonus(GRPO):
    """GRPO minus entropy_coef times the mean entropy, with the gradient through the entropy ("w/ En").

    The mean is the objective's aggregation: over tokens of a response, then over responses by default.

    Args:
        entropy_coef: weight of the bonus; 0.001 in the only script that SENT's release has.
        kl_coef: see GRPO. All others: see PolicyObjective.

    Source: PPO, arXiv 1707.06347, section 5.
    """

    entropy_coef: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight(self.entropy_coef, "entropy_coef")

    @property
    def needs_entropy(self) -> bool:
        """Whether there is a bonus."""
        return self.entropy_coef > 0

    def plan(self, stats: TokenStats) -> TokenPlan:
        """Give every counted token the same bonus."""
        return self.make_plan(stats, kl=self.kl_coef, entropy=self.entropy_coef if self.needs_entropy else None)


@dataclass(frozen=True)
class AdaptiveEntropy(GRPO):
    """An entropy bonus whose weight c moves by `step` after each rollout batch, and acts below the target only.

    With H the mean entropy over the rollout batch's tokens: the bonus weighs c if H <= target and 0 otherwise; then,
    for the next rollout batch, c becomes c + step if H < target, else max(0, c - step).

    Args:
        target: entropy to keep, in nats a token.
        step: change of c for each rollout batch.
        initial: c before the first.
        kl_coef: see GRPO. All others: see PolicyObjective.

    Source: Skywork-OR1, arXiv 2505.22312, section on adaptive entropy control.
    """

    target: float = 0.2
    step: float = 0.005
    initial: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.target > 0, "target", self.target, "positive", "it is an entropy in nats a token")
        check(self.step > 0, "step", self.step, "positive", "the coefficient would never move")
        check_weight(self.initial, "initial")

    @property
    def needs_entropy(self) -> bool:
        """Always: the bonus may start to act at any step."""
        return True

    def initial_state(self) -> dict[str, float]:
        """Return c before the first rollout batch."""
        return {"entropy_coef": self.initial}

    def next_state(self, state: Mapping[str, float], stats: TokenStats) -> dict[str, float]:
        """Move c by what the whole rollout batch shows."""
        move = self.step if mean_entropy(stats) < self.target else -self.step
        return {"entropy_coef": max(0.0, state["entropy_coef"] + move)}

    def plan(self, stats: TokenStats) -> TokenPlan:
        """Give every counted token the bonus of the state, if entropy is short."""
        short = mean_entropy(stats) <= self.target
        return self.make_plan(stats, kl=self.kl_coef, entropy=stats.state["entropy_coef"] if short else 0.0)


def mean_entropy(stats: TokenStats) -> float:
    """Return the mean entropy over the counted tokens, in nats, summed in canonical order."""
    return float(stats.entropy.flatten()[stats.counted()].double().mean())
