"""What models are evaluated on: a benchmark is a YAML file with a name, a task and a reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from lightning_rlvr.types import Prompt, Reward, Task, UserError


@dataclass(frozen=True)
class Benchmark:
    """Questions and the verifier of their answers."""

    name: str
    task: Task
    reward: Reward

    def questions(self) -> list[Prompt]:
        """Return all questions, each of which the reward can judge.

        Raises: UserError if there are none, a uid occurs twice, or a gold answer cannot be read.
        """
        prompts = self.task.load()
        if not prompts:
            raise UserError(f"benchmark {self.name!r} must have questions, got none. Change the task in its file.")
        if len({prompt.uid for prompt in prompts}) < len(prompts):
            raise UserError(
                f"the uids of benchmark {self.name!r} must be unique: results are stored by uid. Set its uid_column."
            )
        self.reward.check(prompts)
        return prompts


def read_benchmark(path: str | Path) -> Benchmark:
    """Read a benchmark's file: the keys `name`, `task` and `reward`, the last two with class_path and init_args.

    Raises: UserError if there is no such file or it is no benchmark.
    """
    file = Path(path).expanduser()
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
    twice = {name for name in names if names.count(name) > 1}
    if not found or twice:
        raise UserError(
            f"benchmarks must be at least one file, each with a name of its own, got {names}: results are stored by "
            "name. Set benchmarks."
        )
    return found
