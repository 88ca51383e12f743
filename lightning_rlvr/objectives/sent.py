"""SENT: a KL penalty on low-entropy tokens, stronger where log-probability and advantage go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_rlvr.objectives.base import ClippedObjective, check, check_choice
from lightning_rlvr.ops.covariance import token_covariance
from lightning_rlvr.ops.selection import highest, lowest, share_count
from lightning_rlvr.types import TokenPlan, TokenStats

CovarianceScope = Literal["all", "low_entropy"]


@dataclass(frozen=True)
class SENT(ClippedObjective):
    """SENT's selective token-level KL on top of the clipped surrogate.

    J = E[ 1/G sum_i 1/|o_i| sum_t ( min(r_t A_i, clip(r_t, 1 - clip_low, 1 + clip_high) A_i) - beta_t KL_t ) ]

    with beta_t = beta_high on T_high, beta_low on the rest of T_low, and 0 elsewhere, where over the whole
    rollout batch T_low holds the share `low_entropy_quantile` of tokens with the lowest entropy, and T_high
    the share `high_cov_fraction` of T_low with the highest covariance
    Cov_t = (log pi(o_t) - mean log pi) (A_t - mean A). Shares are exact counts, rounded up; ties go by row id
    and position. The class `low` of the metrics is the whole of T_low, `high` included.

    Args:
        low_entropy_quantile: share of all counted tokens that make up T_low, in [0, 1].
        high_cov_fraction: share of T_low that makes up T_high, in [0, 1]. The release uses 0.0002.
        beta_low: KL weight on T_low without T_high.
        beta_high: KL weight on T_high, at least beta_low.
        covariance_scope: the tokens over which the covariance's means run: `all` counted tokens (the paper)
            or `low_entropy` ones only (what the release intends).
        clip_low, clip_high, kl_estimator, aggregation, fixed_length, scale_by_std: see ClippedObjective.

    Source: arXiv 2512.04359.
    """

    low_entropy_quantile: float = 0.8
    high_cov_fraction: float = 0.0002
    beta_low: float = 0.05
    beta_high: float = 0.2
    covariance_scope: CovarianceScope = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.covariance_scope, "covariance_scope", CovarianceScope)
        for key in ("low_entropy_quantile", "high_cov_fraction"):
            value = getattr(self, key)
            check(0 <= value <= 1, key, value, "in [0, 1]", "it is a share of tokens")
        check(self.beta_low >= 0, "beta_low", self.beta_low, "0 or more", "it weighs a penalty")
        check(
            self.beta_high >= self.beta_low,
            "beta_high",
            self.beta_high,
            f"at least beta_low ({self.beta_low})",
            "tokens of high covariance are held more strongly",
        )

    @property
    def needs_reference(self) -> bool:
        """Whether any token can get a KL weight."""
        return self.beta_high > 0 and self.low_entropy_quantile > 0

    def plan(self, stats: TokenStats) -> TokenPlan:
        """Choose T_low by entropy, T_high within it by covariance, over the whole rollout batch."""
        counted = stats.counted()
        logp = stats.logp.flatten()[counted]
        entropy = stats.entropy.flatten()[counted]
        advantage = stats.token_advantage().flatten()[counted]

        low = lowest(entropy, share_count(self.low_entropy_quantile, len(entropy)))
        scope = low if self.covariance_scope == "low_entropy" else None
        covariance = token_covariance(logp, advantage, scope)
        high = torch.zeros_like(low)
        high[low] = highest(covariance[low], share_count(self.high_cov_fraction, int(low.sum())))

        def spread(values: Tensor) -> Tensor:
            flat = values.new_zeros(stats.mask.numel())
            flat[counted] = values
            return flat.view(stats.mask.shape)

        classes = {"low": spread(low), "high": spread(high)}
        beta = stats.logp.new_tensor([0.0, self.beta_low, self.beta_high])
        kl_weight = beta[classes["low"].long() + classes["high"].long()]
        return self.base_plan(stats, kl_weight, classes)
