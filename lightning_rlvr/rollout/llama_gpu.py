"""A decoding step of the Llama family on a GPU, in as few kernels as it takes.

Its products read all weights, which is the least that a step can do; between them the model's own code runs some thirty
kernels a layer, each of which takes longer to begin than to compute. Here there are three: a sum with the norm that
follows, the rotation of queries and keys with their way into the cache, and the gate. Their arithmetic is float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from lightning_rlvr.kernels import available
from lightning_rlvr.models.lean import is_silu
from lightning_rlvr.models.llama import products
from lightning_rlvr.rollout.llama_step import is_plain_llama

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from lightning_rlvr.rollout.shared_prefix import SharedPrefixLayer

# Bytes of all weights up to which products of one input are made one, of weights held twice. Those of larger models are
# long enough by themselves.
MOST_MERGED = 4 * 2**30


class LlamaGpuStep:
    """A step of all layers, with weights as they are now.

    Args:
        model: one that this `supports`.
        positions: how many there are, of prompts and responses together.
    """

    def __init__(self, model: PreTrainedModel, positions: int) -> None:
        decoder: Any = model.get_decoder()
        self.dtype, merged = _factor_dtype(model), _merges(model)
        self.embedding = decoder.embed_tokens.weight
        self.layers = [_Layer(layer, self.dtype, merged) for layer in decoder.layers]
        self.norm = decoder.norm
        self.head = _Product([model.get_output_embeddings()], self.dtype, merged)
        places = torch.arange(positions, device=model.device)[None]
        self.angles = tuple(x[0].contiguous() for x in decoder.rotary_emb(self.embedding, places))

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Say whether a model is of the family, with layers of its own class, and there are kernels for its dtype."""
        return available(_factor_dtype(model), model.device) and _is_gated_llama(model)

    def __call__(
        self, token: Int[Tensor, " R"], position: Int[Tensor, " R"], caches: Sequence[SharedPrefixLayer]
    ) -> Float[Tensor, "R V"]:
        """Return the logits of the next tokens; the keys and values of these are stored."""
        from lightning_rlvr.kernels import layers

        x, y = embedding(token, self.embedding), None
        for layer, cache in zip(self.layers, caches, strict=True):
            y = layer(x, y, self.angles, position, cache)
        return self.head(layers.add_norm(x, y, self.norm.weight, self.norm.variance_epsilon, self.dtype))


def merged_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of weights that a step holds a second time where nothing is rounded, on any device."""
    if not _is_gated_llama(model) or not _merges(model):
        return 0
    merged = [0, 1, 2, 4, 5]  # of queries, keys and values, of gate and up
    return sum(products(layer)[i].weight.nbytes for layer in model.get_decoder().layers for i in merged)


def _is_gated_llama(model: PreTrainedModel) -> bool:
    return is_plain_llama(model) and all(is_silu(layer.mlp.act_fn) for layer in model.get_decoder().layers)


def _merges(model: PreTrainedModel) -> bool:
    return sum(weight.nbytes for weight in model.parameters()) <= MOST_MERGED


def _factor_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype that linear layers multiply in."""
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


class _Layer:
    def __init__(self, layer: Any, dtype: torch.dtype, merged: bool) -> None:
        attention = layer.self_attn
        query, key, value, output, gate, up, down = products(layer)
        self.width, self.scaling, self.dtype = attention.head_dim, attention.scaling, dtype
        self.norms = [layer.input_layernorm, layer.post_attention_layernorm]
        self.of_heads = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.inputs, self.inner = (_Product(parts, dtype, merged) for parts in ([query, key, value], [gate, up]))
        self.output, self.down = (_Product([part], dtype, merged) for part in (output, down))

    def __call__(
        self, x: Float[Tensor, "R E"], y: Tensor | None, angles: Any, position: Tensor, cache: SharedPrefixLayer
    ) -> Float[Tensor, "R E"]:
        """Add y to x, and what attention makes of it; return what is to be added next."""
        from lightning_rlvr.kernels import decoding, layers

        before, after = self.norms
        heads = self.inputs(layers.add_norm(x, y, before.weight, before.variance_epsilon, self.dtype))
        query = decoding.turn_and_store(
            heads.view(len(x), -1, self.width),
            (cache.own_keys, cache.own_values),
            angles,
            position,
            cache.layout.column_at,
            [(None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon) for norm in self.of_heads],
        )
        y = self.output(cache.attend(query[:, :, None], self.scaling).view(len(x), -1))
        inner = self.inner(layers.add_norm(x, y, after.weight, after.variance_epsilon, self.dtype))
        return self.down(layers.gated(*inner.chunk(2, dim=1)))


class _Product:
    """What several linear layers make of an input, side by side."""

    def __init__(self, layers: Sequence[nn.Linear], dtype: torch.dtype, merged: bool) -> None:
        weights: list[Tensor] = [layer.weight.to(dtype) for layer in layers]
        biases: list[Tensor] = [
            layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers
        ]
        self.bias = None if all(layer.bias is None for layer in layers) else torch.cat(biases).to(dtype)
        self.weights = [torch.cat(weights)] if merged and len(weights) > 1 else weights

    def __call__(self, x: Float[Tensor, "R E"]) -> Float[Tensor, "R F"]:
        if len(self.weights) == 1:
            return linear(x, self.weights[0], self.bias)
        y = torch.cat([linear(x, weight) for weight in self.weights], dim=1)
        return y if self.bias is None else y.add_(self.bias)
