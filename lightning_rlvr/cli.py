"""LightningCLI for fit, validate, test, predict and score; its config is read by other commands as well."""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_rlvr import data_check, preflight
from lightning_rlvr.store import user_path, whole_file
from lightning_rlvr.training import RLVRDataModule, RLVRModule, Trainer
from lightning_rlvr.training.callbacks import (
    AdaptiveOrder,
    EntropyAlarm,
    EvaluateEnds,
    ExportPolicy,
    InertTerms,
    OrderLog,
    PredictionWriter,
    RunCheckpoints,
    RunFolder,
    RunSummary,
    SampleTable,
    SaveRollouts,
    StageBoundary,
    TokenLedger,
)
from lightning_rlvr.training.checkpoint import CheckpointFiles, Found, is_checkpoint, newest_checkpoint
from lightning_rlvr.training.metrics_file import MetricsFile
from lightning_rlvr.training.run_dir import CONFIG, continued, free_folder
from lightning_rlvr.types import UserError

MESSAGE = 1000  # characters of what a parser says


class Parser(LightningArgumentParser):
    """A parser whose errors are the error, without the page of all options before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        sys.stderr.write(f"error: {message}\nSee {self.prog.replace(' [options]', '')} --help.\n")
        sys.exit(2)


class ConfigFile(SaveConfigCallback):
    """Writes config.yaml into the run's folder, whole or not at all."""

    def save_config(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Write the file."""
        with whole_file(Path(trainer.default_root_dir) / CONFIG) as file:
            file.write(self.parser.dump(self.config, skip_none=False).encode())


class RLVRCLI(LightningCLI):
    """LightningCLI whose runs each have a folder of their own, with everything that they leave behind."""

    _found: Found | None = None  # the checkpoint that a run goes on from in its folder
    _goes_on = False  # whether the folder may have been begun before

    def __init__(self, args: list[str] | None = None) -> None:
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        words = sys.argv[1:] if args is None else args
        self._asked = words[0] if words and words[0] in self.subcommands() else None
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
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "python -m lightning_rlvr"},
            parser_class=Parser,
            save_config_callback=ConfigFile,
            save_config_kwargs={"save_to_log_dir": False},
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Add `score` to what Lightning has."""
        return {**LightningCLI.subcommands(), "score": {"model", "datamodule"}}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Give only the subcommand that is asked for its options: those of all five take half a second."""
        if self._asked not in (None, subcommand):
            return self.init_parser(**kwargs)
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's folder and the callbacks that every run has."""
        parser.add_argument(
            "--run_dir",
            default="runs/default",
            help="Folder for all that the run leaves behind. If it is not empty, -2, -3, ... is added to its name.",
        )
        parser.add_lightning_class_args(RunCheckpoints, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.save_last": True,
                "checkpoint.save_top_k": 0,  # last.ckpt and the one before it
                "checkpoint.every_n_train_steps": 10,
                "checkpoint.enable_version_counter": False,  # a run that goes on writes the files it would have written
            }
        )
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

    def _parse_ckpt_path(self) -> None:
        """Take no settings from the checkpoint: config.yaml has them, and a checkpoint is checked before it is read."""

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder, and the checkpoint that `last` stands for."""
        config = self.config[self.subcommand]
        wanted, checkpoint = user_path(config.run_dir, "run_dir"), config.get("ckpt_path")
        checkpoints = Path(config.checkpoint.dirpath or wanted / "checkpoints")
        folder = wanted
        if checkpoint == "last" and self.subcommand == "fit":
            config.ckpt_path, self._goes_on = None, True
            config.trainer.default_root_dir = config.run_dir = str(wanted)
            now = yaml.safe_load(self.parser.dump(self.config, skip_none=False))["fit"]
            self._found = continued(wanted, checkpoints, now)
            if self._found is None:
                rank_zero_info(f"there is no checkpoint in {checkpoints}: the run begins")
        else:
            folder = free_folder(wanted)
        if checkpoint == "last" and self.subcommand != "fit":
            found = newest_checkpoint(checkpoints)
            checkpoint = config.ckpt_path = str(found.path if found else checkpoints / "last.ckpt")
        config.trainer.default_root_dir = config.run_dir = str(folder)
        if checkpoint in (None, "best", "last", "hpc", "registry"):
            return
        if not Path(checkpoint).exists():
            raise UserError(f"there is no checkpoint {checkpoint}. Set ckpt_path.")
        if not is_checkpoint(Path(checkpoint)):
            raise UserError(
                f"ckpt_path must be a checkpoint, got {checkpoint}: it is none, or was cut short. Set ckpt_path."
            )

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Name the checkpoint that `last` stands for; the config left behind does not."""
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        return arguments if self._found is None else {**arguments, "ckpt_path": str(self._found.path)}

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
        done, lines = (0, {}) if self._found is None else self._found[1:]
        if config["logger"] in (None, True):
            folder = config["default_root_dir"]
            board = TensorBoardLogger(folder, name="", version="", purge_step=done if self._goes_on else None)
            config["logger"] = False if self.subcommand == "score" else [board, MetricsFile(folder)]
        plugins = config["plugins"] or []
        config["plugins"] = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in config["plugins"]):
            config["plugins"].append(CheckpointFiles())
        callbacks = [
            *callbacks,
            RunFolder(lines if self._goes_on else None),
            StageBoundary(),
            OrderLog(),
            AdaptiveOrder(),
            EvaluateEnds(),
            InertTerms(),
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


def check_before(words: list[str]) -> int:
    """`python -m lightning_rlvr preflight`: print the report, write it if asked to, return the exit status."""
    chosen, rest = preflight.options(words)
    built = ConfigOnly(["fit", *rest])
    report = preflight.inspect(built.datamodule, built.model, fit_settings(built), chosen["gpu_memory"])
    report.show()
    if chosen["output"] is not None:
        report.write(chosen["output"])
    return report.exit_status


def fit_settings(parsed: RLVRCLI) -> dict[str, Any]:
    """Return the resolved config of `fit` as a run writes it into its config.yaml."""
    return dict(parsed.config_dump)


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
    return fit_settings(parsed)


def run(words: Sequence[str]) -> None:
    """Run a subcommand of LightningCLI. Raises: UserError for what Lightning refuses as well."""
    try:
        RLVRCLI(list(words))
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
