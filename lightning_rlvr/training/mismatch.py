"""Another program than the one that trains has sampled: how far its log-probabilities are off, and what is done."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_rlvr.ops.importance import truncated_importance
from lightning_rlvr.training.distributed import reduce_ratios
from lightning_rlvr.types import Ratio, Rollouts, TokenPlan, TokenStats, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORST = 5  # tokens named in an error


def check_agreement(
    rollouts: Rollouts, logp: Float[Tensor, "N T"], tolerance: float, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Compare the log-probabilities that were recorded while sampling with those of the training pass.

    Raises: UserError, on all ranks, if they differ by more than `tolerance` nats on average over all ranks; it names
        the tokens of this one that are furthest off.
    """
    gap = (logp - rollouts.logp).abs().nan_to_num(torch.inf).masked_fill(~rollouts.mask, 0.0)
    mean = reduce_ratios({"gap": Ratio(gap.sum(), rollouts.mask.sum())})["gap"]
    if mean <= tolerance:
        return
    width = gap.shape[1]
    worst = gap.flatten().topk(min(WORST, int(rollouts.mask.sum()))).indices.tolist()
    named = "; ".join(
        f"token {at % width + 1} of response {at // width + 1}, "
        f"{tokenizer.decode([int(rollouts.response_ids.flatten()[at])])!r}: "
        f"{float(rollouts.logp.flatten()[at]):.3f} sampled, {float(logp.flatten()[at]):.3f} trained"
        for at in worst
    )
    raise UserError(
        f"the log-probabilities of vLLM must lie within {tolerance} nats of the training pass's on average, but are "
        f"{mean:.3g} away, so it does not sample from the policy. Furthest off: {named}. Set dtype or tolerance of "
        "model.vllm, or model.vllm to null."
    )


def corrected(
    rollouts: Rollouts, stats: TokenStats, plan: TokenPlan, most: float | None
) -> tuple[TokenPlan, dict[str, Ratio]]:
    """Return the plan with each advantage times its truncated importance weight, and the metrics of the mismatch.

    `gap` is the mean |log pi - log mu| of the tokens, `kl` the estimate of KL(mu || pi) from them, both in nats; of the
    weights their mean, and the share that was truncated. KL, drift and entropy terms are not weighted: they hold of the
    tokens as they are.
    """
    mask, tokens = stats.mask, stats.mask.sum()
    log_ratio = (stats.logp - rollouts.logp).masked_fill(~mask, 0.0)
    metrics = {"sampler/gap": Ratio(log_ratio.abs().sum(), tokens), "sampler/kl": Ratio(-log_ratio.sum(), tokens)}
    if most is None:
        return plan, metrics
    weight = truncated_importance(stats.logp, rollouts.logp, mask, most)
    metrics["sampler/importance"] = Ratio(weight.sum(), tokens)
    metrics["sampler/truncated"] = Ratio((log_ratio.exp() > most).sum(), tokens)
    return replace(plan, advantage=plan.advantage * weight), metrics
