"""The policy gradient of high-entropy tokens only ("w/ Mask")."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_rlvr.objectives.checks import check
from lightning_rlvr.objectives.grpo import GRPO
from lightning_rlvr.objectives.surrogates import check_token_surrogate
from lightning_rlvr.ops.selection import highest, share_count
from lightning_rlvr.types import TokenPlan, TokenStats


@dataclass(frozen=True)
class HighEntropyMask(GRPO):
    """GRPO on the share `fraction` of tokens with the highest entropy in the rollout batch.

    Denominators count the kept tokens only, and so does a KL penalty if there is one.

    Args:
        fraction: share of tokens that are kept; 1 is GRPO.
        kl_coef: see GRPO. All others: see PolicyObjective.

    Source: arXiv 2506.01939.
    """

    fraction: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.fraction <= 1, "fraction", self.fraction, "in (0, 1]", "it is the share of tokens that train")
        check_token_surrogate(self.surrogate)

    def plan(self, stats: TokenStats) -> TokenPlan:
        """Keep the tokens of highest entropy."""
        counted = stats.counted()
        entropy = stats.entropy.flatten()[counted]
        kept = stats.spread(highest(entropy, share_count(self.fraction, len(entropy))))
        return self.make_plan(stats, kept=kept, kl=self.kl_coef, classes={"kept": kept})
