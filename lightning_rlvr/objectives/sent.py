"""SENT: a KL penalty on low-entropy tokens, stronger where log-probability and advantage go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_rlvr.objectives.base import PolicyObjective
from lightning_rlvr.objectives.checks import check, check_choice, check_share, check_weight
from lightning_rlvr.objectives.covariance import drift_inert
from lightning_rlvr.objectives.surrogates import Clipped, Unclipped
from lightning_rlvr.ops.covariance import token_covariance
from lightning_rlvr.ops.selection import highest, lowest, share_count
from lightning_rlvr.types import TokenPlan, TokenStats

CovarianceScope = Literal["all", "low_entropy"]
Variant = Literal["paper", "release"]


@dataclass(frozen=True)
class SENT(PolicyObjective):
    """SENT's selective token-level KL.

    J = E[ 1/G sum_i 1/|o_i| sum_t ( min(r_t A_i, clip(r_t, 1 - low, 1 + high) A_i) - beta_t KL_t ) ]

    with beta_t = beta_high on T_high, beta_low on the rest of T_low, and 0 elsewhere, where over the whole
    rollout batch T_low holds the share `low_entropy_quantile` of tokens with the lowest entropy, and T_high
    the share `high_cov_fraction` of T_low with the highest covariance
    Cov_t = (log pi(o_t) - mean log pi) (A_t - mean A). Shares are exact counts, rounded up; ties go by row id
    and position. The class `low` of the metrics is the whole of T_low, `high` included.

    The authors' released code computes another loss under the same name; `variant="release"` is that, as it was
    meant: the penalty is |log r| to the old policy, beta_high on the top `high_cov_fraction` of T_low by covariance and
    beta_low on the *bottom* `high_cov_fraction` (class `bottom`), nothing on the rest; the surrogate is unclipped,
    aggregation token_mean, covariance means over T_low; and release_kl_coef * KL to the reference on every token.

    Args:
        low_entropy_quantile: share of all counted tokens that make up T_low, in [0, 1].
        high_cov_fraction: share of T_low that makes up T_high, in [0, 1]. The release uses 0.0002.
        beta_low: KL weight on T_low without T_high; 0 leaves the penalty to T_high alone.
        beta_high: KL weight on T_high, at least beta_low.
        covariance_scope: the tokens over which the covariance's means run: `all` counted tokens (the paper)
            or `low_entropy` ones only (what the release intends).
        variant: the `paper`'s loss or the `release`'s.
        release_kl_coef: weight of the KL on every token, of the release only.
        surrogate, aggregation, fixed_length, scale_by_std, kl_estimator, kl_to: see PolicyObjective.

    Source: arXiv 2512.04359.
    """

    low_entropy_quantile: float = 0.8
    high_cov_fraction: float = 0.0002
    beta_low: float = 0.05
    beta_high: float = 0.2
    covariance_scope: CovarianceScope = "all"
    variant: Variant = "paper"
    release_kl_coef: float = 0.001

    def __post_init__(self) -> None:
        check_choice(self.variant, "variant", Variant)
        if self.variant == "release":
            self._fix("surrogate", Clipped(), Unclipped())
            self._fix("aggregation", "sequence_mean", "token_mean")
            self._fix("covariance_scope", "all", "low_entropy")
        super().__post_init__()
        check_choice(self.covariance_scope, "covariance_scope", CovarianceScope)
        check_share(self.low_entropy_quantile, "low_entropy_quantile")
        check_share(self.high_cov_fraction, "high_cov_fraction")
        check_weight(self.beta_low, "beta_low")
        check_weight(self.beta_high, "beta_high")
        check_weight(self.release_kl_coef, "release_kl_coef")
        rule, meaning = f"at least beta_low ({self.beta_low})", "tokens of high covariance are held more strongly"
        check(self.beta_high >= self.beta_low, "beta_high", self.beta_high, rule, meaning)

    def _fix(self, key: str, default: object, value: object) -> None:
        """Set what the release fixes; another choice of the user's is refused, not overruled."""
        current = getattr(self, key)
        check(current in (default, value), key, current, f"{value} with variant release", "the release fixes it")
        object.__setattr__(self, key, value)

    @property
    def uses_kl(self) -> bool:
        """Whether any token can get a KL weight."""
        if self.variant == "release":
            return self.release_kl_coef > 0
        reached = self.beta_low > 0 or (self.beta_high > 0 and self.high_cov_fraction > 0)
        return reached and self.holds_tokens

    @property
    def holds_tokens(self) -> bool:
        """Whether the penalised set is more than empty."""
        return self.low_entropy_quantile > 0

    def inert(self, updates_per_rollout: int) -> list[str]:
        """Say which terms cannot act."""
        elsewhere = super().inert(updates_per_rollout)
        if self.variant == "release":
            reached = self.beta_high > 0 and self.high_cov_fraction > 0 and self.holds_tokens
            keys = "beta_high, high_cov_fraction and low_entropy_quantile"
            return drift_inert(reached, keys, updates_per_rollout) + elsewhere
        if not self.uses_kl:
            return [
                f"the selective KL of {type(self).__name__} reaches no token: set model.objective.init_args.beta_low "
                "or .beta_high (with a positive high_cov_fraction), and a low_entropy_quantile that leaves it tokens."
            ]
        return elsewhere

    def plan(self, stats: TokenStats) -> TokenPlan:
        """Choose T_low by entropy, T_high within it by covariance, over the whole rollout batch."""
        counted = stats.counted()
        chosen = self.choose(stats.entropy.flatten()[counted])
        scope = chosen if self.covariance_scope == "low_entropy" else None
        advantage = stats.token_advantage().flatten()[counted]
        covariance = token_covariance(stats.logp.flatten()[counted], advantage, scope)[chosen]
        count = share_count(self.high_cov_fraction, len(covariance))
        low, high = stats.spread(chosen), stats.spread(_within(chosen, highest(covariance, count)))
        if self.variant == "paper":
            beta = stats.logp.new_tensor([0.0, self.beta_low, self.beta_high])[low.long() + high.long()]
            return self.make_plan(stats, kl=beta, classes={"low": low, "high": high})
        bottom = stats.spread(_within(chosen, lowest(covariance, count)))
        drift = torch.zeros_like(stats.logp).masked_fill(bottom, self.beta_low).masked_fill(high, self.beta_high)
        classes = {"low": low, "high": high, "bottom": bottom}
        return self.make_plan(stats, kl=self.release_kl_coef, drift=drift, classes=classes)

    def choose(self, entropy: Float[Tensor, " K"]) -> Bool[Tensor, " K"]:
        """Return T_low among the counted tokens, in their order."""
        return lowest(entropy, share_count(self.low_entropy_quantile, len(entropy)))


@dataclass(frozen=True)
class HighEntropyKL(SENT):
    """SENT's selective KL on the *high*-entropy tokens instead ("w/ High_En").

    T_low is replaced by its complement: the tokens outside the lowest `low_entropy_quantile`. The paper's table
    has this column and no public text defines it; this is our reading. The metrics call the set `low` as in SENT.

    Args:
        low_entropy_quantile: share of tokens that are left alone; the others are held.
        All others: see SENT.

    Source: arXiv 2512.04359, its table of results.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.variant == "paper", "variant", self.variant, "paper", "the release has no such column")

    @property
    def holds_tokens(self) -> bool:
        """Whether the penalised set is more than empty."""
        return self.low_entropy_quantile < 1

    def choose(self, entropy: Float[Tensor, " K"]) -> Bool[Tensor, " K"]:
        """Return the tokens outside T_low."""
        return ~super().choose(entropy)


def _within(chosen: Tensor, picked: Tensor) -> Tensor:
    """Return `picked`, a choice among the chosen tokens, as a choice among all."""
    result = torch.zeros_like(chosen)
    result[chosen] = picked
    return result
