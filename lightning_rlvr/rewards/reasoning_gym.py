"""Answers to reasoning_gym questions, judged by the scorer of their data set."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from lightning_rlvr.rewards.exact import AnswerFinder
from lightning_rlvr.types import Prompt, Response, Reward, Status, UserError, Verdict

EXECUTING = frozenset(
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)  # their scorers pass the answer to eval or sympy.parse_expr, which evaluates it as Python
UNTRUSTED = {
    "coin_flip": "it gives full marks to a matching prefix, and Fraction('1e99999999') hangs this process",
    "game_of_life_halting": "it gives full marks to any answer that is not empty",
}  # found in reasoning-gym 0.1.25
MAX_ANSWER = 4_000  # characters: a longer answer is unparsable. Time is not bounded by it: see UNTRUSTED

Scorer = Callable[[str, dict[str, Any]], float]


class ReasoningGymScore(Reward):
    r"""Score 1.0 if the data set's scorer gives the final answer full marks, else 0.0: no partial credit.

    Reads prompt.metadata["source_dataset"] and prompt.metadata["entry"], the entry the question came from,
    as tasks.ReasoningGym stores them; scorers run in this process with the settings of the task's data set in
    prompt.metadata["config"] (the defaults, if it is missing). The nine that execute the answer and the two
    that accept wrong ones (coin_flip, game_of_life_halting) are refused by `check`. See AnswerFinder for
    `answer_pattern`; where the whole response is the answer, set it to '(?s)\A(.*)\Z'. An answer over 4,000
    characters is UNPARSABLE; one at which the scorer raises is ERROR.
    """

    def __init__(self, answer_pattern: str = "") -> None:
        self.find = AnswerFinder(answer_pattern)
        self.answer_pattern = answer_pattern
        self._scorers: dict[tuple[str, str], Scorer] = {}  # by name and config

    def __repr__(self) -> str:
        return f"ReasoningGymScore(answer_pattern={self.answer_pattern!r}, reasoning-gym {version('reasoning-gym')})"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the scorers out of copies and pickles: they hold whole data sets and are made anew."""
        return self.__dict__ | {"_scorers": {}}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError if a prompt has no entry, or its scorer is unknown or not to be trusted."""
        for prompt in prompts:
            self._scorer(prompt)
            _entry(prompt)

    def __call__(self, responses: Sequence[Response], prompts: Sequence[Prompt]) -> list[Verdict]:
        """Judge responses[i] as an answer to prompts[i]; UNPARSABLE where no final answer is found."""
        return [self._judge(r.text, prompt) for r, prompt in zip(responses, prompts, strict=True)]

    def _judge(self, text: str, prompt: Prompt) -> Verdict:
        scorer, entry = self._scorer(prompt), _entry(prompt)
        answer = (self.find(text) or "").strip()
        if not answer or len(answer) > MAX_ANSWER:
            return Verdict(0.0, Status.UNPARSABLE)
        try:
            score = scorer(answer, entry)
        except Exception:  # noqa: BLE001 - untrusted text met a scorer that did not expect it: the verdict says so
            return Verdict(0.0, Status.ERROR, answer)
        if score == 1.0:
            return Verdict(1.0, Status.CORRECT, answer)
        return Verdict(0.0, Status.WRONG, answer)

    def _scorer(self, prompt: Prompt) -> Scorer:
        name = prompt.metadata.get("source_dataset")
        if not isinstance(name, str):
            name = ""
        config = _config(prompt)
        key = (name, json.dumps(config, sort_keys=True, default=str))
        if key in self._scorers:
            return self._scorers[key]
        if name in EXECUTING:
            raise UserError(
                f"the scorer of a data set must not execute answers, got {name!r} for question {prompt.uid!r}: "
                "its scorer evaluates what the model wrote as Python code, in this process. Choose other data "
                "sets in data.train.init_args, or another reward (ExactMatch) in reward.class_path."
            )
        if name in UNTRUSTED:
            raise UserError(
                f"the scorer of a data set must tell right answers from wrong ones, got {name!r} for question "
                f"{prompt.uid!r}: {UNTRUSTED[name]}. Use ExactMatch in reward.class_path, or choose other data "
                "sets in data.train.init_args."
            )
        from reasoning_gym.factory import DATASETS

        if name not in DATASETS:
            raise UserError(
                f"metadata['source_dataset'] must name a data set of reasoning_gym, got {name!r} for question "
                f"{prompt.uid!r}: its scorer is the verifier. Use the task lightning_rlvr.tasks.ReasoningGym."
            )
        dataset, settings = DATASETS[name]
        try:
            scorer: Scorer = dataset(config=settings(**config)).score_answer
        except Exception as error:
            raise UserError(
                f"metadata['config'] must suit the data set {name!r}, got {config} for question {prompt.uid!r}: "
                f"{error}. Its scorer is built with it. Use the task lightning_rlvr.tasks.ReasoningGym."
            ) from error
        self._scorers[key] = scorer
        return scorer


def _config(prompt: Prompt) -> dict[str, Any]:
    """Return the settings of the question's data set, but for the size of it: no scorer depends on that."""
    config = prompt.metadata.get("config", {})
    if not isinstance(config, Mapping):
        raise UserError(
            f"metadata['config'] must hold settings by name, got {type(config).__name__} for question "
            f"{prompt.uid!r}: the scorer is built with them. Use the task lightning_rlvr.tasks.ReasoningGym."
        )
    return {key: value for key, value in config.items() if key != "size"}


def _entry(prompt: Prompt) -> dict[str, Any]:
    """Return a copy of the question's entry: some scorers change what they are given."""
    entry = prompt.metadata.get("entry")
    if not isinstance(entry, Mapping) or not {"question", "answer", "metadata"} <= entry.keys():
        raise UserError(
            f"metadata['entry'] must hold question, answer and metadata, got {type(entry).__name__} for "
            f"question {prompt.uid!r}: the scorer needs them. Use the task lightning_rlvr.tasks.ReasoningGym."
        )
    return copy.deepcopy(dict(entry))
