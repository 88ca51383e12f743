"""The training pass: log-probabilities of given responses under a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from lightning_rlvr.ops.kl import kl_full
from lightning_rlvr.ops.logprob import entropy, log_softmax, token_logp
from lightning_rlvr.types import Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TokenValues(NamedTuple):
    """Values of each response token, in nats, 0 where no token counts; those not asked for are None."""

    logp: Float[Tensor, "N T"]
    entropy: Float[Tensor, "N T"] | None
    full_kl: Float[Tensor, "N T"] | None


def response_logp(
    model: PreTrainedModel,
    rollouts: Rollouts,
    temperature: float,
    with_entropy: bool = False,
    reference: PreTrainedModel | None = None,
) -> TokenValues:
    """Return the log-probability of each response token, and on request the entropy it was drawn from.

    With a `reference`, also the exact KL of the model's distribution to the reference's, over the vocabulary. All are
    of the whole vocabulary's distribution at `temperature` and carry gradients of the model where those are on.
    Columns in which all rows are padded are cut away before the pass and put back after it, so the result does not
    depend on how wide the batch was padded.
    """
    width = rollouts.mask.shape[1]
    length = int(rollouts.mask.any(dim=0).sum())
    mask, response = rollouts.mask[:, :length], rollouts.response_ids[:, :length]

    def padded(values: Tensor) -> Tensor:
        return pad(values.masked_fill(~mask, 0.0), (0, width - length))

    logp = _vocabulary_logp(model, rollouts, length, temperature)  # [N, length, V]
    full_kl = None
    if reference is not None:
        with torch.no_grad():
            ref_logp = _vocabulary_logp(reference, rollouts, length, temperature)
        full_kl = padded(kl_full(logp, ref_logp))
    return TokenValues(
        logp=padded(token_logp(logp, response)),
        entropy=padded(entropy(logp)) if with_entropy else None,
        full_kl=full_kl,
    )


def _vocabulary_logp(model: PreTrainedModel, rollouts: Rollouts, length: int, temperature: float) -> Tensor:
    start = int(rollouts.prompt_mask.any(dim=0).int().argmax())
    ids = torch.cat([rollouts.prompt_ids[:, start:], rollouts.response_ids[:, :length]], dim=1)
    seen = torch.cat([rollouts.prompt_mask[:, start:], rollouts.mask[:, :length]], dim=1)
    positions = (seen.long().cumsum(dim=1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids,
        attention_mask=seen.long(),
        position_ids=positions,
        use_cache=False,
        logits_to_keep=length + 1,
    ).logits[:, :-1]  # position t predicts response token t
    return log_softmax(logits, temperature)
