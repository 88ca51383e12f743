"""Which models ask no more of attention than a softmax over all that was seen, so that another may take its place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BEYOND_SOFTMAX = ("position_bias", "sliding_window", "softcap", "s_aux", "cache")


class NotPlainError(Exception):
    """The model's attention is not softmax(query @ keys) @ values over all that it has seen."""


def attends_plainly(model: PreTrainedModel) -> bool:
    """Say whether the model lets its attention be replaced and looks at all keys in all layers, by its config."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    config = model.config
    return (
        bool(getattr(model, "_supports_attention_backend", False))
        and config._attn_implementation == "sdpa"
        and not config.sub_configs
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    )


def beyond_softmax(kwargs: dict[str, Any]) -> bool:
    """Say whether a layer asks its attention for more than softmax(query @ keys) @ values."""
    return any(kwargs.get(name) is not None for name in BEYOND_SOFTMAX)
