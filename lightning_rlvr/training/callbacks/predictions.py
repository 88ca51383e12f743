"""Generations of `predict` as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console


class PredictionWriter(BasePredictionWriter):
    """Writes one JSON object a response to predictions.jsonl in the run's folder, batch by batch.

    With several processes each writes a file of its own, predictions-RANK.jsonl. Until all are written the file is
    called .predictions.jsonl.partial.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the file."""
        self._partial(trainer).touch()

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: list[dict[str, Any]],
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append the responses of a batch."""
        with self._partial(trainer).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the file its name, now that it is whole, and say where it is."""
        partial = self._partial(trainer)
        path = partial.replace(partial.with_name(partial.stem.removeprefix(".")))
        Console(markup=False, soft_wrap=True, highlight=False).print(f"predictions: {path.resolve()}")

    @staticmethod
    def _partial(trainer: Trainer) -> Path:
        rank = "" if trainer.world_size == 1 else f"-{trainer.global_rank}"
        return Path(trainer.default_root_dir) / f".predictions{rank}.jsonl.partial"
