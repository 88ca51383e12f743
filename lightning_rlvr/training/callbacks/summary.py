"""What a run came to: a few lines on the screen, and summary.json."""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from lightning_rlvr.store import whole_file

if TYPE_CHECKING:
    from lightning_rlvr.training.module import RLVRModule

PACKAGES = ("lightning_rlvr", "lightning", "torch", "transformers", "math-verify", "reasoning-gym")


class RunSummary(Callback):
    """Writes summary.json into the run's folder when fit ends or is interrupted, and prints it in short.

    Contents: held-out metrics before and after, mean token entropy of training first and last (nats), seconds
    by part, generated tokens a second, peak memory (bytes), optimizer steps, seed, versions, status.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._before = 0.0  # seconds that the run had taken when it was resumed
        self._peak = 0  # bytes, before it was resumed
        self._held_out: list[dict[str, float]] = []
        self._entropy: list[float] = []
        self._tokens = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know of its beginning."""
        counts = {"tokens": self._tokens, "seconds": self._seconds(), "peak": self._peak_memory()}
        return {"held_out": self._held_out, "entropy": self._entropy, **counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the summary of the run that is resumed."""
        self._held_out, self._entropy = state_dict["held_out"], state_dict["entropy"]
        self._tokens, self._before, self._peak = (state_dict[name] for name in ("tokens", "seconds", "peak"))

    def _seconds(self) -> float:
        return self._before + time.perf_counter() - self._start

    def _peak_memory(self) -> int:
        return max(self._peak, peak_memory())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the step's entropy and count its tokens."""
        if not outputs["samples"]:  # dynamic sampling is still collecting
            return
        self._entropy.append(float(trainer.callback_metrics["train/entropy"]))
        self._tokens += sum(sample["tokens"] for sample in outputs["samples"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the held-out metrics."""
        if trainer.sanity_checking:
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        self._held_out.append({"step": trainer.global_step, **metrics})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the summary of a finished run."""
        self._write(trainer, pl_module, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the summary of a run that was cut short while it trained."""
        if self._entropy:
            stopped = isinstance(exception, (KeyboardInterrupt, SystemExit))
            status = "interrupted" if stopped else f"failed: {exception!r}"
            self._write(trainer, pl_module, status)

    @rank_zero_only
    def _write(self, trainer: Trainer, pl_module: LightningModule, status: str) -> None:
        module = cast("RLVRModule", pl_module)
        seconds = module.clock.seconds
        summary = {
            "status": status,
            "before": self._held_out[0] if self._held_out else None,
            "after": self._held_out[-1] if self._held_out else None,
            "train_entropy": {"first": self._entropy[0], "last": self._entropy[-1]} if self._entropy else None,
            "seconds": {**seconds, "total": self._seconds()},
            "tokens_per_second": self._tokens * trainer.world_size / seconds["step"] if "step" in seconds else None,
            "peak_memory_bytes": self._peak_memory(),
            "optimizer_steps": trainer.global_step,
            "seed": module.seed,
            "versions": versions(),
        }
        root = Path(trainer.default_root_dir)
        with whole_file(root / "summary.json") as file:
            file.write((json.dumps(summary, indent=2) + "\n").encode())
        Console().print(summary_table(summary))
        Console(markup=False, soft_wrap=True, highlight=False).print(f"outputs: {root.resolve()}")


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
    """Return the version of a package, None of one that runs without being installed: the summary must not be lost."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def peak_memory() -> int:
    """Return the most memory held so far, in bytes: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def summary_table(summary: dict[str, Any]) -> Table:
    """Return the summary as a table: metrics before and after, then seconds by part."""
    table = Table("", "before", "after", title=f"run {summary['status']}", title_justify="left")
    before, after = summary["before"] or {}, summary["after"] or {}
    for name in before:
        if name != "step":
            table.add_row(name, f"{before[name]:.3f}", f"{after[name]:.3f}")
    entropy = summary["train_entropy"]
    if entropy:
        table.add_row("train/entropy (nats)", f"{entropy['first']:.3f}", f"{entropy['last']:.3f}")
    table.add_section()
    for part, seconds in summary["seconds"].items():
        table.add_row(f"seconds: {part}", "", f"{seconds:.1f}")
    table.add_row("peak memory (GiB)", "", f"{summary['peak_memory_bytes'] / 2**30:.2f}")
    return table
