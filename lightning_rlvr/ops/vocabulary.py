"""The vocabulary of some tokens at a time: values and gradient of their logits in one buffer.

See ops/linear_logprob.py for what is computed. On a CPU the buffer holds probabilities, then the gradient. On a GPU
what is between products is two kernels, see kernels/vocabulary.py: the buffer holds logits, and the gradient is made in
another one, of the factors' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from lightning_rlvr.kernels import available
from lightning_rlvr.ops import onednn

# Logits held at a time. On an accelerator products must be large to be fast; neither size is sensitive to a factor 2.
CPU_BYTES, ACCELERATOR_BYTES = 96 * 2**20, 2**30
# Of those, what an elementwise step takes at a time on CPU, so that it and its temporaries stay in the cache.
CACHED_BYTES = 2**20
# On a CPU oneDNN makes logits and the gradient of their inputs a tenth to a third faster than BLAS, but keeps code for
# each number of rows, a megabyte or so. So there are few: multiples of the one up to the other.
ROWS, MOST_ROWS = 64, 1024
# Stands for the log-probability -inf beside p = 0: there it makes the 0 that any finite number does.
FLOOR = -1e4

Inputs = tuple[Tensor, Tensor, "Tensor | None"]  # hidden [K, H], weight [V, H], bias [V]


class HeadValues(NamedTuple):
    """Log-probability of each token and entropy of the distribution it is from, in nats, float32 or float64."""

    logp: Float[Tensor, " K"]
    entropy: Float[Tensor, " K"] | None

    def part(self, tokens: slice) -> HeadValues:
        """Return the values of some tokens, sharing memory."""
        return HeadValues(self.logp[tokens], None if self.entropy is None else self.entropy[tokens])


class Head:
    """One buffer that holds the probabilities of a chunk of tokens over the vocabulary, then the gradient of logits.

    Args:
        inputs: hidden states, weight and bias.
        target: [K], the token that was drawn after each hidden state.
        temperature: divides the logits.
        factors: dtype of the products' factors.
        chunk_bytes: size of the buffer; None for what suits the device.

    Raises: ValueError if temperature is not positive.
    """

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
            self.buffer = onednn.linear(pad(hidden, (0, 0, 0, more)), self.matrix, self.bias)
            return self.buffer[: len(hidden)]
        logits = self.buffer[: len(hidden)]
        if self.bias is not None:
            logits.copy_(self.bias)
        _add_product(logits, hidden, self.matrix.t(), keep=self.bias is not None)
        return logits

    def pull_hidden(self, factor: Tensor, out: Tensor) -> None:
        """Fill `out` with the gradient of the inputs from that of the logits, in the factors' dtype."""
        if self.onednn:
            out.copy_(onednn.linear(self.buffer, self.matrix.t())[: len(out)])  # where `factor` stands
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


class Sums:
    """The gradients of the inputs that need one, added up chunk by chunk."""

    def __init__(self, head: Head, needed: Sequence[bool]) -> None:
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


def _add_product(out: Tensor, a: Tensor, b: Tensor, keep: bool = True) -> None:
    """Add a @ b to `out` in its own dtype, or put it there if what `out` holds is not to be kept."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=int(keep), out=out)
    else:  # half-precision factors on an accelerator
        torch.addmm(out, a, b, beta=int(keep), out_dtype=out.dtype, out=out)
