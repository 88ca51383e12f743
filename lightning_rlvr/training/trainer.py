"""The Trainer of lightning with one more job: scoring questions."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import lightning
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from lightning_rlvr.training.datamodule import RLVRDataModule
from lightning_rlvr.training.module import RLVRModule
from lightning_rlvr.types import UserError


class Trainer(lightning.Trainer):
    """lightning.Trainer with `score` beside fit, validate, test and predict."""

    def score(
        self, model: RLVRModule, datamodule: RLVRDataModule, output: str = "scores.parquet", report: bool = True
    ) -> None:
        """Score the semantic entropy of the training questions and write them to a parquet file.

        Questions are written as they are finished: killed at any moment, the same command goes on where it stopped. All
        processes of the strategy take their share.

        Args:
            model: the module whose policy answers.
            datamodule: whose training questions are scored, as its `scoring` says.
            output: the file to write; `data.scoring.file` reads it. Scores of anything else are not overwritten.
            report: whether to write a page about the scores beside the file, with .html for .parquet.
        """
        path = Path(output).expanduser()
        if path.suffix != ".parquet":
            raise UserError(f"output must end in .parquet, got {output!r}. Set output.")
        if not os.access(next(p for p in path.absolute().parents if p.exists()), os.W_OK):
            raise UserError(f"{path} cannot be written. Set output to a place that can.")
        launcher = self.strategy.launcher
        try:
            if launcher is None:
                self._score(model, datamodule, path, report)
            else:
                launcher.launch(self._score, model, datamodule, path, report, trainer=self)
        except BaseException:
            if isinstance(launcher, _SubprocessScriptLauncher):
                launcher.kill(signal.SIGTERM)
            raise

    def _score(self, model: RLVRModule, datamodule: RLVRDataModule, path: Path, report: bool) -> None:
        self.strategy.connect(model)
        self.strategy.setup_environment()
        datamodule.trainer = model.trainer = self
        datamodule.load("score", model)
        if self.local_rank == 0:
            model.prepare_data()
        self.strategy.barrier("policy prepared")
        model.configure_model()
        model.to(self.strategy.root_device)
        try:
            datamodule.make_scores(model, path, "output")
        finally:
            model.reward.close()
            self.strategy.teardown()
        self._report_scores(model, datamodule, path, report)

    @rank_zero_only
    def _report_scores(self, model: RLVRModule, datamodule: RLVRDataModule, path: Path, report: bool) -> None:
        table = datamodule.read_scores(model, path, "output")
        entropy = table[f"semantic_entropy_{datamodule.curriculum.estimator}"]
        lines = [
            f"{len(table)} questions scored: semantic entropy {entropy.mean():.3f} nats on average, "
            f"{(entropy == 0).mean():.0%} agreed, pass rate {table['pass_rate'].mean():.3f}. Written to {path}"
        ]
        if report:
            page = path.with_suffix(".html")
            datamodule.write_score_report(model, table, page)
            lines.append(f"report: {page.resolve()}")
        Console().print(*lines, sep="\n")
