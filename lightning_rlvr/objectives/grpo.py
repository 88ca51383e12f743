"""Group Relative Policy Optimization."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_rlvr.objectives.base import ClippedObjective, check
from lightning_rlvr.types import TokenPlan, TokenStats


@dataclass(frozen=True)
class GRPO(ClippedObjective):
    """GRPO: the clipped surrogate on group advantages, with an optional KL penalty on every token.

    J = E[ 1/G sum_i 1/|o_i| sum_t ( min(r_t A_i, clip(r_t, 1 - clip_low, 1 + clip_high) A_i) - kl_coef KL_t ) ]

    Args:
        kl_coef: weight of the KL to the reference, on every token; 0 turns it off and loads no reference.
        clip_low, clip_high, kl_estimator, aggregation, fixed_length, scale_by_std: see ClippedObjective.

    Source: arXiv 2402.03300.
    """

    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.kl_coef >= 0,
            "kl_coef",
            self.kl_coef,
            "0 or more",
            "it weighs the KL penalty to the reference",
        )

    @property
    def needs_reference(self) -> bool:
        """Whether there is a KL penalty."""
        return self.kl_coef > 0

    def plan(self, stats: TokenStats) -> TokenPlan:
        """Give every counted token its row's advantage and the same KL weight."""
        return self.base_plan(stats, torch.full_like(stats.logp, self.kl_coef), {})
