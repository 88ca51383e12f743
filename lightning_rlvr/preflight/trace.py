"""Passes of a model over fake tensors, which have shapes and no data: what each holds in memory, in bytes.

The code that is traced is the model's own, so activations need no formula for each architecture. Tensors claim to be on
a CPU, whose attention and autocast keep what those of a GPU keep.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lightning_rlvr.models.attention import attends_plainly
from lightning_rlvr.models.flat import Layout, flat_pass
from lightning_rlvr.models.lean import find_lean
from lightning_rlvr.models.packing import PromptStates, keys_as_they_are, run_backbone
from lightning_rlvr.rollout.decoder import read_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_rlvr.preflight.placement import Placement


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within and still live: `now`, and the most so far, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it makes; what it gets is known before, or is not counted."""
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor):
                self._known.setdefault(value.untyped_storage(), 0)
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        size = self._known[storage] = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


class UpdatePass(NamedTuple):
    """Bytes of a micro-batch: kept by its forward pass for the backward one, and the most at any time of both."""

    activations: int
    peak: int


class PromptPass(NamedTuple):
    """Bytes of reading prompts: their keys and values, those in the dtype of products, and the most at any time."""

    cache: int
    rounded: int
    peak: int


class OptimizerStep(NamedTuple):
    """Bytes of an optimizer: its state, and the most that a step takes beside it."""

    state: int
    extra: int


@contextmanager
def fake(model: PreTrainedModel, autocast: torch.dtype | None) -> Iterator[nn.Module]:
    """Give a copy of a model on the meta device with fake weights, whose gradients are there already."""
    copied = copy.deepcopy(model)
    find_lean(copied.get_decoder())  # which fake tensors do not tell
    with FakeTensorMode(), torch.autocast("cpu", autocast, cache_enabled=False) if autocast else nullcontext():
        made: dict[Tensor, Tensor] = {}  # a tied weight is one tensor
        for module in copied.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for held in tables:
                for name, old in held.items():
                    if old is not None:
                        held[name] = made[old] = made[old] if old in made else _like(old)
        yield copied


def _like(old: Tensor) -> Tensor:
    """Return a fake tensor in place of one on the meta device, with a gradient if it is a parameter."""
    new = torch.empty(old.shape, dtype=old.dtype)
    if not isinstance(old, nn.Parameter):
        return new
    parameter = nn.Parameter(new, old.requires_grad)
    parameter.grad = torch.empty(old.shape, dtype=old.dtype) if old.requires_grad else None
    return parameter


def update_pass(
    model: PreTrainedModel,
    prompts: int,
    rows: int,
    widths: tuple[int, int],
    joined: bool,
    place: Placement,
) -> UpdatePass:
    """Trace a micro-batch without its head: prompts read once for their rows, or joined with each.

    Args:
        model: on the meta device.
        prompts: of the micro-batch.
        rows: responses to them.
        widths: tokens of a prompt and of a response.
        joined: whether each row has its prompt in its own pass.
        place: where it is to run.
    """
    prompt, response = widths
    device = torch.device("cuda" if place.accelerator else "cpu")
    with fake(model, place.autocast) as policy:
        backbone = policy.get_decoder()  # type: ignore[operator]
        with LiveBytes() as live, nullcontext() if joined else keys_as_they_are(device):
            if joined:
                ids = torch.zeros(rows, prompt + response - 1, dtype=torch.long)
                hidden = run_backbone(backbone, ids, torch.ones_like(ids, dtype=torch.bool))
            elif attends_plainly(model):
                whose = [row % prompts for row in range(rows)]
                layout = Layout([prompt] * prompts, [response] * rows, whose, torch.device("cpu"))
                hidden = flat_pass(backbone, torch.zeros(len(layout.position), dtype=torch.long), layout)
            else:
                ids = torch.zeros(prompts, prompt, dtype=torch.long)
                read = PromptStates(backbone, ids, torch.ones_like(ids, dtype=torch.bool))
                answers = torch.zeros(rows, response - 1, dtype=torch.long)
                hidden = read.answered(torch.arange(rows) % prompts, answers).flatten(0, 1)
            kept = live.now
            hidden.backward(torch.zeros_like(hidden))
        return UpdatePass(kept, live.peak)


def prompt_pass(model: PreTrainedModel, prompts: int, prompt: int, autocast: torch.dtype | None) -> PromptPass:
    """Trace the reading of prompts before they are answered."""
    with fake(model, autocast) as policy, LiveBytes() as live, torch.no_grad():
        policy.eval()  # recomputed layers would keep no cache
        seen = torch.ones(prompts, prompt, dtype=torch.bool)
        _, cache = read_prompts(policy, seen.long(), seen)  # type: ignore[arg-type]
        held = tree_iter([vars(layer) for layer in cache.layers])  # keys and values, states of recurrent layers
        states = [x for x in held if isinstance(x, Tensor) and x.dim() > 1]
        rounded = sum(x.numel() * min(x.element_size(), (autocast or x.dtype).itemsize) for x in states)
        return PromptPass(sum(x.nbytes for x in states), rounded, live.peak)


def optimizer_step(
    model: PreTrainedModel, make: Callable[[Any], torch.optim.Optimizer], accelerator: bool
) -> OptimizerStep | None:
    """Trace an optimizer's first step; None if it cannot be: its kernels know no fake tensors."""
    try:
        with fake(model, None) as policy, LiveBytes() as live:
            optimizer = make(policy.parameters())
            for group in optimizer.param_groups:
                if accelerator and group.get("foreach", 0) is None and not group.get("fused"):
                    group["foreach"] = True  # torch's choice on an accelerator
            optimizer.step()
            state = [value for of in optimizer.state.values() for value in of.values() if isinstance(value, Tensor)]
            held = sum(value.nbytes for value in state if value.dim() > 0)
            return OptimizerStep(held, live.peak - held)
    except Exception:  # noqa: BLE001 - an optimizer may fail in any way at what it was not made for
        return None
