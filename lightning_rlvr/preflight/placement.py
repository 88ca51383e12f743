"""How a strategy and a precision of Lightning share weights, gradients and optimizer state out over processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lightning_rlvr.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
WHOLE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "32-true": None, "64-true": torch.float64}
ALIASES = {"bf16": "bf16-mixed", "16": "16-mixed", "32": "32-true", "64": "64-true", "None": "32-true"}


@dataclass(frozen=True)
class Placement:
    """Where the parts of training lie.

    Args:
        world: processes that train together.
        accelerator: whether they train on GPUs.
        dtype: that the whole model is converted to; None leaves it.
        autocast: dtype of products where it is not that of the weights.
        weights, gradients, optimizer: over how many processes each is shared out.
        master_bytes: of a float32 copy of each weight that the optimizer keeps.
        buckets: whether gradients are held twice, to be exchanged.
        gradients_stay: whether they lie in buffers that are there between updates too.
    """

    world: int = 1
    accelerator: bool = False
    dtype: torch.dtype | None = None
    autocast: torch.dtype | None = None
    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    master_bytes: int = 0
    buckets: bool = False
    gradients_stay: bool = False

    @property
    def joined(self) -> bool:
        """Whether a prompt is computed with each of its responses: sharded weights are there for one pass only."""
        return self.weights > 1

    def gathered_whole(self, model: PreTrainedModel) -> int:
        """Return the bytes of all weights in each process, as they are gathered for sampling."""
        return self._gathered(sum(parameter.numel() for parameter in model.parameters()), model)

    def gathered_parts(self, model: PreTrainedModel) -> int:
        """Return the bytes of what is gathered at a time in training: two layers, and the weights outside of layers."""
        counts = [sum(p.numel() for p in layer.parameters()) for layer in getattr(model.get_decoder(), "layers", ())]
        outside = sum(parameter.numel() for parameter in model.parameters()) - sum(counts)
        return self._gathered(outside + 2 * max(counts, default=0), model)

    def _gathered(self, count: int, model: PreTrainedModel) -> int:
        if self.weights == 1:
            return 0
        return count * (self.autocast or model.dtype).itemsize


def placement(trainer: Mapping[str, Any], gpu: bool) -> Placement:
    """Read `trainer` of a config.

    Args:
        trainer: its accelerator, devices, num_nodes, strategy and precision.
        gpu: what accelerator `auto` means.

    Raises: UserError if the strategy or precision is not known here.
    """
    accelerator = str(trainer.get("accelerator") or "auto")
    on_gpu = gpu if accelerator == "auto" else accelerator not in ("cpu",)
    world = _devices(trainer.get("devices"), on_gpu) * int(trainer.get("num_nodes") or 1)
    precision = str(trainer.get("precision") or "32-true")
    precision = ALIASES.get(precision, precision)
    if precision not in AUTOCAST and precision not in WHOLE:
        known = ", ".join([*AUTOCAST, *WHOLE])
        raise UserError(f"precision must be one of {known} to be counted, got {precision}. Set trainer.precision.")
    found = Placement(world, on_gpu, WHOLE.get(precision), AUTOCAST.get(precision))
    strategy = trainer.get("strategy") or "auto"
    name, settings = (strategy, {}) if isinstance(strategy, str) else _class(strategy)
    return _shared(found, name, settings)


def _shared(found: Placement, name: str, settings: Mapping[str, Any]) -> Placement:
    """Share out by the strategy of that name."""
    world = found.world
    if name in ("auto", "single_device", "SingleDeviceStrategy") and world == 1:
        return found
    if name == "auto" or name.startswith("ddp") or name == "DDPStrategy":
        view = world > 1 and bool(settings.get("gradient_as_bucket_view"))
        return replace(found, buckets=world > 1 and not view, gradients_stay=view)
    if name in ("fsdp2", "FSDP2Strategy", "ModelParallelStrategy"):
        return replace(found, weights=world, gradients=world, optimizer=world)
    if name.startswith("deepspeed") or name == "DeepSpeedStrategy":
        stage = int(settings.get("stage") or (name.split("stage_")[1][0] if "stage_" in name else 2))
        whole = found.autocast or found.dtype
        half = whole in (torch.bfloat16, torch.float16)
        away = 10**9  # what is offloaded takes nothing here
        return replace(
            found,
            dtype=whole,
            autocast=None,
            weights=world if stage >= 3 else 1,
            gradients=world if stage >= 2 else 1,
            optimizer=away if "offload" in name or settings.get("offload_optimizer") else world,
            master_bytes=4 if half else 0,
            gradients_stay=True,
        )
    raise UserError(
        f"strategy must be ddp, fsdp2, ModelParallelStrategy or a deepspeed_stage to be counted, got {name}. "
        "Set trainer.strategy."
    )


def _class(strategy: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    return str(strategy["class_path"]).rpartition(".")[2], strategy.get("init_args") or {}


def _devices(devices: Any, gpu: bool) -> int:
    if isinstance(devices, (list, tuple)):
        return len(devices)
    text = str(devices if devices is not None else "auto")
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if text in ("auto", "-1"):
        return max(1, torch.cuda.device_count()) if gpu else 1
    return int(text)
