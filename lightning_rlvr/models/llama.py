"""Layers of the Llama family in the training pass, in few calls and with little kept for the backward pass.

What stands before attention is one function, and what comes after it another, with gradients by hand: three tenths
fewer calls, of which small models have too many for their products. They keep no norm's output, and of a gated MLP what
its two inner products gave; the rest is made again. That is an eighth less than lean layers keep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lightning_rlvr.models.lean import activation_pull, gated, rms_norm, rms_norm_pull

FAMILY = ("Llama", "Mistral", "Qwen2", "Qwen3")
WIDE = (torch.float32, torch.float64)

# (attention, queries [N, H, D], keys and values [N, K, D], scaling=, dropout=) -> [N, H, D]
Attend = Callable[..., Tensor]


def is_untouched(decoder: Any) -> bool:
    """Say whether a model without its head is of the family, and all of its parts compute what their classes do."""
    kind = type(decoder)
    if not kind.__module__.startswith("transformers.models.") or kind.__name__ not in {f"{x}Model" for x in FAMILY}:
        return False
    linears = all(type(part) is nn.Linear for layer in decoder.layers for part in products(layer))
    return linears and all(map(is_unhooked, decoder.modules()))


def products(layer: Any) -> list[Any]:
    """Return the products of a layer: of queries, keys, values, attention's output, gate, up and down."""
    attention, mlp = layer.self_attn, layer.mlp
    outer = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*outer, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def is_unhooked(part: nn.Module) -> bool:
    """Say whether nothing else is computed when a module is called, or its gradient."""
    hooks = (part._forward_pre_hooks, part._forward_hooks, part._backward_pre_hooks, part._backward_hooks)
    return "forward" not in vars(part) and not any(hooks)


def signed(sin: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
    """Return sines as `rotated` takes them."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat([-first, second], dim=-1)


def rotated(
    heads: Float[Tensor, "N H D"], cos: Float[Tensor, "N 1 D"], sin: Float[Tensor, "N 1 D"]
) -> Float[Tensor, "N H D"]:
    """Return queries or keys with the halves of each turned by the angles of its position. Source: arXiv 2104.09864."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, dims=-1), sin)


def runs(decoder: Any) -> bool:
    """Say whether `run` computes what a model without its head does, to the precision of its weights' dtype."""
    if not is_untouched(decoder) or torch.is_autocast_enabled(decoder.device.type):
        return False
    dtype, weights = decoder.dtype, list(decoder.parameters())
    biased = any(part.bias is not None for layer in decoder.layers for part in products(layer)[3:])
    learned = any(True for layer in decoder.layers for _ in layer.mlp.act_fn.parameters())
    norms = [part for part in decoder.modules() if type(part).__name__.endswith("RMSNorm")]
    # Those of transformers compute in float32, whatever they are given.
    exact = all((type(norm) is nn.RMSNorm) == (dtype == torch.float64) for norm in norms)
    return dtype in WIDE and exact and not biased and not learned and all(w.dtype == dtype for w in weights)


def _epsilon(norm: Any) -> float | None:
    if norm is None:
        return None
    return norm.eps if type(norm) is nn.RMSNorm else float(norm.variance_epsilon)


def run(decoder: Any, ids: Int[Tensor, " N"], position: Int[Tensor, " N"], attend: Attend) -> Float[Tensor, "N E"]:
    """Return the last hidden states of tokens in a line, of which only attention knows which see which."""
    x = decoder.embed_tokens(ids)
    cos, sin = (angles[0, :, None] for angles in decoder.rotary_emb(x[None], position[None]))
    sin = signed(sin)
    for layer in decoder.layers[: decoder.config.num_hidden_layers]:
        attention, (query, key, value, output, *inner) = layer.self_attn, products(layer)
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        epsilons = [_epsilon(norm) for norm in (layer.input_layernorm, *norms)]
        heads = _Before.apply(
            x,
            cos,
            sin,
            epsilons,
            layer.input_layernorm.weight,
            *(part.weight for part in (query, key, value)),
            *(part.bias for part in (query, key, value)),
            *(None if norm is None else norm.weight for norm in norms),
        )
        dropout = attention.attention_dropout if attention.training else 0.0
        y = attend(attention, *heads, scaling=attention.scaling, dropout=dropout).flatten(1)
        norm = layer.post_attention_layernorm
        weights = (part.weight for part in (output, *inner))
        x = _After.apply(x, y, layer.mlp.act_fn, _epsilon(norm), norm.weight, *weights)
    return rms_norm(decoder.norm, x)


def _scale(x: Float[Tensor, "N E"], epsilon: float) -> Float[Tensor, "N 1"]:
    """Return 1 / sqrt(mean(x^2) + epsilon)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()


def _normed(x: Float[Tensor, "N E"], scale: Float[Tensor, "N 1"], weight: Float[Tensor, " E"]) -> Float[Tensor, "N E"]:
    return (x * scale).mul_(weight)


def _product_pull(pull: Float[Tensor, "N F"], x: Float[Tensor, "N E"], needed: bool) -> Float[Tensor, "F E"] | None:
    """Return the gradient of the weight of x @ weight.T from that of the product."""
    return pull.t() @ x if needed else None


class _Before(torch.autograd.Function):
    """From a layer's input to queries, keys and values: norm, products, norms of heads where there are, rotation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        epsilons: list[Any],
        norm: Tensor,
        *weights: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        matrices, biases, norms = weights[:3], weights[3:6], weights[6:]
        scale = _scale(x, epsilons[0])
        normed = _normed(x, scale, norm)
        out: list[Tensor] = []
        kept: list[Tensor] = []
        for matrix, bias, of_head, epsilon in zip(matrices, biases, (*norms, None), (*epsilons[1:], None), strict=True):
            heads = linear(normed, matrix, bias).view(-1, cos.shape[-1])
            if of_head is not None:
                kept += [heads, _scale(heads, epsilon)]
                heads = _normed(kept[-2], kept[-1], of_head)
            out.append(heads.view(len(x), -1, cos.shape[-1]))
        query, key = (rotated(heads, cos, sin) for heads in out[:2])
        ctx.save_for_backward(x, scale, norm, cos, sin, *matrices, *norms, *kept)
        return query, key, out[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *pulls: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, norm, cos, sin, *saved = ctx.saved_tensors
        matrices, norms, kept = saved[:3], saved[3:5], saved[5:]
        needed = ctx.needs_input_grad[5:]
        normed, back = _normed(x, scale, norm), sin.roll(cos.shape[-1] // 2, dims=-1)
        of_normed, of_weights, of_heads = torch.empty_like(x), [], []
        for i, pull in enumerate(pulls):
            if i < 2:
                pull = rotated(pull, cos, back)
                of_head = None
                if norms[i] is not None:
                    heads, of_scale = kept[2 * i : 2 * i + 2]
                    pull, of_head = rms_norm_pull(heads, norms[i], of_scale, pull.reshape(heads.shape), needed[6 + i])
                of_heads.append(of_head)
            pull = pull.reshape(len(x), -1)
            of_normed.addmm_(pull, matrices[i], beta=int(i > 0))
            of_weights.append((_product_pull(pull, normed, needed[i]), pull.sum(dim=0) if needed[3 + i] else None))
        of_x, of_norm = rms_norm_pull(x, norm, scale, of_normed, ctx.needs_input_grad[4])
        of_matrices, of_biases = zip(*of_weights, strict=True)
        return of_x, None, None, None, of_norm, *of_matrices, *of_biases, *of_heads


class _After(torch.autograd.Function):
    """From a layer's input and its attention to its output: product, sum, norm, gated MLP, sum."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        act: Callable[[Tensor], Tensor],
        epsilon: float,
        norm: Tensor,
        output: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
    ) -> Tensor:
        x = torch.addmm(x, y, output.t())
        scale = _scale(x, epsilon)
        normed = _normed(x, scale, norm)
        of_gate, of_up = normed @ gate.t(), normed @ up.t()
        ctx.act = act
        ctx.save_for_backward(x, y, scale, norm, output, gate, up, down, of_gate, of_up)
        return torch.addmm(x, gated(act, of_gate, of_up), down.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pull: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, norm, output, gate, up, down, of_gate, of_up = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        inner = pull @ down
        activated, pull_gate = activation_pull(ctx.act, of_gate, inner * of_up)
        of_down = _product_pull(pull, activated * of_up, needed[4])
        pull_up = inner.mul_(activated)
        of_normed = (pull_gate @ gate).addmm_(pull_up, up)
        normed = _normed(x, scale, norm)
        of_inner = _product_pull(pull_gate, normed, needed[2]), _product_pull(pull_up, normed, needed[3])
        of_x, of_norm = rms_norm_pull(x, norm, scale, of_normed, needed[0])
        of_x += pull
        return of_x, of_x @ output, None, None, of_norm, _product_pull(of_x, y, needed[1]), *of_inner, of_down
