"""The Trainer of lightning with one more job: scoring questions."""

from __future__ import annotations

import os
from pathlib import Path

import lightning
from rich.console import Console

from lightning_rlvr.training.datamodule import RLVRDataModule
from lightning_rlvr.training.module import RLVRModule
from lightning_rlvr.types import UserError


class Trainer(lightning.Trainer):
    """lightning.Trainer with `score` beside fit, validate, test and predict."""

    def score(self, model: RLVRModule, datamodule: RLVRDataModule, output: str = "scores.parquet") -> None:
        """Score the semantic entropy of the training questions and write them to a parquet file.

        Args:
            model: the module whose policy answers.
            datamodule: whose training questions are scored, as its `scoring` says.
            output: the file to write; `data.scoring.file` reads it. An existing file is not overwritten.
        """
        path = Path(output).expanduser()
        if path.exists():
            raise UserError(f"{path} exists and would be overwritten. Set output to a new file.")
        if not os.access(next(p for p in path.absolute().parents if p.exists()), os.W_OK):
            raise UserError(f"{path} cannot be written. Set output to a place that can.")
        if self.world_size > 1:
            raise UserError(f"score runs in one process, got {self.world_size}. Set trainer.devices to 1.")
        datamodule.load("score", model)
        model.prepare_data()
        model.configure_model()
        model.to(self.strategy.root_device)
        try:
            table = datamodule.save_scores(model, path)
        finally:
            model.reward.close()
        entropy = table["semantic_entropy_discrete"]
        Console().print(
            f"{len(table)} questions scored: semantic entropy {entropy.mean():.3f} nats on average, "
            f"{(entropy == 0).mean():.0%} agreed, pass rate {table['pass_rate'].mean():.3f}. Written to {path}"
        )
