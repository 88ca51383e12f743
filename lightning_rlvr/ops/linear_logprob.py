"""The vocabulary head: from hidden states to log-probability and entropy, never holding the logits of all tokens.

The head is most of a small model's update: 2 x V x H operations a token in each of its three products, and logits
[K, V] that outgrow everything else. Here a chunk of tokens at a time passes through one buffer, in which logits become
probabilities and those the gradient, in place. With z = (W h + b) / T and p = softmax(z):

    log p_y = z_y - logsumexp(z)        H = -sum_v p_v log p_v
    dL/dz_v = g_logp (1[v = y] - p_v) - g_H p_v (log p_v + H)

`linear_logprob` is differentiable and computes the logits once more in the backward pass, like a checkpointed layer.
`linear_logprob_loss` computes them once: it is given the loss too, so it forms the gradient of a chunk while its
logits are there.

Products take factors of the inputs' dtype (autocast's where that is on) and add in float32, unless all is float64.
What is between them, and the sums over chunks, is float32; a gradient is rounded to its input's dtype once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_rlvr.ops.vocabulary import Head, HeadValues, Sums

# (logp [k], entropy [k] or None, rows) -> scalar loss of `rows`, a slice of whole rows whose tokens these are.
LossOf = Callable[[Tensor, "Tensor | None", slice], Tensor]


def linear_logprob(
    hidden: Float[Tensor, "K H"],
    weight: Float[Tensor, "V H"],
    target: Int[Tensor, " K"],
    temperature: float = 1.0,
    bias: Float[Tensor, " V"] | None = None,
    with_entropy: bool = True,
    chunk_bytes: int | None = None,
) -> HeadValues:
    """Return the log-probability of each target and the entropy of its distribution, both differentiable.

    Args:
        hidden: the last hidden state at the position that predicts each token. Only counted tokens belong here.
        weight: the output weight, tied to the embedding or not.
        target: the token that was drawn.
        temperature: divides the logits, bias included.
        bias: the output bias.
        with_entropy: whether to compute the entropy.
        chunk_bytes: size of the buffer of logits; by default what suits the device.

    Raises: ValueError if temperature is not positive.
    """
    dtype = _factor_dtype(hidden, weight)
    logp, entropies = _Recomputed.apply(hidden, weight, bias, target, temperature, with_entropy, chunk_bytes, dtype)
    return HeadValues(logp, entropies)


def linear_logprob_loss(
    hidden: Float[Tensor, "K H"],
    weight: Float[Tensor, "V H"],
    target: Int[Tensor, " K"],
    lengths: Int[Tensor, " R"],
    loss_of: LossOf,
    temperature: float = 1.0,
    bias: Float[Tensor, " V"] | None = None,
    with_entropy: bool = True,
    chunk_bytes: int | None = None,
) -> tuple[Float[Tensor, ""], HeadValues]:
    """Return a loss that carries its gradient to hidden, weight and bias, and the detached values of all tokens.

    The tokens are those of R rows one after the other, `lengths[r]` of row r. The loss is asked for a few whole rows
    at a time, as `loss_of(logp, entropy, rows)` with the values of their tokens as leaves, and summed; it must be
    additive over any such cut. Within a row it may couple tokens as it likes. A row whose logits exceed the buffer has
    them computed twice: where the loss does not couple tokens, call each token a row.

    The gradient is complete when this returns: `backward` only scales it and hands it over, once. Where there is none
    to compute (inputs that need none, or no_grad) only values are.

    What is not named here is as for `linear_logprob`.

    Raises: ValueError if the lengths do not add up to K, or temperature is not positive.
    """
    counts = lengths.tolist()
    if sum(counts) != len(target):
        raise ValueError(f"lengths must add up to the {len(target)} tokens given, got {sum(counts)}")
    inputs = (hidden, weight, bias)
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    with torch.no_grad():
        head = Head(inputs, target, temperature, _factor_dtype(hidden, weight), chunk_bytes)
        values, sums = head.new_values(with_entropy), Sums(head, needed)
        total = torch.zeros((), dtype=head.dtype, device=hidden.device)
        for rows, tokens in _groups(counts, head.chunk):
            parts = head.parts(tokens)
            for part in parts:
                head.fill(part, values, any(needed))
            loss, pull = _differentiate(loss_of, values.part(tokens), rows, any(needed))
            total += loss
            if pull is None:
                continue
            for part in reversed(parts):
                if part is not parts[-1]:  # whose probabilities are still in the buffer
                    head.fill(part)
                local = slice(part.start - tokens.start, part.stop - tokens.start)
                sums.add(part, head.gradient(part, values, pull.part(local)))
    return _Ready.apply(total, sums.gradients(), *inputs) if any(needed) else total, values


def _groups(counts: Sequence[int], most: int) -> Iterator[tuple[slice, slice]]:
    """Cut rows into runs of at most `most` tokens, or one row; yield each run's rows and its tokens."""
    row = token = 0
    while row < len(counts):
        stop, end = row + 1, token + counts[row]
        while stop < len(counts) and end + counts[stop] - token <= most:
            end += counts[stop]
            stop += 1
        yield slice(row, stop), slice(token, end)
        row, token = stop, end


def _differentiate(loss_of: LossOf, values: HeadValues, rows: slice, needed: bool) -> tuple[Tensor, HeadValues | None]:
    """Return the loss of some rows and its gradient with respect to their values, None where it has none."""
    leaves = [x.detach().requires_grad_(needed) for x in values if x is not None]
    with torch.set_grad_enabled(needed):
        loss = loss_of(leaves[0], leaves[1] if len(leaves) == 2 else None, rows)
    if not loss.requires_grad:
        return loss, None
    grad_logp, *grad_entropy = torch.autograd.grad(loss, leaves, allow_unused=True)
    if grad_logp is None:
        grad_logp = torch.zeros_like(values.logp)
    return loss.detach(), HeadValues(grad_logp, grad_entropy[0] if grad_entropy else None)


def _factor_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype that a linear layer would multiply in."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


class _Recomputed(torch.autograd.Function):
    """`linear_logprob`: values now; logits again, and gradients, when the values' gradient is known."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        temperature: float,
        with_entropy: bool,
        chunk_bytes: int | None,
        factors: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        head = Head((hidden, weight, bias), target, temperature, factors, chunk_bytes)
        values = head.new_values(with_entropy)
        for part in head.parts(slice(0, len(target))):
            head.fill(part, values, keep=False)
        ctx.save_for_backward(hidden, weight, bias, target, *values)
        ctx.settings = (temperature, factors, chunk_bytes)
        ctx.set_materialize_grads(False)
        return values.logp, values.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pull_logp: Tensor | None, pull_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, *values = ctx.saved_tensors
        head = Head((hidden, weight, bias), target, *ctx.settings)
        sums = Sums(head, ctx.needs_input_grad[:3])
        pull = HeadValues(torch.zeros_like(values[0]) if pull_logp is None else pull_logp, pull_entropy)
        for part in head.parts(slice(0, len(target))):
            head.fill(part)
            sums.add(part, head.gradient(part, HeadValues(*values), pull.part(part)))
        gradients = (
            None if x is None else x.to(like.dtype)
            for x, like in zip(sums.gradients(), (hidden, weight, bias), strict=True)
        )
        return *gradients, None, None, None, None, None


class _Ready(torch.autograd.Function):
    """A loss whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *inputs: Tensor | None) -> Tensor:
        ctx.gradients, ctx.dtypes = gradients, [None if x is None else x.dtype for x in inputs]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of linear_logprob_loss was handed over before: call backward once")
        gradients, ctx.gradients = ctx.gradients, None
        return (
            None,
            None,
            *(None if x is None else x.mul_(scale).to(dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True)),
        )
