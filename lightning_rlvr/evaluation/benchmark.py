"""What models are evaluated on: a benchmark is a YAML file with a name, a task and a reward."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentError, ArgumentParser

from lightning_rlvr.evaluation.measure import AVERAGE
from lightning_rlvr.store import user_path
from lightning_rlvr.types import Prompt, Reward, Task, UserError

Unjudgeable = Literal["error", "drop"]


@dataclass(frozen=True)
class Benchmark:
    """Questions and the verifier of their answers."""

    name: str
    task: Task
    reward: Reward

    def questions(self, unjudgeable: Unjudgeable = "error") -> list[Prompt]:
        """Return all questions, or those that the reward can judge: the others are dropped and counted.

        Raises: UserError if there are none, a uid occurs twice, or a gold answer cannot be read and none is dropped.
        """
        try:
            return self._questions(unjudgeable)
        except UserError as error:
            raise UserError(f"benchmark {self.name!r}: {error}") from error

    def _questions(self, unjudgeable: Unjudgeable) -> list[Prompt]:
        prompts = self.task.load()
        if not prompts:
            raise UserError("it must have questions, got none. Change the task in its file.")
        if len({prompt.uid for prompt in prompts}) < len(prompts):
            raise UserError("its uids must be unique: results are stored by uid. Set its uid_column.")
        if unjudgeable == "drop":
            prompts = self._judgeable(prompts)
        self.reward.check(prompts)
        return prompts

    def _judgeable(self, prompts: list[Prompt]) -> list[Prompt]:
        gone = set(self.reward.unjudgeable(prompts))
        if len(gone) == len(prompts):
            raise UserError("the reward can judge none of its questions. Change task or reward in its file.")
        if gone:
            examples = ", ".join(prompts[i].uid for i in sorted(gone)[:3])
            warnings.warn(
                f"benchmark {self.name!r}: dropped {len(gone)} of {len(prompts)} questions as the reward cannot judge "
                f"them: {examples}{', ...' if len(gone) > 3 else ''}",
                stacklevel=2,
            )
        return [prompt for i, prompt in enumerate(prompts) if i not in gone]


def check_names(names: Sequence[str], setting: str) -> None:
    """Raise UserError unless the names can stand for models or benchmarks: in file names, tables and results.json."""
    bad = [n for n in names if not n.strip() or not n.isprintable() or n.startswith(".") or n == AVERAGE]
    if bad or not names:
        raise UserError(
            f"{setting} must be at least one, each with a name of one line that does not begin with a dot and is not "
            f"{AVERAGE!r}, got {list(names)}: results are stored by name. Set {setting}."
        )


def read_benchmark(path: str | Path) -> Benchmark:
    """Read a benchmark's file: the keys `name`, `task` and `reward`, the last two with class_path and init_args.

    Raises: UserError if there is no such file or it is no benchmark.
    """
    file = user_path(path, "benchmarks")
    if not file.is_file():
        raise UserError(
            f"a benchmark must be a YAML file, got {str(path)!r}: there is no such file (looked for "
            f"{file.absolute()}). Set benchmarks; configs/benchmarks holds some."
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--name", type=str, required=True)
    parser.add_argument("--task", type=Task, required=True)
    parser.add_argument("--reward", type=Reward, required=True)
    try:
        made = parser.instantiate_classes(parser.parse_path(str(file)))
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(
            f"a benchmark must have exactly the keys name, task and reward, but {file} does not read as one: {error}. "
            "Change the file, or set benchmarks."
        ) from error
    return Benchmark(made.name, made.task, made.reward)


def read_benchmarks(paths: Sequence[str | Path]) -> list[Benchmark]:
    """Read several. Raises: UserError if there are none or two have the same name."""
    found = [read_benchmark(path) for path in paths]
    names = [benchmark.name for benchmark in found]
    check_names(names, "benchmarks")
    if len(set(names)) < len(names):
        raise UserError(
            f"benchmarks must be files each with a name of its own, got {names}: results are stored by name. Set "
            "benchmarks."
        )
    return found
