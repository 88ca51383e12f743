"""The Trainer of lightning with one more job: scoring questions."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import lightning
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from rich.console import Console

from lightning_rlvr.curriculum.report import write_report
from lightning_rlvr.store import user_path
from lightning_rlvr.training.datamodule import RLVRDataModule
from lightning_rlvr.training.module import RLVRModule
from lightning_rlvr.training.scoring import QuestionScores
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
        path = user_path(output, "output")
        if path.suffix != ".parquet":
            raise UserError(f"output must end in .parquet, got {output!r}. Set output.")
        if not os.access(next(p for p in path.absolute().parents if p.exists()), os.W_OK):
            raise UserError(f"{path} cannot be written. Set output to a place that can.")
        launcher, before = self.strategy.launcher, signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that children are ended below
        try:
            if launcher is None:
                self._score(model, datamodule, path, report)
            else:
                launcher.launch(self._score, model, datamodule, path, report, trainer=self)
        except BaseException:
            if isinstance(launcher, _SubprocessScriptLauncher):
                launcher.kill(signal.SIGTERM)
            rank_zero_info("what has been scored is kept: the same command goes on from there")
            raise
        finally:
            signal.signal(signal.SIGTERM, before)

    def _score(self, model: RLVRModule, datamodule: RLVRDataModule, path: Path, report: bool) -> None:
        self.strategy.connect(model)
        self.strategy.setup_environment()
        datamodule.trainer = model.trainer = self
        datamodule.load("score", model)
        questions = datamodule.question_scores(model)
        if self.local_rank == 0:
            model.prepare_data()
        self.strategy.barrier("policy prepared")
        with self.precision_plugin.module_init_context():
            model.configure_model()
        datamodule.check_length("train", model, model.policy)
        self.precision_plugin.convert_module(model)
        model.to(self.strategy.root_device)
        try:
            questions.make(path, "output")
        finally:
            model.reward.close()
            self.strategy.teardown()
        self._report_scores(datamodule, questions, path, report)

    @rank_zero_only
    def _report_scores(self, datamodule: RLVRDataModule, questions: QuestionScores, path: Path, report: bool) -> None:
        table, curriculum = questions.read(path, "output"), datamodule.curriculum
        entropy = table[f"semantic_entropy_{curriculum.estimator}"]
        screen = Console(markup=False, soft_wrap=True, highlight=False)
        screen.print(
            f"{len(table)} questions scored: semantic entropy {entropy.mean():.3f} nats on average, "
            f"{(entropy == 0).mean():.0%} agreed, pass rate {table['pass_rate'].mean():.3f}. Written to {path}"
        )
        if not report:
            return
        try:
            stages = curriculum.cut(questions.prompts, table, datamodule.seed)
        except UserError as error:
            rank_zero_warn(f"the report shows no stages: {error}")
            stages = []
        page = path.with_suffix(".html")
        write_report(table, curriculum, stages, questions.about, page)
        screen.print(f"report: {page.resolve()}")
