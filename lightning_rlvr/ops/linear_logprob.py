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

On a GPU what is between products is two kernels, see kernels/vocabulary.py: the buffer holds logits then, and the
gradient is made in another one, of the factors' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from lightning_rlvr.kernels import available

# Logits held at a time. On an accelerator products must be large to be fast; neither size is sensitive to a factor 2.
CPU_BYTES, ACCELERATOR_BYTES = 96 * 2**20, 2**30
# Of those, what an elementwise step takes at a time on CPU, so that it and its temporaries stay in the cache.
CACHED_BYTES = 2**20
# On a CPU oneDNN makes logits and the gradient of their inputs a tenth to a third faster than BLAS, but keeps code for
# each number of rows, a megabyte or so. So there are few: multiples of the one up to the other.
ROWS, MOST_ROWS = 64, 1024
# Stands for the log-probability -inf beside p = 0: there it makes the 0 that any finite number does.
FLOOR = -1e4

# (logp [k], entropy [k] or None, rows) -> scalar loss of `rows`, a slice of whole rows whose tokens these are.
LossOf = Callable[[Tensor, "Tensor | None", slice], Tensor]
Inputs = tuple[Tensor, Tensor, "Tensor | None"]  # hidden [K, H], weight [V, H], bias [V]


class HeadValues(NamedTuple):
    """Log-probability of each token and entropy of the distribution it is from, in nats, float32 or float64."""

    logp: Float[Tensor, " K"]
    entropy: Float[Tensor, " K"] | None

    def part(self, tokens: slice) -> HeadValues:
        """Return the values of some tokens, sharing memory."""
        return HeadValues(self.logp[tokens], None if self.entropy is None else self.entropy[tokens])


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
        head = _Head(inputs, target, temperature, _factor_dtype(hidden, weight), chunk_bytes)
        values, sums = head.new_values(with_entropy), _Sums(head, needed)
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


class _Head:
    """One buffer that holds the probabilities of a chunk of tokens over the vocabulary, then the gradient of logits."""

    def __init__(
        self, inputs: Inputs, target: Tensor, temperature: float, factors: torch.dtype, chunk_bytes: int | None
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.hidden, self.weight, bias = inputs
        self.target, self.temperature, self.factors = target.unsqueeze(-1), temperature, factors
        self.on_cpu = self.weight.device.type == "cpu"
        self.dtype = torch.float64 if factors == torch.float64 else torch.float32
        self.matrix = self.factor(self.weight)
        row_bytes = len(self.weight) * self.dtype.itemsize
        self.chunk = max(1, (chunk_bytes or (CPU_BYTES if self.on_cpu else ACCELERATOR_BYTES)) // row_bytes)
        self.step = max(1, CACHED_BYTES // row_bytes) if self.on_cpu else self.chunk
        self.bias = None if bias is None else bias.to(self.dtype)
        self.kernels = available(self.dtype, self.weight.device)
        wide = self.on_cpu and not self.kernels and self.dtype == torch.float32
        self.onednn = wide and self.chunk <= MOST_ROWS and torch.backends.mkldnn.is_available()
        size = (0 if self.onednn else min(self.chunk, len(target)), len(self.weight))
        self.buffer = torch.empty(size, dtype=self.dtype, device=self.weight.device)
        self.total = self.pulled = self.buffer[:0]  # with kernels: logsumexp of what the buffer holds; its gradient

    def factor(self, x: Tensor) -> Tensor:
        """Round to the factors' dtype, and widen again on CPU, whose products add in float32 only if factors are it."""
        rounded = x.to(self.factors)
        return rounded.to(self.dtype) if self.on_cpu else rounded

    def new_values(self, with_entropy: bool) -> HeadValues:
        """Return room for the values of all tokens."""
        logp = torch.empty(len(self.target), dtype=self.dtype, device=self.weight.device)
        return HeadValues(logp, torch.empty_like(logp) if with_entropy else None)

    def parts(self, tokens: slice) -> list[slice]:
        """Cut tokens into chunks."""
        return _cut(tokens.start, tokens.stop, self.chunk)

    def fill(self, part: slice, values: HeadValues | None = None, keep: bool = True) -> None:
        """Put the probabilities of a chunk in the buffer, if they are to be kept, and what they come to in `values`."""
        size = part.stop - part.start
        logits = self._logits(self.factor(self.hidden[part]))
        if self.kernels:
            self._fill(logits, part, values)
            return
        for at in _cut(0, size, self.step):
            z = logits[at]
            if self.temperature != 1.0:
                z /= self.temperature
            z -= z.amax(dim=-1, keepdim=True)
            p = z.exp()
            mass = p.sum(dim=-1, keepdim=True)
            if values is not None:
                tokens = slice(part.start + at.start, part.start + at.stop)
                log_mass = mass.log().squeeze(-1)
                values.logp[tokens] = z.gather(-1, self.target[tokens]).squeeze(-1) - log_mass
                if values.entropy is not None:
                    tilt = (z.clamp_(min=FLOOR).mul_(p)).sum(dim=-1)
                    values.entropy[tokens] = log_mass - tilt / mass.squeeze(-1)
            if keep:
                torch.div(p, mass, out=z)

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.onednn:
            self.buffer = self.buffer.new_empty(0)  # lets go of what it held
            more = min(-len(hidden) % ROWS, self.chunk - len(hidden))
            self.buffer = _pointwise(pad(hidden, (0, 0, 0, more)), self.matrix, self.bias)
            return self.buffer[: len(hidden)]
        logits = self.buffer[: len(hidden)]
        if self.bias is not None:
            logits.copy_(self.bias)
        _add_product(logits, hidden, self.matrix.t(), keep=self.bias is not None)
        return logits

    def pull_hidden(self, factor: Tensor, out: Tensor) -> None:
        """Fill `out` with the gradient of the inputs from that of the logits, in the factors' dtype."""
        if self.onednn:
            out.copy_(_pointwise(self.buffer, self.matrix.t())[: len(out)])  # where `factor` stands
        else:
            _add_product(out, factor, self.matrix, keep=False)

    def _fill(self, logits: Tensor, part: slice, values: HeadValues | None) -> None:
        from lightning_rlvr.kernels import vocabulary

        asked = values is not None and values.entropy is not None
        logp, entropy, self.total = vocabulary.values(logits, self.target[part, 0], self.temperature, asked)
        if values is not None:
            values.logp[part] = logp
            if values.entropy is not None:
                values.entropy[part] = entropy

    def gradient(self, part: slice, values: HeadValues, pull: HeadValues) -> Tensor:
        """Turn what is in the buffer into the gradient of the logits; `pull` is that of the values."""
        whole = self.buffer[: part.stop - part.start]
        if self.kernels:
            return self._gradient(whole, part, values, pull)
        pull_logp = pull.logp.unsqueeze(-1) / self.temperature
        for at in _cut(0, len(whole), self.step):
            p = whole[at]
            if pull.entropy is None or values.entropy is None:
                p *= -pull_logp[at]
            else:
                pull_entropy = pull.entropy[at].unsqueeze(-1) / self.temperature
                information = values.entropy[part][at].unsqueeze(-1)
                p *= p.log().clamp_(min=FLOOR).add_(information).mul_(-pull_entropy).sub_(pull_logp[at])
        whole.scatter_add_(1, self.target[part], pull_logp)
        return whole

    def _gradient(self, logits: Tensor, part: slice, values: HeadValues, pull: HeadValues) -> Tensor:
        from lightning_rlvr.kernels import vocabulary

        if not len(self.pulled):
            alike = self.matrix.dtype == self.dtype
            self.pulled = self.buffer if alike else torch.empty_like(self.buffer, dtype=self.matrix.dtype)
        out = self.pulled[: len(logits)]
        entropy = None if pull.entropy is None or values.entropy is None else values.entropy[part]
        pulls = pull.logp.contiguous(), None if pull.entropy is None else pull.entropy.contiguous()
        vocabulary.gradient(logits, self.target[part, 0], entropy, self.total, *pulls, self.temperature, out)
        return out


class _Sums:
    """The gradients of the inputs that need one, added up chunk by chunk."""

    def __init__(self, head: _Head, needed: Sequence[bool]) -> None:
        self.head = head
        self._begun = False
        self._gradients = [
            torch.empty(x.shape, dtype=head.dtype, device=x.device) if x is not None and need else None
            for x, need in zip((head.hidden, head.weight, head.bias), needed, strict=True)
        ]
        if self._gradients[0] is not None:
            self._gradients[0].zero_()  # tokens that the loss does not depend on are never added

    def add(self, part: slice, gradient: Tensor) -> None:
        """Add what the gradient of a chunk's logits means for the inputs."""
        hidden, weight, bias = self._gradients
        factor = gradient.to(self.head.matrix.dtype)
        if hidden is not None:
            self.head.pull_hidden(factor, hidden[part])
        if weight is not None:
            _add_product(weight, factor.t(), self.head.factor(self.head.hidden[part]), keep=self._begun)
        if bias is not None:
            torch.add(bias if self._begun else 0, gradient.sum(dim=0, dtype=bias.dtype), out=bias)
        self._begun = True

    def gradients(self) -> list[Tensor | None]:
        """Return the sums."""
        for x in self._gradients:
            if x is not None and not self._begun:
                x.zero_()
        return self._gradients


def _cut(start: int, stop: int, size: int) -> list[slice]:
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def _add_product(out: Tensor, a: Tensor, b: Tensor, keep: bool = True) -> None:
    """Add a @ b to `out` in its own dtype, or put it there if what `out` holds is not to be kept."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=int(keep), out=out)
    else:  # half-precision factors on an accelerator
        torch.addmm(out, a, b, beta=int(keep), out_dtype=out.dtype, out=out)


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
        head = _Head((hidden, weight, bias), target, temperature, factors, chunk_bytes)
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
        head = _Head((hidden, weight, bias), target, *ctx.settings)
        sums = _Sums(head, ctx.needs_input_grad[:3])
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
