"""What the objectives share: the loss of a plan, its checks and its metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_rlvr.ops.kl import KL_ESTIMATORS, KLEstimator, kl_k3
from lightning_rlvr.ops.reduce import Aggregation, token_weights
from lightning_rlvr.ops.surrogate import clipped_surrogate
from lightning_rlvr.types import (
    Objective,
    ObjectiveOutput,
    Ratio,
    TokenBatch,
    TokenPlan,
    TokenStats,
    UserError,
)


@dataclass(frozen=True)
class ClippedObjective(Objective):
    """A clipped surrogate plus a KL penalty to the reference with one weight per token.

    The loss is sum_t weight_t * (surrogate_t + kl_weight_t * KL_t) with the weights of the plan. A subclass
    says in `plan` what the KL weights are.

    Args:
        clip_low: the ratio of probabilities is bounded from below by 1 - clip_low.
        clip_high: and from above by 1 + clip_high.
        kl_estimator: which estimate of the KL gives the gradient (ops.kl); the value in the logs is always k3.
        aggregation: how token losses become one number (ops.reduce).
        fixed_length: the tokens that `fixed_length` aggregation divides by.
        scale_by_std: whether a group's advantages are divided by its standard deviation.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_estimator: KLEstimator = "k3"
    aggregation: Aggregation = "sequence_mean"
    fixed_length: int | None = None
    scale_by_std: bool = True

    def __post_init__(self) -> None:
        check_choice(self.kl_estimator, "kl_estimator", KLEstimator)
        check_choice(self.aggregation, "aggregation", Aggregation)
        check(
            0 < self.clip_low < 1,
            "clip_low",
            self.clip_low,
            "in (0, 1)",
            "the lower bound of the ratio is 1 - clip_low",
        )
        check(
            self.clip_high > 0,
            "clip_high",
            self.clip_high,
            "positive",
            "the upper bound of the ratio is 1 + clip_high",
        )
        fixed = self.aggregation == "fixed_length"
        check(
            (self.fixed_length or 0) >= 1 if fixed else self.fixed_length is None,
            "fixed_length",
            self.fixed_length,
            "a positive number of tokens with aggregation fixed_length, and not given without it",
            "token losses are divided by it",
        )

    def base_plan(self, stats: TokenStats, kl_weight: Tensor, classes: dict[str, Tensor]) -> TokenPlan:
        """Return a plan in which every counted token takes part, with the given KL weights and classes."""
        dtype = stats.logp.dtype
        return TokenPlan(
            advantage=stats.token_advantage().masked_fill(~stats.mask, 0.0),
            weight=token_weights(stats.mask, stats.update, self.aggregation, self.fixed_length).to(dtype),
            kl_weight=fill(kl_weight.to(dtype), stats.mask),
            policy_mask=stats.mask,
            classes=classes,
        )

    def loss(self, tokens: TokenBatch, plan: TokenPlan) -> ObjectiveOutput:
        """Sum weight * (clipped surrogate + kl_weight * KL to the reference) over the rows at hand."""
        logp = fill(tokens.logp, tokens.mask)
        old_logp = fill(tokens.old_logp, tokens.mask)
        surrogate = clipped_surrogate(logp, old_logp, plan.advantage, self.clip_low, self.clip_high)
        policy = surrogate.loss * plan.policy_mask * plan.weight
        metrics = {
            "clip_fraction": Ratio((surrogate.clipped & plan.policy_mask).sum(), tokens.mask.sum()),
            "kl/old": masked_ratio(kl_k3(old_logp, logp.detach()), tokens.mask),
            "grad_share/policy": gradient_share(policy, tokens),
        }
        if not self.needs_reference:
            return ObjectiveOutput(policy.sum(), metrics)
        if tokens.ref_logp is None:
            raise ValueError("this objective has a KL penalty: it needs ref_logp, the reference's log-probabilities")
        ref_logp = fill(tokens.ref_logp, tokens.mask)
        # A token without a KL weight adds nothing, also where its estimate would overflow.
        held = torch.where(plan.kl_weight == 0, logp.detach(), ref_logp)
        penalty = KL_ESTIMATORS[self.kl_estimator](logp, held) * plan.kl_weight * plan.weight
        value = kl_k3(logp.detach(), ref_logp)
        metrics["kl/all"] = masked_ratio(value, tokens.mask)
        metrics |= {f"kl/{name}": masked_ratio(value, chosen) for name, chosen in plan.classes.items()}
        metrics["grad_share/kl"] = gradient_share(penalty, tokens)
        return ObjectiveOutput((policy + penalty).sum(), metrics)


def check(ok: bool, key: str, value: object, rule: str, meaning: str) -> None:
    """Raise UserError unless `ok`: the constraint, the value, what it means, the key to change."""
    if not ok:
        raise UserError(f"{key} must be {rule}, got {value}: {meaning}. Set model.objective.init_args.{key}.")


def check_choice(value: str, key: str, choices: object) -> None:
    """Raise UserError unless `value` is one of the choices of a Literal type."""
    check(value in get_args(choices), key, value, f"one of {', '.join(get_args(choices))}", "no other is known")


def fill(values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Put 0 where a token does not count: what padding holds, nan and inf too, must not matter."""
    return values.masked_fill(~mask, 0.0)


def masked_ratio(values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Ratio:
    """Return the sum and the number of the masked values."""
    return Ratio(fill(values, mask).sum().detach(), mask.sum())


def gradient_share(term: Float[Tensor, "N T"], tokens: TokenBatch) -> Ratio:
    """Count the tokens whose log-probability gets a non-zero gradient from `term`, of all counted tokens.

    Measured by differentiating, not by reading the coefficients: a penalty at its minimum has weight but pulls
    nothing.
    """
    if not term.requires_grad:
        return Ratio(torch.zeros((), device=term.device), tokens.mask.sum())
    (gradient,) = torch.autograd.grad(term.sum(), tokens.logp, retain_graph=True)
    return Ratio((fill(gradient, tokens.mask) != 0).sum(), tokens.mask.sum())
