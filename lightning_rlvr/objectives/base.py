"""What the objectives share: the loss of a plan, and its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_rlvr.objectives.checks import check, check_choice
from lightning_rlvr.objectives.surrogates import Clipped, Surrogate
from lightning_rlvr.ops.kl import KL_ESTIMATORS, kl_k3
from lightning_rlvr.ops.reduce import Aggregation, token_weights
from lightning_rlvr.types import Objective, ObjectiveOutput, Ratio, TokenBatch, TokenPlan, TokenStats

KLGradient = Literal["k1", "k2", "k3", "full"]
KLTarget = Literal["reference", "old"]


@dataclass(frozen=True)
class PolicyObjective(Objective):
    """A surrogate and up to three penalties, each with one weight per token.

    The loss of an optimizer step is the sum over its tokens of

        weight_t * ( surrogate_t + kl_weight_t * KL_t + drift_weight_t * |log r_t| - entropy_weight_t * H_t )

    with weights from the plan; the surrogate runs over `policy_mask` only. A subclass says in `plan` what the
    weights are. Everything but the plan is chosen here, so any selection of tokens goes with any surrogate,
    estimator and aggregation.

    Args:
        surrogate: the policy term.
        aggregation: how token losses become one number (ops.reduce).
        fixed_length: the tokens that `fixed_length` aggregation divides by.
        scale_by_std: whether a group's advantages are divided by its standard deviation.
        kl_estimator: which estimate of the KL gives the gradient: k1, k2, k3 of the sampled token (ops.kl), or `full`,
            the exact KL over the vocabulary. The value in the logs is always k3.
        kl_to: the policy that the KL holds on to: the frozen `reference`, or the `old` one that sampled.
    """

    surrogate: Surrogate = field(default_factory=Clipped)
    aggregation: Aggregation = "sequence_mean"
    fixed_length: int | None = None
    scale_by_std: bool = True
    kl_estimator: KLGradient = "k3"
    kl_to: KLTarget = "reference"

    def __post_init__(self) -> None:
        check_choice(self.aggregation, "aggregation", Aggregation)
        check_choice(self.kl_estimator, "kl_estimator", KLGradient)
        check_choice(self.kl_to, "kl_to", KLTarget)
        fixed = self.aggregation == "fixed_length"
        check(
            (self.fixed_length or 0) >= 1 if fixed else self.fixed_length is None,
            "fixed_length",
            self.fixed_length,
            "a positive number of tokens with aggregation fixed_length, and not given without it",
            "token losses are divided by it",
        )
        check(
            (self.kl_estimator, self.kl_to) != ("full", "old"),
            "kl_estimator",
            self.kl_estimator,
            "k1, k2 or k3 with kl_to old",
            "the whole distribution of the old policy is not kept",
        )

    @property
    def uses_kl(self) -> bool:
        """Whether a plan can give any token a KL weight."""
        return False

    @property
    def needs_reference(self) -> bool:
        """Whether the KL is to the frozen reference."""
        return self.uses_kl and self.kl_to == "reference"

    @property
    def needs_full_kl(self) -> bool:
        """Whether the KL is summed over the vocabulary."""
        return self.uses_kl and self.kl_estimator == "full"

    def inert(self, updates_per_rollout: int) -> list[str]:
        """Say if a KL to the old policy cannot act."""
        if updates_per_rollout > 1 or not self.uses_kl or self.kl_to == "reference" or self.kl_estimator == "k1":
            return []
        return [
            f"the {self.kl_estimator} KL to the old policy has no gradient where the policy is the old one, and with "
            "model.updates_per_rollout 1 every gradient is taken there: it does nothing. Set model.updates_per_rollout "
            "to 2 or more, or model.objective.init_args.kl_to to reference."
        ]

    def make_plan(
        self,
        stats: TokenStats,
        *,
        advantage: Tensor | None = None,
        kept: Tensor | None = None,
        kl: Tensor | float | None = None,
        drift: Tensor | None = None,
        entropy: float | None = None,
        classes: Mapping[str, Tensor] | None = None,
    ) -> TokenPlan:
        """Return a plan from what a subclass decided; by default every counted token takes part alike.

        `kept` are the tokens of the policy gradient, which then also are the denominators: the others have no part in
        any term.
        """
        like = stats.logp
        if advantage is None:
            advantage = stats.token_advantage()
        kept = stats.mask if kept is None else kept & stats.mask

        def weights(value: Tensor | float) -> Tensor:
            spread = value if isinstance(value, Tensor) else torch.full_like(like, value)
            return fill(spread.to(like.dtype), kept)

        return TokenPlan(
            advantage=fill(advantage, kept).to(like.dtype),
            weight=token_weights(kept, stats.update, self.aggregation, self.fixed_length).to(like.dtype),
            kl_weight=weights(0.0 if kl is None else kl),
            policy_mask=kept,
            drift_weight=None if drift is None else weights(drift),
            entropy_weight=None if entropy is None else weights(entropy),
            classes=dict(classes or {}),
        )

    def loss(self, tokens: TokenBatch, plan: TokenPlan) -> ObjectiveOutput:
        """Sum the surrogate and the penalties over the rows at hand, by the plan's weights."""
        logp, old_logp = fill(tokens.logp, tokens.mask), fill(tokens.old_logp, tokens.mask)
        term = self.surrogate(logp, old_logp, plan.advantage, tokens.mask)
        clipped = term.clipped & plan.policy_mask
        policy = torch.where(plan.policy_mask, term.loss, 0.0) * plan.weight
        metrics = {
            "clip_fraction": Ratio(clipped.sum(), tokens.mask.sum()),
            "kl/old": masked_ratio(kl_k3(old_logp, logp.detach()), tokens.mask),
            "grad_share/policy": gradient_share(policy, tokens.logp, tokens.mask),
        }
        loss = policy.sum()
        for name, (penalty, source) in self._penalties(tokens, plan, logp, old_logp).items():
            loss = loss + penalty.sum()
            metrics[f"grad_share/{name}"] = gradient_share(penalty, source, tokens.mask)
        if self.uses_kl:
            value = kl_k3(logp.detach(), self._kl_target(tokens, old_logp))
            metrics["kl/all"] = masked_ratio(value, tokens.mask)
            metrics |= {f"kl/{name}": masked_ratio(value, chosen) for name, chosen in plan.classes.items()}
        return ObjectiveOutput(loss, metrics, clipped)

    def _penalties(
        self, tokens: TokenBatch, plan: TokenPlan, logp: Tensor, old_logp: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return by name the weighted penalty of each token, and the tensor through which it pulls."""
        penalties = {}
        if self.needs_full_kl:
            full_kl = given(tokens.full_kl, "full_kl", "the exact KL of each token")
            held = full_kl.masked_fill(plan.kl_weight == 0, 0.0)
            penalties["kl"] = (held * plan.kl_weight * plan.weight, full_kl)
        elif self.uses_kl:
            # A token without a KL weight adds nothing, also where its estimate would overflow.
            target = torch.where(plan.kl_weight == 0, logp.detach(), self._kl_target(tokens, old_logp))
            estimate = KL_ESTIMATORS[self.kl_estimator](logp, target)
            penalties["kl"] = (estimate * plan.kl_weight * plan.weight, tokens.logp)
        if plan.drift_weight is not None:
            penalties["drift"] = ((logp - old_logp).abs() * plan.drift_weight * plan.weight, tokens.logp)
        if plan.entropy_weight is not None:
            entropy = given(tokens.entropy, "entropy", "the entropy of each token, with its gradient")
            penalties["entropy"] = (-fill(entropy, tokens.mask) * plan.entropy_weight * plan.weight, entropy)
        return penalties

    def _kl_target(self, tokens: TokenBatch, old_logp: Tensor) -> Tensor:
        if self.kl_to == "old":
            return old_logp
        return fill(given(tokens.ref_logp, "ref_logp", "the reference's log-probabilities"), tokens.mask)


def given(values: Tensor | None, name: str, meaning: str) -> Tensor:
    """Return `values`. Raises: ValueError if they were not given."""
    if values is None:
        raise ValueError(f"this objective needs {name}, {meaning}")
    return values


def fill(values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Put 0 where a token does not count: what padding holds, nan and inf too, must not matter."""
    return values.masked_fill(~mask, 0.0)


def masked_ratio(values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Ratio:
    """Return the sum and the number of the masked values."""
    return Ratio(fill(values, mask).sum().detach(), mask.sum())


def gradient_share(term: Float[Tensor, "N T"], source: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Ratio:
    """Count the tokens that get a non-zero gradient from `term` through `source`, of all counted tokens.

    Measured by differentiating, not by reading coefficients: a penalty at its minimum has weight but pulls
    nothing.
    """
    if not term.requires_grad:
        return Ratio(torch.zeros((), device=term.device), mask.sum())
    (gradient,) = torch.autograd.grad(term.sum(), source, retain_graph=True)
    return Ratio((fill(gradient, mask) != 0).sum(), mask.sum())
