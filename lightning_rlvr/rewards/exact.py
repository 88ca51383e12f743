r"""Answers compared as text."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence

from lightning_rlvr.rewards import extract
from lightning_rlvr.types import Prompt, Response, Reward, Status, UserError, Verdict


def compiled(pattern: str, key: str, flags: int = 0) -> re.Pattern[str]:
    """Compile a pattern of the user's. Raises UserError that names the key, also for null."""
    if pattern is None:
        raise UserError(
            f"{key} must be a text, got null: a value that starts with # is read as a comment on its way through "
            f"YAML. Write the first # as [#] in reward.init_args.{key}, or leave out a key that is not needed."
        )
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise UserError(
            f"{key} must be a regular expression of Python's re, got {pattern!r}: {error}. Set reward.init_args.{key}."
        ) from error


class AnswerFinder:
    r"""Finds the final answer in a response: the last match of a pattern, or where answers usually stand.

    `pattern` is a regular expression: group 1 of its last match is the answer, the whole match if it has no
    group. Without a pattern: the last \boxed{...}, else what follows #### on the last line. Only the last 20,000
    characters are looked at; a pattern with nested repetition, (a+)+, can still take very long on them.
    """

    def __init__(self, pattern: str = "") -> None:
        self.pattern = None if pattern == "" else compiled(pattern, "answer_pattern")

    def __call__(self, text: str) -> str | None:
        """Return the final answer as it stands, None if there is none."""
        if self.pattern is None:
            return extract.marked_answer(text)
        matches = deque(self.pattern.finditer(text[-extract.TAIL :]), maxlen=1)
        if not matches:
            return None
        found: str | None = matches[0].group(1 if self.pattern.groups else 0)
        return found


class ExactMatch(Reward):
    r"""Score 1.0 if the final answer is the gold answer, letter by letter, after normalisation.

    Normalisation strips, makes one space of white space and, with `ignore_case`, folds the case. See
    AnswerFinder for `answer_pattern`. Raises UserError if the pattern is no regular expression.
    """

    def __init__(self, answer_pattern: str = "", ignore_case: bool = False) -> None:
        self.find = AnswerFinder(answer_pattern)
        self.answer_pattern, self.ignore_case = answer_pattern, ignore_case

    def __repr__(self) -> str:
        return f"ExactMatch(answer_pattern={self.answer_pattern!r}, ignore_case={self.ignore_case})"

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError with the uid of the first gold answer that no response could equal.

        It is empty or, without a pattern, marks an answer of its own, as a worked solution does.
        """
        for prompt in prompts:
            if not self._normal(prompt.answer):
                raise UserError(
                    f"every gold answer must hold text, got {prompt.answer!r} for question {prompt.uid!r}: no "
                    "response could be right. Put the answer column of the data set right, or set the task's "
                    "answer_column or answer_pattern."
                )
            inner = self._inner(prompt)
            if inner is not None:
                raise UserError(
                    f"every gold answer must be the answer alone, got {prompt.answer[:200]!r} for question "
                    f"{prompt.uid!r}: of a response that ends so only {inner[:200]!r} is compared. Set the task's "
                    "answer_pattern."
                )

    def unjudgeable(self, prompts: Sequence[Prompt]) -> list[int]:
        """Return the places of the prompts whose gold answer no response could equal."""
        return [
            i for i, prompt in enumerate(prompts) if not self._normal(prompt.answer) or self._inner(prompt) is not None
        ]

    def _inner(self, prompt: Prompt) -> str | None:
        """Return the answer that a gold marks within itself, None if it is the answer alone."""
        inner = extract.marked_answer(prompt.answer) if self.find.pattern is None else None
        return None if inner is None or self._normal(inner) == self._normal(prompt.answer) else inner

    def __call__(self, responses: Sequence[Response], prompts: Sequence[Prompt]) -> list[Verdict]:
        """Judge responses[i] as an answer to prompts[i]; UNPARSABLE where no final answer is found."""
        return [self._judge(r.text, p.answer) for r, p in zip(responses, prompts, strict=True)]

    def _judge(self, text: str, gold: str) -> Verdict:
        found = self.find(text)
        answer = None if found is None else self._normal(found)
        if not answer:
            return Verdict(0.0, Status.UNPARSABLE)
        if answer == self._normal(gold):
            return Verdict(1.0, Status.CORRECT, answer)
        return Verdict(0.0, Status.WRONG, answer)

    def _normal(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text
