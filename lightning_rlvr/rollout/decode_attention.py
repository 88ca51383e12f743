"""Attention of one new token of each row to its prompt and its response so far, in one Triton kernel.

A program has a row, a head of keys and the query heads that share it, and reads the keys and values that the row sees,
no others: a prompt's lie once for all its rows, a response's in the columns of a ring. Where they begin and end stands
in tensors, so a CUDA graph of it serves every step. Where there are fewer programs than a GPU runs at a time, several
share a row's keys, and what they found is put together afterwards.

Products take factors of the keys' dtype and add in float32; the softmax is float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from lightning_rlvr.rollout.shared_prefix import SharedPrefixLayer

PROGRAMS = 264  # wanted: two for each multiprocessor of an H100
MOST_PARTS = 16


class Seen(NamedTuple):
    """What each row sees, by row; it must stay in place for a graph.

    Args:
        group: the prompt.
        prompt: the first place of the prompt that holds a token; the rest of the width does.
        start: the step in which the response's first token was written; a row that sees nothing has one to come.
        step: [1], the step under way, which has written already.
    """

    group: Int[Tensor, " S"]
    prompt: Int[Tensor, " S"]
    start: Int[Tensor, " S"]
    step: Int[Tensor, " 1"]


def attend(query: Float[Tensor, "R H 1 D"], layer: SharedPrefixLayer, seen: Seen, scaling: float) -> Tensor:
    """Return softmax(query @ keys * scaling) @ values over what each row sees, [R, 1, H, D]; 0 for one that sees none.

    Keys and values must be of one width, and contiguous in it.
    """
    from lightning_rlvr.kernels import decoding

    (R, H, _, D), K = query.shape, layer.own_keys.shape[1]
    query = query.reshape(R, H, D).to(layer.own_keys.dtype).contiguous()
    parts = max(1, min(MOST_PARTS, PROGRAMS // (R * K)))
    out = query.new_empty(R, H, parts, D, dtype=torch.float32 if parts > 1 else query.dtype)
    mass = query.new_empty(R, H, parts, dtype=torch.float32)
    prompts, own = (layer.prompt_keys, layer.prompt_values), (layer.own_keys, layer.own_values)
    decoding.decode_attention(query, prompts, own, seen, out, mass, scaling)
    if parts > 1:
        out = (mass.softmax(dim=-1).unsqueeze(-1) * out).sum(dim=2).to(query.dtype)
    return out.view(R, 1, H, D)
