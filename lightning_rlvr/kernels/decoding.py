"""A decoding step: its attention, and what stands between that and the products before.

See rollout/decode_attention.py and rollout/llama_gpu.py for what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

LEAST = 16  # rows and columns of a product
# By bytes of a key's elements: keys read at a time, and how many such reads are under way.
BLOCKS = {2: (64, 3), 4: (32, 2)}


@triton.jit
def _more(query, key_at, value_at, seen, columns, scaling, top, total, sums):
    """Go on with the softmax over a block of keys: `top` is the greatest score so far, the rest relative to it."""
    mask = seen[:, None] & columns[None, :]
    keys = tl.load(key_at, mask=mask, other=0.0)
    values = tl.load(value_at, mask=mask, other=0.0)
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scaling
    scores = tl.where(seen[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp(scores - higher[:, None])
    shrink = tl.exp(top - higher)
    sums = sums * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return higher, total * shrink + tl.sum(weights, axis=1), sums


@triton.jit
def _attend(
    query,
    prompt_keys,
    prompt_values,
    own_keys,
    own_values,
    group,
    prompt,
    start,
    step,
    out,
    mass,
    scaling,
    width,
    limit,
    of_group,
    of_prompt_head,
    of_place,
    of_row,
    of_own_head,
    of_column,
    SHARED: tl.constexpr,  # query heads of a head of keys
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    M: tl.constexpr,  # SHARED and D, as products take them
    WIDE: tl.constexpr,
):
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m, d, n = tl.arange(0, M), tl.arange(0, WIDE), tl.arange(0, BLOCK)
    columns = d < D
    heads = (row * tl.num_programs(1) + head) * SHARED + m  # of query and out
    q = tl.load(query + heads[:, None] * D + d[None, :], mask=(m < SHARED)[:, None] & columns[None, :], other=0.0)
    top = tl.full([M], -1e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, WIDE], tl.float32)

    first = tl.load(prompt + row).to(tl.int32)
    base = tl.load(group + row) * of_group + head * of_prompt_head
    for at in range(first + part * BLOCK, width, PARTS * BLOCK):
        place = at + n
        where = base + place.to(tl.int64)[:, None] * of_place + d[None, :]
        top, total, sums = _more(
            q, prompt_keys + where, prompt_values + where, place < width, columns, scaling, top, total, sums
        )

    begin = tl.load(start + row)
    count = (tl.load(step) + 1 - begin).to(tl.int32)
    base = row.to(tl.int64) * of_row + head * of_own_head
    for at in range(part * BLOCK, count, PARTS * BLOCK):
        column = (begin + at + n) % limit
        where = base + column[:, None] * of_column + d[None, :]
        top, total, sums = _more(
            q, own_keys + where, own_values + where, at + n < count, columns, scaling, top, total, sums
        )

    sums = sums / tl.maximum(total, 1e-30)[:, None]
    at = heads * PARTS + part
    tl.store(out + at[:, None] * D + d[None, :], sums, mask=(m < SHARED)[:, None] & columns[None, :])
    tl.store(mass + at, top + tl.log(tl.maximum(total, 1e-30)), mask=m < SHARED)


def decode_attention(
    query: Tensor,
    prompts: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    seen: Sequence[Tensor],
    out: Tensor,
    mass: Tensor,
    scaling: float,
) -> None:
    """Attend part by part: where there is more than one, they are to be put together by their weights.

    Args:
        query: [R, H, D], contiguous.
        prompts: keys and values [B, K, P, D].
        own: keys and values [S, K, T, D].
        seen: the prompt of each row, its first place, the step in which its response began, and the step under way.
        out: [R, H, parts, D], contiguous: filled with what each part of the keys comes to.
        mass: [R, H, parts], contiguous: filled with the logarithm of each part's weight.
        scaling: of the products.
    """
    (R, H, D), K = query.shape, own[0].shape[1]
    block, stages = BLOCKS[query.element_size()]
    _attend[(R, K, out.shape[2])](
        query,
        *prompts,
        *own,
        *seen,
        out,
        mass,
        scaling,
        prompts[0].shape[2],
        own[0].shape[2],
        *prompts[0].stride()[:3],
        *own[0].stride()[:3],
        SHARED=H // K,
        D=D,
        PARTS=out.shape[2],
        BLOCK=block,
        M=max(LEAST, triton.next_power_of_2(H // K)),
        WIDE=max(LEAST, triton.next_power_of_2(D)),
        num_warps=4,
        num_stages=stages,
    )


@triton.jit
def _turn_and_store(
    heads,
    query,
    keys,
    values,
    cos,
    sin,
    position,
    column,
    query_norm,
    key_norm,
    query_epsilon,
    key_epsilon,
    of_row,
    of_head,
    of_column,
    H,
    K,
    NORMED: tl.constexpr,
    HALF: tl.constexpr,
    WIDE: tl.constexpr,
):
    row, head, at = tl.program_id(0), tl.program_id(1), tl.arange(0, WIDE)
    inside = at < HALF
    source = heads + (row * (H + 2 * K) + head).to(tl.int64) * 2 * HALF + at
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if head < H + K:
        if NORMED:
            square = (tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)) / (2 * HALF)
            scale = tl.rsqrt(square + (query_epsilon if head < H else key_epsilon))
            weight = (query_norm if head < H else key_norm) + at
            first *= scale * tl.load(weight, mask=inside, other=0.0).to(tl.float32)
            second *= scale * tl.load(weight + HALF, mask=inside, other=0.0).to(tl.float32)
        angle = tl.load(position + row) * 2 * HALF + at
        turned = first * tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        turned -= second * tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        second *= tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)
        second += first * tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32)
        first = turned
    if head < H:
        target = query + (row * H + head).to(tl.int64) * 2 * HALF + at
    else:
        place = row.to(tl.int64) * of_row + ((head - H) % K) * of_head + tl.load(column) * of_column + at
        target = (keys if head < H + K else values) + place
    tl.store(target, first, mask=inside)
    tl.store(target + HALF, second, mask=inside)


def turn_and_store(
    heads: Tensor,
    own: tuple[Tensor, Tensor],
    angles: tuple[Tensor, Tensor],
    position: Tensor,
    column: Tensor,
    norms: Sequence[tuple[Tensor | None, float]],
) -> Tensor:
    """Turn queries and keys by the angles of their positions, and write keys and values in a column of their rows.

    Args:
        heads: queries, keys and values of each row, [R, H + 2 K, D], contiguous.
        own: keys and values of responses, [S, K, T, D], the same in memory.
        angles: cosines and sines by position, [P, D], contiguous.
        position: [R], contiguous.
        column: [1], where in T to write.
        norms: weight [D] and epsilon of the queries' RMSNorm and of the keys', or None of both.

    Returns: The queries, [R, H, D].
    """
    (rows, every, width), kinds = heads.shape, own[0].shape[1]
    query = heads.new_empty(rows, every - 2 * kinds, width)
    weights = [query if weight is None else weight for weight, _ in norms]
    _turn_and_store[(rows, every)](
        heads,
        query,
        *own,
        *angles,
        position,
        column,
        *weights,
        *(epsilon for _, epsilon in norms),
        *own[0].stride()[:3],
        every - 2 * kinds,
        kinds,
        NORMED=norms[0][0] is not None,
        HALF=width // 2,
        WIDE=triton.next_power_of_2(width // 2),
        num_warps=1,
    )
    return query
