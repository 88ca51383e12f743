"""Generations of `predict` as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter


class PredictionWriter(BasePredictionWriter):
    """Writes one JSON object a response to predictions.jsonl in the run's folder, batch by batch.

    With several processes each writes a file of its own, predictions-RANK.jsonl.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

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
        name = "predictions.jsonl" if trainer.world_size == 1 else f"predictions-{trainer.global_rank}.jsonl"
        with (Path(trainer.default_root_dir) / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in prediction)
