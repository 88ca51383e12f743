"""Layers of a backbone that keep less for the backward pass, and give what they gave.

An RMSNorm keeps its input and a number for each token, in place of what each of its operations would keep. A gated MLP
keeps what its two inner products gave, and makes the rest again. What is not kept need not be written and read either.
On a GPU each of both is one kernel, and its gradient another: they give what the layers gave but for rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_rlvr.kernels import available

Forward = Callable[[Any, Tensor], Tensor]  # of a module and its input
LEAST = 2**16  # numbers in a layer's input: of fewer, the memory is not worth the calls
INNER = ("gate_proj", "up_proj", "down_proj")


@contextmanager
def lean_layers(backbone: nn.Module) -> Iterator[None]:
    """Let the layers of a backbone that can be lean be so, where gradients are on, and where kernels make them faster.

    Where layers are recomputed none is: what they keep would live as long as without.
    """
    weight = next(backbone.parameters())
    pays = torch.is_grad_enabled() or available(weight.dtype, weight.device)
    chosen = find_lean(backbone) if pays and not recomputes(backbone) else {}
    modules = [(backbone.get_submodule(name), forward) for name, forward in chosen.items()]
    modules = [(module, forward) for module, forward in modules if "forward" not in vars(module)]  # another's stays
    try:
        for module, forward in modules:
            vars(module)["forward"] = partial(_where_it_counts, module, forward)
        yield
    finally:
        for module, _ in modules:
            vars(module).pop("forward", None)


def recomputes(model: nn.Module) -> bool:
    """Whether layers are computed again in the backward pass."""
    return any(getattr(part, "gradient_checkpointing", False) for part in model.modules())


def _where_it_counts(module: nn.Module, forward: Forward, x: Tensor) -> Tensor:
    y: Tensor = forward(module, x) if x.numel() >= LEAST else type(module).forward(module, x)
    return y


def find_lean(backbone: nn.Module) -> dict[str, Forward]:
    """Return which modules can be lean, by name, and how: found out once, from their structure and on a few numbers."""
    if backbone not in _FOUND:
        _FOUND[backbone] = {
            name: forward
            for name, part in backbone.named_modules()
            if (forward := _like(part)) and _same(part, forward)
        }
    return _FOUND[backbone]


_FOUND: WeakKeyDictionary[nn.Module, dict[str, Forward]] = WeakKeyDictionary()


def _like(module: nn.Module) -> Forward | None:
    """Return what a module may compute, by its parts."""
    own, inner = set(module._parameters), set(module._modules)
    if own == {"weight"} and not inner and isinstance(getattr(module, "variance_epsilon", None), float):
        return rms_norm
    act = getattr(module, "act_fn", None)
    learned = isinstance(act, nn.Module) and any(True for _ in act.parameters())
    if not own and inner - {"act_fn"} == set(INNER) and act is not None and not learned:
        return gated_mlp
    return None


@torch.no_grad()
def _same(module: nn.Module, forward: Forward) -> bool:
    """Whether a module computes what `forward` does, to the bit: asked of a copy with few weights."""
    generator = torch.Generator().manual_seed(0)
    twin, size = copy.copy(module), 8
    if forward is rms_norm:
        twin._parameters = {"weight": nn.Parameter(torch.randn(size, generator=generator))}
    else:
        linear = {name: nn.utils.skip_init(nn.Linear, size, size, bias=False) for name in INNER}  # draws nothing
        for layer in linear.values():
            layer.weight.copy_(torch.randn(size, size, generator=generator))
        twin._modules = {**module._modules, **linear}
    x = torch.randn(4, size, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):  # roundings differ in the narrow one
        twin, x = twin.to(dtype), x.to(dtype)
        if not torch.equal(type(module).forward(twin, x), forward(twin, x)):
            return False
    return True


def rms_norm(module: Any, x: Float[Tensor, "*N H"]) -> Float[Tensor, "*N H"]:
    """Return w x / sqrt(mean(x^2) + epsilon), computed in float32. Source: arXiv 1910.07467."""
    wide = x.dtype == torch.float64  # of whose gradient the module's own backward pass keeps more digits
    y: Tensor = type(module).forward(module, x) if wide else _RMSNorm.apply(x, module.weight, module.variance_epsilon)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.kernels = available(x.dtype, x.device)
        if ctx.kernels:
            from lightning_rlvr.kernels import layers

            y, scale = layers.norm(_flat(x), weight, epsilon)
            ctx.save_for_backward(x, weight, scale)
            return y.view(x.shape)
        wide = x.to(torch.float32)
        y = wide.pow(2)
        scale = torch.rsqrt(y.mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scale)
        y = torch.mul(wide, scale, out=y).to(x.dtype)
        return y.mul_(weight) if y.dtype == weight.dtype else weight * y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        if ctx.kernels:
            from lightning_rlvr.kernels import layers

            of_x, of_weight = layers.norm_pull(_flat(gradient), _flat(x), weight, scale, ctx.needs_input_grad[1])
            return of_x.view(x.shape), of_weight, None
        with torch.autocast(x.device.type, enabled=False):
            wide, flat, pull = (part.float().flatten(0, -2) for part in (x, scale, gradient))
            of_x, of_weight = rms_norm_pull(wide, weight.float(), flat, pull, ctx.needs_input_grad[1])
        return of_x.view(x.shape).to(x.dtype), None if of_weight is None else of_weight.to(weight.dtype), None


def rms_norm_pull(
    x: Float[Tensor, "N H"],
    weight: Float[Tensor, " H"],
    scale: Float[Tensor, "N 1"],
    pull: Float[Tensor, "N H"],
    weight_needed: bool,
) -> tuple[Float[Tensor, "N H"], Float[Tensor, " H"] | None]:
    """Return the gradients of x and, if needed, of the weight from that of weight * x * scale, an RMSNorm's output."""
    product, scale = pull * x, scale.flatten()
    of_weight = scale @ product if weight_needed else None
    along = (product @ weight) * scale.pow(3) / len(weight)
    of_x = torch.mul(pull, weight, out=product).mul_(scale[:, None]).addcmul_(x, along[:, None], value=-1)
    return of_x, of_weight


def gated_mlp(module: Any, x: Float[Tensor, "*N H"]) -> Float[Tensor, "*N H"]:
    """Return down(act(gate(x)) * up(x)). Source: arXiv 2002.05202."""
    act, gate, up = module.act_fn, module.gate_proj(x), module.up_proj(x)
    product = _Gated.apply(act, gate, up)
    storage = product.untyped_storage()._cdata

    def keep(value: Tensor) -> Tensor | torch.Size:
        return value.shape if value.untyped_storage()._cdata == storage else value

    def again(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else gated(act, gate.detach(), up.detach()).view(kept)

    with torch.autograd.graph.saved_tensors_hooks(keep, again):
        y: Tensor = module.down_proj(product)
    return y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return gated(act, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if _by_kernel(ctx.act, gate, up):
            from lightning_rlvr.kernels import layers

            of_gate, of_up = layers.gated_pull(*map(_flat, (gradient, gate, up)))
            return None, of_gate.view(gate.shape), of_up.view(gate.shape)
        activated, of_gate = activation_pull(ctx.act, gate, gradient * up)
        return None, of_gate, gradient * activated


def gated(act: Callable[[Tensor], Tensor], gate: Float[Tensor, "N F"], up: Float[Tensor, "N F"]) -> Tensor:
    """Return act(gate) * up, where nothing else holds what act returns."""
    if _by_kernel(act, gate, up):
        from lightning_rlvr.kernels import layers

        return layers.gated(_flat(gate), _flat(up)).view(gate.shape)
    activated = act(gate)
    return activated.mul_(up) if activated.dtype == up.dtype and activated is not gate else activated * up


def activation_pull(
    act: Callable[[Tensor], Tensor], x: Float[Tensor, "*N F"], pull: Float[Tensor, "*N F"]
) -> tuple[Float[Tensor, "*N F"], Float[Tensor, "*N F"]]:
    """Return act(x), and the gradient of x from that of act(x)."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        activated = act(leaf)
    (of_x,) = torch.autograd.grad(activated, leaf, pull)
    return activated.detach(), of_x


def is_silu(act: Any) -> bool:
    """Say whether an activation is x sigmoid(x)."""
    return type(act).__name__ in ("SiLU", "SiLUActivation")


def _flat(x: Float[Tensor, "*N F"]) -> Float[Tensor, "M F"]:
    """Return rows as kernels take them."""
    return x.flatten(0, -2).contiguous()


def _by_kernel(act: Any, gate: Tensor, up: Tensor) -> bool:
    return available(gate.dtype, gate.device) and gate.dtype == up.dtype and is_silu(act)
