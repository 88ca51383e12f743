"""Answers to reasoning_gym questions, judged by the scorer of their data set."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from lightning_rlvr.rewards.exact import AnswerFinder
from lightning_rlvr.rewards.sandbox import End, Limits, Program, Sandbox
from lightning_rlvr.types import Prompt, Response, Reward, Status, UserError, Verdict

EXECUTING = frozenset({"countdown", "intermediate_integration", "polynomial_multiplication", "simple_integration"})
# their scorers pass the answer to sympy.parse_expr, which evaluates it as Python
TEXTUAL = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
# theirs pass it to eval, but only to give part of the marks: full ones are for the text alone
UNTRUSTED = {
    "puzzle24": "it evaluates the answer as Python, and gives full marks to any four numbers that make 24",
    "coin_flip": "it gives full marks to a matching prefix, and Fraction('1e99999999') hangs this process",
    "game_of_life_halting": "it gives full marks to any answer that is not empty",
}  # found in reasoning-gym 0.1.25
MAX_ANSWER = 4_000  # characters: a longer answer is unparsable. Time is not bounded by it: see UNTRUSTED
IMPORT_S = 60.0  # that reasoning_gym may take to be imported
MEMORY_MB = 2048  # of address space: reasoning_gym with sympy and numpy

Scorer = Callable[[str, dict[str, Any]], float]


class ReasoningGymScore(Reward):
    r"""Score 1.0 if the data set's scorer gives the final answer full marks, else 0.0: no partial credit.

    Reads prompt.metadata["source_dataset"] and prompt.metadata["entry"], the entry the question came from,
    as tasks.ReasoningGym stores them; scorers run in this process with the settings of the task's data set in
    prompt.metadata["config"] (the defaults, if it is missing). See AnswerFinder for `answer_pattern`; where the whole
    response is the answer, set it to '(?s)\A(.*)\Z'. An answer over 4,000 characters is UNPARSABLE; one at which the
    scorer raises is ERROR.

    Nine scorers evaluate the answer as Python. Four of them (countdown, polynomial_multiplication and both
    integrations) run in the sandbox, at the level isolated, for `timeout_s` seconds an answer (TIMEOUT), and see only
    plain arithmetic; other text is UNPARSABLE. Four (binary_matrix, n_queens, spiral_matrix, string_insertion) give
    full marks for equal text only, which is compared without them. `check` refuses the ninth, puzzle24, and two more
    that accept wrong answers (coin_flip, game_of_life_halting), and the first four where nothing can be isolated.
    """

    def __init__(self, answer_pattern: str = "", timeout_s: float = 5.0) -> None:
        if not 0 < timeout_s < math.inf:
            raise UserError(
                f"timeout_s must be a finite number of seconds above 0, got {timeout_s}: it bounds the evaluation of "
                "an answer. Set reward.init_args.timeout_s."
            )
        self.find = AnswerFinder(answer_pattern)
        self.answer_pattern, self.timeout_s = answer_pattern, timeout_s
        self.sandbox = Sandbox("isolated")
        self._scorers: dict[tuple[str, str], Scorer] = {}  # by name and config

    def __repr__(self) -> str:
        return (
            f"ReasoningGymScore(answer_pattern={self.answer_pattern!r}, timeout_s={self.timeout_s}, "
            f"reasoning-gym {version('reasoning-gym')})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave the scorers out of copies and pickles: they hold whole data sets and are made anew."""
        return self.__dict__ | {"_scorers": {}}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError if a prompt has no entry, or its scorer is unknown or not to be trusted."""
        for prompt in prompts:
            self._scorer(prompt)
            _entry(prompt)
            if _name(prompt) in EXECUTING:
                self.sandbox.ground()

    def __call__(self, responses: Sequence[Response], prompts: Sequence[Prompt]) -> list[Verdict]:
        """Judge responses[i] as an answer to prompts[i]; UNPARSABLE where no final answer is found."""
        answers = [(self.find(response.text) or "").strip() for response in responses]
        verdicts = [self._judge(a, p) for a, p in zip(answers, prompts, strict=True)]
        open_ = [i for i, verdict in enumerate(verdicts) if verdict is None]
        found = self._evaluate([(answers[i], prompts[i]) for i in open_])
        judged = dict(zip(open_, found, strict=True))
        return [judged[i] if verdict is None else verdict for i, verdict in enumerate(verdicts)]

    def _judge(self, answer: str, prompt: Prompt) -> Verdict | None:
        """Judge in process; None for what has to be evaluated."""
        scorer, entry = self._scorer(prompt), _entry(prompt)
        if not answer or len(answer) > MAX_ANSWER:
            return Verdict(0.0, Status.UNPARSABLE)
        if _name(prompt) in EXECUTING:
            return None
        try:
            score = _same_text(answer, entry) if _name(prompt) in TEXTUAL else scorer(answer, copy.deepcopy(entry))
        except Exception:  # noqa: BLE001 - untrusted text met a scorer that did not expect it: the verdict says so
            return Verdict(0.0, Status.ERROR, answer)
        return _verdict(score, answer)

    def _evaluate(self, items: Sequence[tuple[str, Prompt]]) -> list[Verdict]:
        """Score answers in the sandbox: all in one process, and what follows one that ended it in another."""
        texts = [
            json.dumps({"name": _name(p), "config": _config(p), "entry": _entry(p), "answer": answer}, default=str)
            for answer, p in items
        ]
        if texts:
            self.sandbox.ground()
        verdicts: list[Verdict] = []
        while len(verdicts) < len(items):
            rest = texts[len(verdicts) :]
            more = {"items": rest, "timeout_s": self.timeout_s}
            limits = Limits(IMPORT_S + self.timeout_s * len(rest), MEMORY_MB)
            run = self.sandbox.run(Program("gym", "", more, readable=_packages()), limits)
            scores = [json.loads(line) for line in run.output.splitlines()]
            answers = [answer for answer, _ in items[len(verdicts) :]]
            verdicts += [_verdict(score, answer) for score, answer in zip(scores, answers, strict=False)]
            if len(scores) < len(rest):
                timed_out = run.end is End.TIMEOUT or run.code == 128 + signal.SIGALRM
                status = Status.TIMEOUT if timed_out else Status.ERROR
                verdicts.append(Verdict(0.0, status, None if timed_out else answers[len(scores)]))
        return verdicts

    def _scorer(self, prompt: Prompt) -> Scorer:
        name, config = _name(prompt), _config(prompt)
        key = (name, json.dumps(config, sort_keys=True, default=str))
        if key in self._scorers:
            return self._scorers[key]
        if name in UNTRUSTED:
            raise UserError(
                f"the scorer of a data set must tell right answers from wrong ones, got {name!r} for question "
                f"{prompt.uid!r}: {UNTRUSTED[name]}. Use ExactMatch in reward.class_path, or choose other data "
                "sets in the task."
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


def _name(prompt: Prompt) -> str:
    name = prompt.metadata.get("source_dataset")
    return name if isinstance(name, str) else ""


def _verdict(score: float | None, answer: str) -> Verdict:
    if score is None:
        return Verdict(0.0, Status.UNPARSABLE)
    return Verdict(1.0, Status.CORRECT, answer) if score == 1.0 else Verdict(0.0, Status.WRONG, answer)


def _same_text(answer: str, entry: Mapping[str, Any]) -> float:
    """Return 1.0 for the text of an answer that the data set takes for right."""
    right = entry["metadata"].get("valid_answers") or [entry["answer"]]
    return float(answer in [text.strip() for text in right])


def _packages() -> list[str]:
    """Return the folders of installed packages, where the sandbox finds reasoning_gym."""
    return [folder for folder in sys.path if folder.endswith("-packages") and os.path.isdir(folder)]


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
    """Return the question's entry. Some scorers change what they are given: let them have a copy."""
    entry = prompt.metadata.get("entry")
    if not isinstance(entry, Mapping) or not {"question", "answer", "metadata"} <= entry.keys():
        raise UserError(
            f"metadata['entry'] must hold question, answer and metadata, got {type(entry).__name__} for "
            f"question {prompt.uid!r}: the scorer needs them. Use the task lightning_rlvr.tasks.ReasoningGym."
        )
    return dict(entry)
