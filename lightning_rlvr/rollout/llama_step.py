"""A decoding step of the Llama family on a CPU, in as few calls as it takes.

A small model's step is short products with some hundred elementwise calls between them, in which half of its time goes.
Here queries, keys and values are one product, and so are a MLP's two inner ones; the weights of a norm are multiplied
into those of the product that follows; sines and cosines are looked up. All of that changes rounding only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding

from lightning_rlvr.models.forward import sharded
from lightning_rlvr.models.llama import FAMILY, is_unhooked, is_untouched, products, rotated, signed
from lightning_rlvr.rollout.linear import multiplied, packed, packs_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from lightning_rlvr.rollout.shared_prefix import SharedPrefixLayer

BY_LENGTH = ("dynamic", "longrope")  # rotary embeddings that are not those of a position alone


class LlamaStep:
    """A step of all layers, with weights as they are now.

    Args:
        model: one that this `supports`.
        positions: how many there are, of prompts and responses together.
    """

    def __init__(self, model: PreTrainedModel, positions: int) -> None:
        decoder: Any = model.get_decoder()
        self.embedding = decoder.embed_tokens.weight
        self.layers = [_Layer(layer) for layer in decoder.layers]
        self.norm, self.epsilon = decoder.norm.weight, torch.tensor(decoder.norm.variance_epsilon)
        self.head = _Product([model.get_output_embeddings()])
        cos, sin = decoder.rotary_emb(self.embedding, torch.arange(positions)[None])
        self.angles = torch.stack([cos[0], signed(sin[0])], dim=1)[:, :, None]

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Say whether a model is of the family, with layers of its own class in float32, and on a CPU."""
        kind = model.device.type
        return not torch.is_autocast_enabled(kind) and packs_weights(model, kind) and is_plain_llama(model)

    def __call__(
        self, token: Int[Tensor, " R"], position: Int[Tensor, " R"], caches: Sequence[SharedPrefixLayer]
    ) -> Float[Tensor, "R V"]:
        """Return the logits of the next tokens; the keys and values of these are stored."""
        x = embedding(token, self.embedding)
        cos, sin = self.angles.index_select(0, position).unbind(dim=1)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, cos, sin, cache)
        return self.head(_normalized(x, self.epsilon) * self.norm)


def is_plain_llama(model: PreTrainedModel) -> bool:
    """Say whether a model is of the family, with parts and angles as their classes say and weights of one dtype."""
    if type(model).__name__ not in {f"{name}ForCausalLM" for name in FAMILY} or not is_untouched(model.get_decoder()):
        return False
    by_length = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type") in BY_LENGTH
    head = model.get_output_embeddings()
    plain = type(head) is nn.Linear and is_unhooked(head) and is_unhooked(model)
    alike = all(weight.dtype == model.dtype for weight in model.parameters())
    return plain and alike and not by_length and not sharded(model)


class _Layer:
    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        query, key, value, output, gate, up, down = products(layer)
        self.width, self.scaling = attention.head_dim, attention.scaling
        self.heads = [part.out_features // self.width for part in (query, key)]
        self.inputs, self.output = _Product([query, key, value], layer.input_layernorm), _Product([output])
        self.inner, self.down = _Product([gate, up], layer.post_attention_layernorm), _Product([down])
        self.act = layer.mlp.act_fn
        self.norms = None
        if hasattr(attention, "q_norm"):
            norms = (attention.q_norm, attention.k_norm)
            self.norms = torch.cat([n.weight.expand(h, -1) for n, h in zip(norms, self.heads, strict=True)])
            self.epsilon = torch.tensor(attention.q_norm.variance_epsilon)

    def __call__(
        self, x: Float[Tensor, "R E"], cos: Tensor, sin: Tensor, cache: SharedPrefixLayer
    ) -> Float[Tensor, "R E"]:
        heads = self.inputs(x).view(len(x), -1, self.width)
        turned = heads[:, : sum(self.heads)]
        if self.norms is not None:
            turned = _normalized(turned, self.epsilon) * self.norms
        query, key = rotated(turned, cos, sin).split(self.heads, dim=1)
        cache.store(key, heads[:, sum(self.heads) :])
        x = self.output(cache.attend(query[:, :, None], self.scaling).view(len(x), -1)).add_(x)
        gate, up = self.inner(x).chunk(2, dim=-1)
        y: Tensor = self.down(self.act(gate) * up).add_(x)
        return y


class _Product:
    """What several linear layers make of an input, side by side, and of the norm before them if there is one."""

    def __init__(self, layers: Sequence[nn.Linear], norm: Any = None) -> None:
        weight = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
        self.weight = packed(weight if norm is None else weight * norm.weight)
        self.epsilon = None if norm is None else torch.tensor(norm.variance_epsilon)
        self.bias = None
        if any(layer.bias is not None for layer in layers):
            biases: list[Tensor] = [x.weight.new_zeros(x.out_features) if x.bias is None else x.bias for x in layers]
            self.bias = torch.cat(biases)

    def __call__(self, x: Float[Tensor, "R E"]) -> Float[Tensor, "R F"]:
        return multiplied(x if self.epsilon is None else _normalized(x, self.epsilon), self.weight, self.bias)


def _normalized(x: Float[Tensor, "*N E"], epsilon: Float[Tensor, ""]) -> Float[Tensor, "*N E"]:
    """Return x / sqrt(mean(x^2) + epsilon)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.addcmul(epsilon, norm, norm, value=1 / x.shape[-1]).rsqrt_()
