"""What the policy writes: a few samples on the screen, all of them in a file."""

from __future__ import annotations

import json
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_rlvr.training.distributed import gather_on_first

LENGTH = 300  # characters of a text shown in the table


class SampleTable(Callback):
    """Prints a table of held-out samples after each validation and keeps samples in samples.jsonl.

    Args:
        rows: samples in a table, of different questions as far as there are.
        keep: held-out samples written to samples.jsonl (and to TensorBoard) at each validation.
    """

    def __init__(self, rows: int = 4, keep: int = 64) -> None:
        self.rows, self.keep = rows, keep
        self._samples: list[dict[str, Any]] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect samples: the first of each question before the second of any."""
        if trainer.sanity_checking:
            return
        for number in range(batch.samples):
            self._samples += outputs["samples"][number :: batch.samples]
            if len(self._samples) >= self.keep:
                break

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table and write the file, of all ranks."""
        if trainer.sanity_checking:
            return
        parts, self._samples = gather_on_first(self._samples[: self.keep]), []
        if parts is None:
            return
        in_turns = chain.from_iterable(zip_longest(*parts))
        samples = [sample for sample in in_turns if sample is not None][: self.keep]
        step = trainer.global_step
        Console().print(sample_table(samples[: self.rows], f"held-out samples at step {step}"))
        with (Path(trainer.default_root_dir) / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in samples)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                text = "\n\n---\n\n".join(f"{s['prompt']}\n\n> {s['response']}" for s in samples[: self.rows])
                logger.experiment.add_text("samples", text, trainer.fit_loop.epoch_loop._batches_that_stepped)


def sample_table(samples: list[dict[str, Any]], title: str) -> Table:
    """Return a table of sample records (Experience.samples); texts are shown as they are, long ones cut."""
    table = Table(title=title, title_justify="left")
    for name in ("prompt", "response", "gold", "verdict", "reward", "tokens"):
        table.add_column(name, justify="right" if name in ("reward", "tokens") else "left")
    for s in samples:
        table.add_row(
            *(Text(text if len(text) <= LENGTH else text[:LENGTH] + " ...") for text in (s["prompt"], s["response"])),
            Text(s["gold"]),
            Text(s["status"], style="green" if s["status"] == "correct" else "red"),
            f"{s['reward']:.2f}",
            str(s["tokens"]),
        )
    return table
