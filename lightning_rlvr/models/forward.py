"""The training pass: log-probabilities of given responses under a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_rlvr.ops.logprob import entropy, log_softmax, token_logp
from lightning_rlvr.types import Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TokenValues(NamedTuple):
    """Values of each response token, in nats; 0 where no token counts. `entropy` is detached."""

    logp: Float[Tensor, "N T"]
    entropy: Float[Tensor, "N T"] | None


def response_logp(
    model: PreTrainedModel, rollouts: Rollouts, temperature: float, with_entropy: bool = False
) -> TokenValues:
    """Return the log-probability of each response token, and on request the entropy it was drawn from.

    Both are of the whole vocabulary's distribution at `temperature`. Columns in which all rows are padded are
    cut away before the pass and put back after it, so the result does not depend on how wide the batch was padded.
    """
    width = rollouts.mask.shape[1]
    start = int(rollouts.prompt_mask.any(dim=0).int().argmax())
    length = int(rollouts.mask.any(dim=0).sum())
    mask = rollouts.mask[:, :length]
    response = rollouts.response_ids[:, :length]
    ids = torch.cat([rollouts.prompt_ids[:, start:], response], dim=1)
    seen = torch.cat([rollouts.prompt_mask[:, start:], mask], dim=1)
    positions = (seen.long().cumsum(dim=1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids,
        attention_mask=seen.long(),
        position_ids=positions,
        use_cache=False,
        logits_to_keep=length + 1,
    ).logits[:, :-1]  # [N, length, V]: position t predicts response token t

    logp = log_softmax(logits, temperature)
    values = [token_logp(logp, response)]
    if with_entropy:
        values.append(entropy(logp.detach()))
    padded = [torch.nn.functional.pad(v.masked_fill(~mask, 0.0), (0, width - length)) for v in values]
    return TokenValues(padded[0], padded[1] if with_entropy else None)
