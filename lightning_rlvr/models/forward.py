"""The training pass: log-probabilities of given responses under a model, and losses of them.

Four ways lead to the same values. The flat one computes what counts: each prompt once for all its responses, and the
vocabulary of counted tokens only, chunk by chunk. It takes a model whose logits are a linear layer of its backbone's
last hidden states, and whose attention can be replaced. The packed one does the same for other attention, if responses
can go on from a prompt's cache, in several passes and with little padding. In the joined one a prompt is computed for
every response: with sharded weights or recomputed activations there can be no cache, and attention is the model's own
in the backward pass too. The plain one takes any model and holds the logits of all response positions; the exact KL
over the vocabulary needs them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from lightning_rlvr.models.attention import attends_plainly
from lightning_rlvr.models.lean import recomputes
from lightning_rlvr.models.packing import States, joined_states, packed_states, parts_of
from lightning_rlvr.ops.kl import kl_full
from lightning_rlvr.ops.linear_logprob import linear_logprob, linear_logprob_loss
from lightning_rlvr.ops.logprob import entropy, log_softmax, token_logp
from lightning_rlvr.types import Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How far both ways may lie apart on the probe, as a share of the largest log-probability: rounding, with room.
PROBE_TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.02}
PROBE_TOLERANCE_WIDE = 1e-3
WITHIN = "compute_within"  # method of a sharded model
T = TypeVar("T")
# Of the hidden states: where logits are large, a soft cap on them shows. After 1, the largest that the dtype holds.
PROBE_SCALES = (1.0, 1000.0, 100.0, 10.0)


class TokenValues(NamedTuple):
    """Values of each response token, in nats, 0 where no token counts; those not asked for are None."""

    logp: Float[Tensor, "N T"]
    entropy: Float[Tensor, "N T"] | None
    full_kl: Float[Tensor, "N T"] | None


# Values of some whole rows, and which rows -> their loss, a scalar. It must be additive over rows.
LossOf = Callable[[TokenValues, Int[Tensor, " n"]], Tensor]


def response_logp(
    model: PreTrainedModel,
    rollouts: Rollouts,
    temperature: float,
    with_entropy: bool = False,
    reference: PreTrainedModel | None = None,
) -> TokenValues:
    """Return the log-probability of each response token, and on request the entropy it was drawn from.

    With a `reference`, also the exact KL of the model's distribution to the reference's, over the vocabulary. All are
    of the whole vocabulary's distribution at `temperature` and carry gradients of the model where those are on. The
    result does not depend on how wide the batch was padded.
    """
    if reference is not None or not packs(model):
        return _plain(model, rollouts, temperature, with_entropy, reference)
    return _packed(model, rollouts, temperature, with_entropy)


@torch.no_grad()
def batch_logp(
    model: PreTrainedModel,
    rollouts: Rollouts,
    temperature: float,
    parts: Sequence[Int[Tensor, " m"]],
    with_entropy: bool = False,
) -> TokenValues:
    """Return `response_logp` of all rows without gradients, computed part by part; every row is in one part."""
    values = [response_logp(model, rollouts.rows(part), temperature, with_entropy) for part in parts]
    back = torch.cat(list(parts)).argsort()
    entropy = torch.cat([v.entropy for v in values if v.entropy is not None])[back] if with_entropy else None
    return TokenValues(torch.cat([v.logp for v in values])[back], entropy, None)


def response_loss(
    model: PreTrainedModel,
    rollouts: Rollouts,
    temperature: float,
    loss_of: LossOf,
    with_entropy: bool = False,
    reference: PreTrainedModel | None = None,
) -> Tensor:
    """Return the sum over the rows of a loss of their values, ready for one backward pass.

    `loss_of` is asked for some whole rows at a time, so that the gradient of the logits is formed while they are there:
    one pass over the vocabulary instead of the two that `response_logp` needs. Its values carry gradients only as far
    as the loss. All else is as for `response_logp`.
    """
    if reference is not None or not packs(model):
        every = torch.arange(len(rollouts.mask), device=rollouts.mask.device)
        return loss_of(_plain(model, rollouts, temperature, with_entropy, reference), every)

    def compute() -> Tensor:
        states, rows = _states(model, rollouts)
        mask = rollouts.mask[rows]

        def loss_of_part(logp: Tensor, entropy: Tensor | None, part: slice) -> Tensor:
            return loss_of(_spread(logp, entropy, mask[part]), rows[part])

        head, target = model.get_output_embeddings(), rollouts.response_ids[rows][mask]
        loss, _ = linear_logprob_loss(
            states, head.weight, target, mask.sum(dim=1), loss_of_part, temperature, head.bias, with_entropy
        )
        return loss

    return _within(model, compute)


def micro_batches(
    model: PreTrainedModel, rollouts: Rollouts, rows: Int[Tensor, " M"], size: int, full_kl: bool = False
) -> list[Int[Tensor, " m"]]:
    """Cut the given rows into parts for one pass each, of as many tokens as `size` rows of the greatest length have.

    Where prompts are not shared, padding is computed too, and a part is `size` rows of any length, the longest first.
    """
    if full_kl or not packs(model):
        return list(rows.split(size))
    if joins(model):
        return list(rows[rollouts.mask[rows].sum(dim=1).argsort(descending=True, stable=True)].split(size))
    return parts_of(rollouts, rows, size)


def sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of each weight, so that all of them must make the same passes."""
    return isinstance(model, FSDPModule) or _partitioned(model)


def joins(model: PreTrainedModel) -> bool:
    """Whether each prompt is computed with each of its responses: a cache cannot outlive its layer's pass."""
    return sharded(model) or recomputes(model)


def _partitioned(model: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO stage 3 holds the weights; it gathers a module's for the module's own forward only."""
    return hasattr(next(model.parameters()), "ds_id")


def packs(model: PreTrainedModel) -> bool:
    """Whether another way gives what the plain way gives: found out once for a model, on a few tokens."""
    if model not in _PACKS:
        reason = _probe(model)
        _PACKS[model] = reason is None
        if reason is not None:
            warnings.warn(
                f"{type(model).__name__} is trained the plain way, with the logits of all responses in memory and each "
                f"prompt computed for every response: {reason}.",
                stacklevel=2,
            )
    return _PACKS[model]


_PACKS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # what probes have found


@torch.no_grad()
def _probe(model: PreTrainedModel) -> str | None:
    """Compare the ways on two prompts with two responses each; return why only the plain one is to be taken."""
    if _partitioned(model):  # a look at the head's weight would gather it for the rest of the run
        return "ZeRO stage 3 holds its weights in parts"
    head, backbone = model.get_output_embeddings(), model.get_decoder()
    if type(head) is not nn.Linear or type(head.weight) not in (nn.Parameter, DTensor) or backbone is model:
        return "its output layer is not a plain linear layer on a backbone"
    generator = torch.Generator().manual_seed(0)
    prompts, responses = torch.randint(head.out_features, (2, 2, 4), generator=generator).to(model.device)
    place, length = torch.arange(4, device=model.device), torch.tensor([[4], [2]], device=model.device)
    none = torch.zeros(4, 4, device=model.device)
    batch = Rollouts(
        prompt_ids=prompts.repeat_interleave(2, dim=0),
        prompt_mask=(place >= 4 - length).repeat_interleave(2, dim=0),
        response_ids=responses.repeat(2, 1),
        mask=(place < length).repeat(2, 1),
        logp=none,
        entropy=none,
        truncated=none[:, 0].bool(),
    )
    if attends_plainly(model) and not joins(model):
        _FLAT.add(model)
        if _difference(model, batch) is None:
            return None
        _FLAT.remove(model)
    return _difference(model, batch)


_FLAT: WeakSet[nn.Module] = WeakSet()  # those that take the flat way


def _difference(model: PreTrainedModel, batch: Rollouts) -> str | None:
    """Compare the packed way with the plain one; return how they differ, if they do."""
    backbone = model.get_decoder()
    tolerance = PROBE_TOLERANCE.get(model.dtype, PROBE_TOLERANCE_WIDE)
    for scale in PROBE_SCALES:
        # With nothing to scale there is no hook: some ways compute layers themselves, but not of a model that has one.
        hook = backbone.register_forward_hook(partial(_scale_states, scale)) if scale > 1 else None
        try:
            with torch.autocast(model.device.type, enabled=False):
                plain, packed = (way(model, batch, 1.0, False).logp for way in (_plain, _packed))
        except Exception as error:  # noqa: BLE001 - a model may fail in any way at what it was not made for
            return f"the packed way fails with {error!r}"
        finally:
            if hook is not None:
                hook.remove()
        if scale > 1 and not plain.isfinite().all():
            continue
        if not (plain - packed).abs().max() <= tolerance * plain.abs().max():
            return "the packed way gives other log-probabilities"
        if scale > 1:
            break
    return None


def _scale_states(scale: float, backbone: nn.Module, args: Any, output: Any) -> Any:
    output.last_hidden_state = output.last_hidden_state * scale
    return output


def _packed(model: PreTrainedModel, rollouts: Rollouts, temperature: float, with_entropy: bool) -> TokenValues:
    def compute() -> TokenValues:
        states, rows = _states(model, rollouts)
        head, mask = model.get_output_embeddings(), rollouts.mask[rows]
        target = rollouts.response_ids[rows][mask]
        if torch.is_grad_enabled():
            values = linear_logprob(states, head.weight, target, temperature, head.bias, with_entropy)
        else:  # cut into the same chunks as in `response_loss`, so that a policy equals itself to the bit
            _, values = linear_logprob_loss(
                states, head.weight, target, mask.sum(dim=1), _no_loss, temperature, head.bias, with_entropy
            )
        logp, entropy, _ = _spread(values.logp, values.entropy, mask)
        back = rows.argsort()
        return TokenValues(logp[back], None if entropy is None else entropy[back], None)

    return _within(model, compute)


def _states(model: PreTrainedModel, rollouts: Rollouts) -> States:
    backbone = model.get_decoder()
    if joins(model):
        return joined_states(backbone, rollouts)
    if model in _FLAT:
        from lightning_rlvr.models.flat import flat_states

        return flat_states(backbone, rollouts)
    return packed_states(backbone, rollouts)


def _within(model: nn.Module, compute: Callable[[], T]) -> T:
    """Compute with all weights of the model outside its layers at hand, as in its own forward: see `shard`."""
    method = getattr(model, WITHIN, None)
    return compute() if method is None else method(compute)


def _no_loss(logp: Tensor, entropy: Tensor | None, rows: slice) -> Tensor:
    return logp.new_zeros(())


def _spread(logp: Tensor, entropy: Tensor | None, mask: Tensor) -> TokenValues:
    """Put values of the counted tokens, row by row, at their places."""
    room = logp.new_zeros(mask.shape)
    return TokenValues(
        room.masked_scatter(mask, logp), None if entropy is None else room.masked_scatter(mask, entropy), None
    )


def _plain(
    model: PreTrainedModel,
    rollouts: Rollouts,
    temperature: float,
    with_entropy: bool,
    reference: PreTrainedModel | None = None,
) -> TokenValues:
    """Materialise the distribution at each response position; columns in which all rows are padded are cut away."""
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
