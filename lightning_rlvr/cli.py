"""The command line: fit, validate, test, predict and score, and the commands that have a parser of their own."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_rlvr import compare, data_check, evaluation
from lightning_rlvr.report import command as report
from lightning_rlvr.store import user_path
from lightning_rlvr.sweep import command as sweep
from lightning_rlvr.training import RLVRDataModule, RLVRModule, Trainer
from lightning_rlvr.training.callbacks import (
    AdaptiveOrder,
    EntropyAlarm,
    EvaluateEnds,
    ExportPolicy,
    InertTerms,
    KeepLastCheckpoint,
    OrderLog,
    PredictionWriter,
    RunSummary,
    SampleTable,
    SaveRollouts,
    StageBoundary,
    TokenLedger,
)
from lightning_rlvr.types import UserError

PROGRAM = "python -m lightning_rlvr"
MESSAGE = 1000  # characters of what a parser says
DESCRIPTION = (
    "Train language models with verifiable rewards and watch their entropy. Beside the subcommands below there are, "
    f"with a --help of their own: `{PROGRAM} evaluate`, which takes models through benchmarks (pass@k, avg@k, maj@k "
    "with intervals); `data check`, which checks the questions of a config; `compare`, which replays one rollout batch "
    "under many objectives; `sweep`, which does every run of an experiment; and `report`, which makes its tables and "
    "figures."
)


class Parser(LightningArgumentParser):
    """A parser whose errors are the error, without the page of all options before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        sys.stderr.write(f"error: {message}\nSee {self.prog.replace(' [options]', '')} --help.\n")
        sys.exit(2)


class RLVRCLI(LightningCLI):
    """LightningCLI whose runs each have a folder of their own, with everything that they leave behind."""

    def __init__(self, args: list[str] | None = None) -> None:
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        super().__init__(
            RLVRModule,
            RLVRDataModule,
            trainer_class=Trainer,
            trainer_defaults={
                "use_distributed_sampler": False,  # the curriculum shares questions out itself
                "num_sanity_val_steps": 0,  # a whole validation precedes the first update
                "log_every_n_steps": 1,
            },
            seed_everything_default=1,
            # This mode resolves ${...} after overrides, not file by file.
            parser_kwargs={"parser_mode": "omegaconf+", "prog": PROGRAM, "description": DESCRIPTION},
            parser_class=Parser,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Add `score` to what Lightning has."""
        return {**LightningCLI.subcommands(), "score": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's folder and the callbacks that every run has."""
        parser.add_argument(
            "--run_dir",
            default="runs/default",
            help="Folder for all that the run leaves behind. If it is not empty, -2, -3, ... is added to its name.",
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.every_n_train_steps": 10})
        parser.add_lightning_class_args(SampleTable, "samples")
        parser.add_lightning_class_args(SaveRollouts, "save_rollouts")
        parser.add_lightning_class_args(TokenLedger, "ledger")
        parser.add_lightning_class_args(EntropyAlarm, "entropy_alarm")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the command line and its files. Raises: UserError, whatever they hold and whichever parser chokes."""
        try:
            super().parse_arguments(parser, args)
        except Exception as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())[:MESSAGE]
            raise UserError(
                f"the config must be UTF-8 YAML of the keys that --print_config shows, but reading it failed: {said}. "
                "Set what it names, or the file given with --config."
            ) from error

    def before_instantiate_classes(self) -> None:
        """Claim the run's folder."""
        config = self.config[self.subcommand]
        config.run_dir = str(free_folder(user_path(config.run_dir, "run_dir")))
        config.trainer.default_root_dir = config.run_dir
        checkpoint = config.get("ckpt_path")
        if checkpoint not in (None, "best", "last", "hpc", "registry") and not Path(checkpoint).exists():
            raise UserError(f"there is no checkpoint {checkpoint}. Set ckpt_path.")

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; a value that a class refuses is the user's to put right."""
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except ValueError as error:
            # Where a key takes one of several types, jsonargparse wraps what each of them said.
            said = [line.removeprefix("  - ") for line in str(error).splitlines() if line.startswith("  - ")]
            reasons = [line for line in said if not line.startswith("Expected a ")]
            raise UserError("; ".join(reasons) or str(error)) from error
        except (TypeError, AttributeError, LookupError, ArithmeticError) as error:  # a value of another kind
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"a value of the config must be of the kind that --help shows, but building what it names failed with "
                f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})."
            ) from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> lightning.Trainer:
        """Add the callbacks that every run has, and loggers into its folder unless others are configured."""
        if config["logger"] in (None, True):
            where = {"save_dir": config["default_root_dir"], "name": "", "version": ""}
            # Flushed at each step: an interrupted run keeps its metrics.
            loggers = [TensorBoardLogger(**where), CSVLogger(**where, flush_logs_every_n_steps=1)]
            config["logger"] = False if self.subcommand == "score" else loggers
        callbacks = [
            *callbacks,
            StageBoundary(),
            OrderLog(),
            AdaptiveOrder(),
            EvaluateEnds(),
            InertTerms(),
            KeepLastCheckpoint(),
            ExportPolicy(),
            RunSummary(),
            PredictionWriter(),
        ]
        return super()._instantiate_trainer(config, callbacks)


class ConfigOnly(RLVRCLI):
    """The same command line read and checked, and what it names built, but for trainer, seed and run."""

    def before_instantiate_classes(self) -> None:
        """Claim no folder."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Build no trainer."""
        return

    def _set_seed(self) -> None:
        """Leave the random state alone."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def check_data(words: list[str]) -> int:
    """`python -m lightning_rlvr data check`: print the report, write it if asked to, return the exit status."""
    chosen, rest = data_check.options(words)
    built = ConfigOnly(["fit", *rest])
    report = data_check.check(built.datamodule, built.model, chosen["ngram"], chosen["containment"])
    report.show()
    if chosen["output"] is not None:
        report.write(chosen["output"])
    return report.exit_status


def fit_config(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the resolved config of `fit` with these arguments, as a run writes it into its config.yaml.

    Raises: UserError if a key or a value is refused.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            parsed = ConfigOnly(["fit", *arguments])
    except SystemExit as error:
        raise UserError(said.getvalue().removeprefix("error: ").rstrip()) from error
    dumped: dict[str, Any] = yaml.safe_load(parsed.parser.dump(parsed.config, skip_none=False))
    return dict(dumped["fit"])


def free_folder(wanted: Path) -> Path:
    """Return the folder, or the first of wanted-2, wanted-3, ... that does not exist or is empty.

    Raises: UserError if it could not be written to, or has no name to add a number to.
    """
    wanted = wanted if wanted.name not in ("", "..") else Path(os.path.normpath(wanted.absolute()))
    if not wanted.name:
        raise UserError(f"run_dir must be a folder with a name, got {wanted}. Set run_dir.")
    there = next(path for path in (wanted, *wanted.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"run_dir must be a folder that can be written, got {wanted}: {there} is not. Set run_dir.")
    folder, number = wanted, 1
    while folder.exists() and any(folder.iterdir()):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def main(args: list[str] | None = None) -> None:
    """Run a subcommand; what the user can put right ends in one message and exit status 2."""
    for harmless in (
        r"Found \d+ module\(s\) in eval mode",  # on purpose: dropout would make the policy's ratio random
        r"The '\w+' does not have many workers",  # questions are already in memory
        r"Using ModelCheckpoint with manual optimization",  # saved after the update, as meant
        r"LightningCLI's args parameter",  # `data check` takes its own options off first
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=harmless)
    words = sys.argv[1:] if args is None else args
    try:
        if words[:1] == ["compare"]:
            compare.main(words[1:])
        elif words[:1] == ["evaluate"]:
            evaluation.main(words[1:])
        elif words[:2] == ["data", "check"]:
            sys.exit(check_data(words[2:]))
        elif words[:1] == ["report"]:
            report.main(words[1:])
        elif words[:1] == ["sweep"]:
            sweep.main(words[1:], fit_config)
        else:
            RLVRCLI(args)
    except (UserError, MisconfigurationException) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:  # before the trainer has started, which handles it itself
        sys.exit(130)
