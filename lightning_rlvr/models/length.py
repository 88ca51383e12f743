"""How many tokens a model can take, and still give each row the numbers that it has alone."""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Any

from lightning_rlvr.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LONGROPE = "longrope"
DYNAMIC = "dynamic"  # a part of the names of rope types


def check_length(model: PreTrainedModel, prompt_tokens: int, response_tokens: int, keys: str) -> None:
    """Let a model be asked for a response of so many tokens to a prompt of so many, or say why not.

    Rotary frequencies that change with the length (`dynamic`, `longrope`) are set by transformers for the longest row
    of a call, and `dynamic` ones stay for the next: beyond the original length, a row's numbers depend on its
    neighbours. Up to it they do not change.

    Args:
        model: of which only the config is read.
        prompt_tokens: the most that a prompt has.
        response_tokens: the most that a response may have.
        keys: what the user can set, named in the error.

    Raises: UserError if both together are more than the model's positions, or than the length up to which its rotary
        frequencies stay.
    """
    config = model.config.get_text_config(decoder=True)
    limits = _unchanged(config)
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append((positions, "it has no more positions, or was not trained for more"))
    limit, why = min(limits, key=itemgetter(0), default=(None, ""))
    if limit is not None and prompt_tokens + response_tokens > limit:
        raise UserError(
            f"a prompt and its response must have at most {limit} tokens together for {type(model).__name__}, got up "
            f"to {prompt_tokens} and {response_tokens}: {why}. Set {keys}."
        )


def _unchanged(config: PreTrainedConfig) -> list[tuple[int, str]]:
    """Return the lengths up to which rotary frequencies stay as they are, where they do not for ever, and why."""
    given: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    of_layers = [given] if "rope_type" in given else [of for of in given.values() if isinstance(of, dict)]
    found = []
    for rope in of_layers:
        kind = str(rope.get("rope_type"))
        if kind == LONGROPE or DYNAMIC in kind:
            length = rope["original_max_position_embeddings"] if kind == LONGROPE else config.max_position_embeddings
            found.append((length, f"beyond, {kind} positions change with the longest row of a batch"))
    return found
