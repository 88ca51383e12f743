"""A decoder that holds the keys and values of a prompt once for all its responses, and copies nothing as they grow.

The softmax over a prompt and a response is taken over both together; only the products with keys and values are made
apart: those of a prompt with the queries of all its rows at a time, those of responses row by row. Keys carry their
position (rotary embeddings are applied before they are cached), so their order in memory is free: each response lies in
a ring of as many columns as a response can have tokens, in which all rows write the same column at the same time. Off
the kernel below it has few columns at first, and gets more: memory is read three times as fast without gaps in it.

On a GPU both products and the softmax are one kernel, see decode_attention.py, and a step is a CUDA graph, see
graphs.py. It has places for some more rows than there are, which see nothing. Where a model's layers are known, a step
is done in few calls (llama_step.py) or kernels (llama_gpu.py), after a comparison with its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer

from lightning_rlvr.kernels import available
from lightning_rlvr.models.attention import NotPlainError, beyond_softmax
from lightning_rlvr.models.forward import PROBE_TOLERANCE
from lightning_rlvr.models.memory import out_of_memory
from lightning_rlvr.rollout import decode_attention
from lightning_rlvr.rollout.decode_attention import Seen
from lightning_rlvr.rollout.decoder import Decoder, read_prompts
from lightning_rlvr.rollout.graphs import Graphs, rows_for
from lightning_rlvr.rollout.linear import linears
from lightning_rlvr.rollout.llama_gpu import LlamaGpuStep
from lightning_rlvr.rollout.llama_step import LlamaStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "lightning_rlvr_shared_prefix"
LAYER = "shared_prefix_layer"  # attribute of the keys and values that a layer hands to its attention
NEVER = 1 << 30  # the step in which a row begins that stands for none
COLUMNS = 16  # of a response at first
AGREES = 1e-4  # of the greatest logit, in float32: differences of rounding are 100 times less


class SharedPrefixDecoder(Decoder):
    """For models that `attends_plainly` takes. The longest prompts must be read first.

    Args:
        model: in evaluation mode.
        rows: the most at a time.
        limit: the most tokens of a response.

    Raises: NotPlainError in the first `step` if a layer's attention is not plain after all.
    """

    joins = True

    def __init__(self, model: PreTrainedModel, rows: int, limit: int) -> None:
        self.model, self.rows, self.limit = model, rows, limit
        self.layout = Layout(model.device)
        self.few_calls: LlamaStep | LlamaGpuStep | None = None
        self.graphs: Graphs | None = None
        self.linears: AbstractContextManager[Any] = nullcontext()
        self.plain = False  # as far as is known
        self.layers: list[SharedPrefixLayer] = []

    def read(self, ids: Int[Tensor, "B P"], mask: Bool[Tensor, "B P"], samples: int) -> Float[Tensor, "B V"]:
        """Append rows, for which there must be room."""
        logits, cache = read_prompts(self.model, ids, mask)
        layout, lengths = self.layout, mask.sum(dim=1).tolist()
        if not self.layers:
            self.layers = [SharedPrefixLayer(layout) for _ in cache.layers]
            self.cache = Cache(layers=list(self.layers))
            kernel = all(_fits_kernel(keys, values) for keys, values, *_ in cache)
            layout.begin(ids.shape[1], self.rows, self.limit, self.model.dtype, kernel)
            self.graphs = Graphs.of(self.model) if kernel else None
            if LlamaStep.supports(self.model):
                self.few_calls = LlamaStep(self.model, ids.shape[1] + self.limit)
            elif kernel and LlamaGpuStep.supports(self.model):
                self.few_calls = LlamaGpuStep(self.model, ids.shape[1] + self.limit)
            self.linears = nullcontext() if self.few_calls else linears(self.model)
            self.logits = logits.new_empty(self.rows if self.graphs else 0, logits.shape[1])
        if layout.make_room(len(lengths)) and self.graphs:
            self.graphs.clear()
        for layer, (keys, values, *_) in zip(self.layers, cache, strict=True):
            layer.load(keys, values)
        layout.append(mask, lengths, samples)
        return logits

    def step(self, token: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """Pass a token of each row through the model, with its attention replaced."""
        self.layout.open_column()
        logits = self._by_graph(token) if self.graphs and self.plain else self._directly(token)
        self.layout.close_column()
        return logits

    def _directly(self, token: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        return self._pass(token) if self.few_calls is None else self._in_few_calls(token, self.few_calls)

    def _in_few_calls(self, token: Int[Tensor, " R"], step: LlamaStep | LlamaGpuStep) -> Float[Tensor, "R V"]:
        """Do a step by what is known of the model's layers; the first time, see whether the model says the same.

        The result is that of a later time to the bit: runs that go on in another process depend on it.
        """
        known = self.model in _IN_FEW_CALLS
        own = None if known else self._pass(token)
        logits = step(token, self.layout.position[: len(token), 0], self.layers)  # the keys that stay are its own
        agrees = PROBE_TOLERANCE.get(logits.dtype, AGREES)
        if own is None or torch.allclose(logits, own, rtol=0, atol=agrees * float(own.abs().max())):
            _IN_FEW_CALLS.add(self.model)
            self.plain = True
            return logits
        self.few_calls, self.linears = None, linears(self.model)
        return self._pass(token)

    def _by_graph(self, token: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """Do a step by a graph, or without where it cannot be captured."""
        assert self.graphs is not None
        count, rows = len(token), rows_for(len(token), self.rows)
        self.layout.token[:count] = token

        def compute() -> None:
            self.logits[:rows] = self._directly(self.layout.token[:rows])

        try:
            self.graphs.run(rows, compute)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            name, reason = type(self.model).__name__, str(error).partition("\n")[0]
            warnings.warn(f"{name} is sampled without CUDA graphs, which is slower: {reason}", stacklevel=2)
            self.graphs = None
            return self._directly(token)
        return self.logits[:count]

    def _pass(self, token: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        layout, config = self.layout, self.model.config
        layout.attended = 0
        before = config._attn_implementation
        config._attn_implementation = NAME
        try:
            with self.linears:
                output = self.model(
                    input_ids=token[:, None],
                    attention_mask=layout.mask,
                    position_ids=layout.position[: len(token)],
                    past_key_values=self.cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
        finally:
            config._attn_implementation = before
        if layout.attended != len(self.layers):
            raise NotPlainError(f"{layout.attended} of {len(self.layers)} layers asked for attention")
        self.plain = True
        return output.logits[:, -1]

    def keep(self, alive: Sequence[bool]) -> list[int]:
        """Fill the places of ended rows, and of prompts without rows, with the last ones."""
        rows = Filling(alive)
        group = [self.layout.group[row] for row in rows.order]
        live = set(group)
        groups = Filling([g in live for g in range(len(self.layout.length))])
        for layer in self.layers:
            layer.fill(rows, groups)
        self.layout.fill(rows, groups, group)
        return rows.order


_IN_FEW_CALLS: WeakSet[nn.Module] = WeakSet()  # models of which it is known


class Filling:
    """How places are filled so that the kept ones come first and as few as possible move.

    >>> Filling([True, False, True, False, True]).order
    [0, 4, 2]
    """

    def __init__(self, alive: Sequence[bool]) -> None:
        count = sum(alive)
        self.holes = [i for i in range(count) if not alive[i]]
        self.movers = [i for i in range(count, len(alive)) if alive[i]]
        self.order = list(range(count))
        for hole, mover in zip(self.holes, self.movers, strict=True):
            self.order[hole] = mover
        self._at: tuple[Tensor, Tensor] | None = None  # both, on the device

    def apply(self, values: Tensor) -> None:
        """Move what is at the movers' places to the holes, in place."""
        if not self.holes:
            return
        if self._at is None:
            self._at = torch.tensor(self.holes, device=values.device), torch.tensor(self.movers, device=values.device)
        holes, movers = self._at
        values.index_copy_(0, holes, values.index_select(0, movers))


class Layout:
    """Which rows there are and what they see: the same for all layers.

    `bias` is added to the scores: of a row over `width` places for its prompt (left-padded), then the ring's columns.
    With a `kernel`, `seen` says the same.
    """

    kernel: bool
    bias: Float[Tensor, "S C"]
    seen: Seen
    column_at: Int[Tensor, " 1"]  # of `column`, for the kernel
    position: Int[Tensor, "S 1"]  # of each row's next token
    token: Int[Tensor, " S"]  # of each row, for graphs

    def __init__(self, device: torch.device) -> None:
        self.mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)  # stands for all this in the model's call
        self.device = device
        self.group: list[int] = []  # of each row
        self.length: list[int] = []  # of each group's prompt
        self.start: list[int] = []  # steps done when each group came
        self.width = self.limit = self.columns = self.steps = self.column = self.attended = self.room = 0

    def begin(self, width: int, rows: int, limit: int, dtype: torch.dtype, kernel: bool) -> None:
        """Have places for rows of at most `limit` tokens to prompts of at most `width`."""
        self.width, self.limit, self.kernel = width, limit, kernel
        self.columns = limit if kernel else min(limit, COLUMNS)
        self.position = torch.zeros(rows, 1, dtype=torch.long, device=self.device)
        if kernel:
            self.token, group, prompt, start = torch.zeros(4, rows, dtype=torch.long, device=self.device)
            self.column_at, step = torch.zeros(2, 1, dtype=torch.long, device=self.device)
            self.seen = Seen(group, prompt, start, step)
        else:
            self.bias = torch.zeros(rows, width + limit, dtype=dtype, device=self.device)

    def make_room(self, groups: int) -> bool:
        """Have places for so many groups more; say whether there were too few."""
        needed, had = len(self.length) + groups, self.room
        if needed > had:
            self.room = max(needed, 3 * had // 2)
        return needed > had

    def append(self, mask: Bool[Tensor, "B P"], lengths: list[int], samples: int) -> None:
        """Add the rows of groups; the first ones start the ring anew."""
        if not self.group:
            self.steps = 0
        rows = slice(len(self.group), len(self.group) + len(lengths) * samples)
        seen = mask.repeat_interleave(samples, dim=0)
        if not self.kernel:
            self.bias[rows] = -torch.inf
            self.bias[rows, self.width - mask.shape[1] : self.width].masked_fill_(seen, 0.0)
        self.position[rows] = seen.sum(dim=1, keepdim=True)
        first = len(self.length)
        self.group += [first + i for i in range(len(lengths)) for _ in range(samples)]
        self.length += lengths
        self.start += [self.steps] * len(lengths)
        self._arrange()

    def fill(self, rows: Filling, groups: Filling, group: list[int]) -> None:
        """Fill the places of what has ended; `group` holds the old group of each kept row."""
        if not self.kernel:
            rows.apply(self.bias)
        rows.apply(self.position)
        place = {old: new for new, old in enumerate(groups.order)}
        self.group = [place[g] for g in group]
        self.length = [self.length[g] for g in groups.order]
        self.start = [self.start[g] for g in groups.order]
        self._arrange()

    def open_column(self) -> None:
        """Choose the column in which all rows write, whose last writers have ended by now, and let them see it."""
        self.column = self.steps % self.limit
        if self.column == self.columns:
            self.columns = min(self.limit, 2 * self.columns)
        if self.kernel:
            self.column_at.fill_(self.column)
            self.seen.step.fill_(self.steps)
        else:
            self.bias[: len(self.group), self.width + self.column] = 0

    def close_column(self) -> None:
        """Count the step."""
        self.steps += 1
        self.position[: len(self.group)] += 1

    def _arrange(self) -> None:
        """Say how rows are packed for the product with their prompts: [B, G], with any row where a group has fewer."""
        if self.kernel:
            self._show()
            return
        members: list[list[int]] = [[] for _ in self.length]
        for row, g in enumerate(self.group):
            members[g].append(row)
        self.widest = max(map(len, members), default=0)
        packed = [row for m in members for row in m + m[:1] * (self.widest - len(m))]
        place = {row: i for i, row in reversed(list(enumerate(packed)))}
        regular = packed == list(range(len(self.group)))
        self.pack = None if regular else torch.tensor(packed, device=self.device)
        self.unpack = None if regular else torch.tensor([place[r] for r in range(len(place))], device=self.device)
        self.longest = max(self.length, default=0)
        self.unequal = min(self.length, default=0) < self.longest or max(self.start, default=0) > 0

    def _show(self) -> None:
        """Say in `seen` what each row sees; what lies behind the rows sees nothing."""
        rest = len(self.position) - len(self.group)
        group = self.group + [0] * rest
        prompt = [self.width - self.length[g] for g in self.group] + [self.width] * rest
        start = [self.start[g] for g in self.group] + [NEVER] * rest
        for at, values in zip(self.seen, (group, prompt, start), strict=False):  # the step is written elsewhere
            at.copy_(torch.tensor(values))


class SharedPrefixLayer(DynamicLayer):
    """A layer's keys and values: of prompts [B, K, P, D], left-padded; of responses [S, K, T, D].

    Those of responses have room for all their columns, and lie in the first part of it.
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    own_keys: Tensor
    own_values: Tensor
    rooms: list[Tensor]  # of both

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def load(self, keys: Tensor, values: Tensor) -> None:
        """Take over the keys and values [B, K, P, D] of new prompts, whose rows will be appended."""
        at = self.layout
        keys, values = _as_multiplied(keys), _as_multiplied(values)
        if not self.is_initialized:
            self.rooms = [x.new_empty(len(at.position) * x.shape[1] * at.limit * x.shape[3]) for x in (keys, values)]
            sizes = (len(at.position), keys.shape[1], at.columns)
            self.own_keys, self.own_values = (
                _first(room, *sizes, x.shape[3]).zero_() for room, x in zip(self.rooms, (keys, values), strict=True)
            )
            self.prompt_keys, self.prompt_values, self.is_initialized = keys, values, True
            return
        new = slice(len(at.length), len(at.length) + len(keys))
        self.prompt_keys, self.prompt_values = (self._roomy(x) for x in (self.prompt_keys, self.prompt_values))
        for prompts, come in ((self.prompt_keys, keys), (self.prompt_values, values)):
            prompts[new, :, at.width - come.shape[2] :] = come
        if not at.kernel:
            for own in (self.own_keys, self.own_values):
                own[len(at.group) :] = 0  # see `_widen`

    def _widen(self) -> None:
        """Have as many columns as the layout says; what rows hold in new ones is masked, but must not be nan."""
        had, columns, rows = self.own_keys.shape[2], self.layout.columns, len(self.layout.group)
        if had == columns:
            return
        keys, values = (
            _first(room, *own.shape[:2], columns, own.shape[3])
            for room, own in zip(self.rooms, (self.own_keys, self.own_values), strict=True)
        )
        for wide, own in ((keys, self.own_keys), (values, self.own_values)):
            new, old = wide.flatten(0, 1), own.flatten(0, 1)
            end = rows * own.shape[1]
            while end > 1:  # in place, from the last on: at a time those whose new places begin behind all old ones
                start = min(-(-end * had // columns), end - 1)
                moved = old[start:end]
                new[start:end, :had] = moved if start * columns >= end * had else moved.clone()
                end = start
            wide[:rows, :, had:] = 0
        self.own_keys, self.own_values = keys, values

    def _roomy(self, prompts: Float[Tensor, "B K P D"]) -> Float[Tensor, "C K P D"]:
        missing = self.layout.room - len(prompts)
        return torch.cat([prompts, prompts.new_zeros(missing, *prompts.shape[1:])]) if missing else prompts

    def fill(self, rows: Filling, groups: Filling) -> None:
        """Fill the places of what has ended."""
        for own in (self.own_keys, self.own_values):
            rows.apply(own)
        for prompts in (self.prompt_keys, self.prompt_values):
            groups.apply(prompts)

    def get_seq_length(self) -> int:
        """Return the columns in use."""
        return self.layout.width + self.layout.steps

    def store(self, keys: Float[Tensor, "R K D"], values: Float[Tensor, "R K E"]) -> None:
        """Write the new keys and values in the open column."""
        self._widen()
        for states, own in ((keys, self.own_keys), (values, self.own_values)):
            own[: len(states), :, self.layout.column] = states

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new keys and values [R, K, 1, D], and mark them so that attention finds this layer."""
        at, rows = self.layout, len(key_states)
        if at.kernel:
            for states, own in ((key_states, self.own_keys), (value_states, self.own_values)):
                own[:rows].index_copy_(2, at.column_at, states.to(own.dtype))
        else:
            self.store(key_states[:, :, 0], value_states[:, :, 0])
        for states in (key_states, value_states):
            setattr(states, LAYER, self)
        return key_states, value_states

    def attend(self, query: Float[Tensor, "R H 1 D"], scaling: float) -> Float[Tensor, "R 1 H E"]:
        """Return softmax(query @ keys) @ values over each row's prompt and response."""
        at = self.layout
        at.attended += 1
        if at.kernel:
            return decode_attention.attend(query, self, at.seen, scaling)
        R, H = query.shape[:2]
        K = self.own_keys.shape[1]
        B, P, T = len(at.length), at.longest, at.columns
        left = at.width - P
        prompt_keys, prompt_values = (x[:B, :, left:].flatten(0, 1) for x in (self.prompt_keys, self.prompt_values))
        own_keys, own_values = (x[:R].flatten(0, 1) for x in (self.own_keys, self.own_values))

        query = query.reshape(R, H, -1) * scaling
        shared = self._unpacked(torch.bmm(self._packed(query), prompt_keys.transpose(1, 2)), H)
        own = torch.bmm(query.reshape(R * K, H // K, -1), own_keys.transpose(1, 2))
        scores = torch.cat([shared, own.view(R, H, T)], dim=-1)
        if at.unequal or at.steps + 1 < T:
            scores += at.bias[:R, None, left : at.width + T]
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        p = scores.softmax(dim=-1, dtype=wide).to(scores.dtype)
        from_prompt = self._unpacked(torch.bmm(self._packed(p[:, :, :P]), prompt_values), H)
        from_own = torch.bmm(p.view(R * K, H // K, P + T)[:, :, P:], own_values)
        return from_own.view(R, 1, H, -1).add_(from_prompt.view(R, 1, H, -1))

    def _packed(self, values: Float[Tensor, "R H D"]) -> Float[Tensor, "M N D"]:
        """Lay the rows of a prompt side by side: [B * K, G * H / K, D]."""
        at, K = self.layout, self.own_keys.shape[1]
        values = values if at.pack is None else values.index_select(0, at.pack)
        values = values.reshape(len(at.length), at.widest, K, -1, values.shape[-1])
        return values.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def _unpacked(self, values: Float[Tensor, "M N D"], heads: int) -> Float[Tensor, "R H D"]:
        """Undo `_packed`."""
        at, K = self.layout, self.own_keys.shape[1]
        values = values.view(len(at.length), K, at.widest, heads // K, -1)
        values = values.transpose(1, 2).reshape(len(at.length) * at.widest, heads, -1)
        return values if at.unpack is None else values.index_select(0, at.unpack)


def _first(room: Tensor, *shape: int) -> Tensor:
    """Return the first part of a tensor in a shape."""
    return room[: prod(shape)].view(shape)


def _fits_kernel(keys: Tensor, values: Tensor) -> bool:
    """Say whether there is a kernel for a layer with those keys and values."""
    dtype = _as_multiplied(keys).dtype
    alike = dtype == _as_multiplied(values).dtype and keys.shape == values.shape and keys.stride() == values.stride()
    return alike and keys.stride(-1) == 1 and available(dtype, keys.device)


def _as_multiplied(states: Tensor) -> Tensor:
    """Round under autocast what its products would round at every step."""
    kind = states.device.type
    rounds = torch.is_autocast_enabled(kind) and states.dtype == torch.float32
    return states.to(torch.get_autocast_dtype(kind)) if rounds else states


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Hand a step's attention to the layer that stored its keys, if they come untouched from there."""
    layer: Any = getattr(key, LAYER, None)
    of_values: Any = getattr(value, LAYER, None)
    untouched = layer is not None and layer is of_values and attention_mask is layer.layout.mask
    if not untouched or beyond_softmax(kwargs):
        raise NotPlainError(type(module).__name__)
    return layer.attend(query, query.shape[-1] ** -0.5 if scaling is None else scaling), None


AttentionInterface.register(NAME, _attend)
