"""The form of a response, whatever it says."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_rlvr.rewards.exact import compiled
from lightning_rlvr.types import Prompt, Response, Reward, Status, Verdict

MAX_RESPONSE = 100_000  # characters: bounds the work of one match


class FormatMatch(Reward):
    r"""Score 1.0 if the whole response matches `pattern` (re.fullmatch; a dot matches line breaks too).

    A response over 100,000 characters does not match. Keep nested repetition, (a+)+, out of the pattern: it
    takes very long on text made for it. `Verdict.answer` is None: a form has no answer to compare. Raises
    UserError if the pattern is no regular expression.

    >>> reward = FormatMatch(r"<think>.*</think>\s*\\boxed\{.*\}")
    >>> prompt = Prompt("1", "1 + 1?", "2")
    >>> reward([Response("<think>\n1 + 1\n</think> \\boxed{2}"), Response("2")], [prompt, prompt])[1].score
    0.0
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = compiled(pattern, "pattern", re.DOTALL)

    def __repr__(self) -> str:
        return f"FormatMatch(pattern={self.pattern.pattern!r})"

    def __call__(self, responses: Sequence[Response], prompts: Sequence[Prompt]) -> list[Verdict]:
        """Match each response; the prompts are not looked at."""
        return [self._judge(response.text) for response in responses]

    def _judge(self, text: str) -> Verdict:
        if len(text) <= MAX_RESPONSE and self.pattern.fullmatch(text):
            return Verdict(1.0, Status.CORRECT)
        return Verdict(0.0, Status.WRONG)
