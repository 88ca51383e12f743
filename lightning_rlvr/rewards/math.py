r"""Answers to mathematical questions, judged by math-verify in worker processes.

Which part of a response is its final answer: the last \boxed{...} whose braces close; else what follows ####
on the last line; else the response as a whole if it is a plain number; else, unless the response was truncated, the
last expression that math-verify finds in the last lines.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_rlvr.rewards import extract
from lightning_rlvr.rewards.cache import BoundedCache
from lightning_rlvr.rewards.number import plain_number, same_number
from lightning_rlvr.rewards.pool import Outcome, WorkerPool
from lightning_rlvr.types import Prompt, Response, Reward, Status, UserError, Verdict

MAX_ANSWER = 1_000  # characters: a longer final answer is unparsable
LAST_LINES = 1_000  # characters in which the last expression is looked for
CACHE_ENTRIES = 20_000

_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\,|\\!,|,\\!)(?=\d{3}(?!\d))")
_JUDGE = Path(__file__).with_name("_math_judge.py")
Key = tuple[str, bool, str]  # answer, whether it is an answer as a whole (or lines to search), gold answer


class MathAnswer(Reward):
    r"""Score 1.0 if the final answer means the same as the gold answer under math-verify, else 0.0.

    Plain numbers are compared exactly in process; all else goes to `workers` processes (default: 2, or 1 on
    one core) under a limit of `timeout_s` seconds an answer and `memory_mb` MiB a process. Statuses: TIMEOUT
    and ERROR say that the verifier gave up, with score 0.0. `Verdict.answer` is a text that `equivalent`
    reads: 2/4 and \frac12 give 1/2, 1,234.0 gives 1234, other LaTeX is kept as math-verify normalises it.

    A gold answer with a percent sign is in percent: 300 answers 300\%, 3 does not. Decimals are rounded to 6
    places and to a millionth of their size: 0.333333 answers 1/3, 0.0000004 does not answer 0.0000002. Words
    are compared as words, whatever their case: live does not answer evil. A base is compared where both sides
    name one: 4210_6 does not answer 4210_5, 4210 does.
    """

    def __init__(self, workers: int | None = None, timeout_s: float = 5.0, memory_mb: int = 1024) -> None:
        count = min(2, os.cpu_count() or 1) if workers is None else workers
        self.timeout_s = timeout_s
        self._pool = WorkerPool(_JUDGE, "judge", count, timeout_s, memory_mb)
        self._verdicts: BoundedCache[Key, Verdict] = BoundedCache(CACHE_ENTRIES)
        self._same: BoundedCache[tuple[str, str], bool] = BoundedCache(CACHE_ENTRIES)

    def __repr__(self) -> str:
        return f"MathAnswer(timeout_s={self.timeout_s}, math-verify {version('math-verify')})"

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError with the uid and value of the first gold answer that math-verify cannot read."""
        golds = [_gold(prompt.answer) for prompt in prompts]
        hard = [gold for gold in dict.fromkeys(golds) if plain_number(gold) is None]
        outcomes = self._pool.map([{"do": "gold", "gold": gold[:MAX_ANSWER]} for gold in hard])
        bad = {g for g, found in zip(hard, outcomes, strict=True) if not found.value or len(g) > MAX_ANSWER}
        unread = [prompt for prompt, gold in zip(prompts, golds, strict=True) if gold in bad]
        if unread:
            raise UserError(
                f"every gold answer must be mathematics that math-verify can read and that equals itself, got "
                f"{unread[0].answer[:200]!r} for question {unread[0].uid!r} ({len(unread)} such of "
                f"{len(prompts)}): no response could be judged. Put the answer column of the data set right, "
                "set the task's answer key in data.train.init_args (or data.val), or choose another reward."
            )

    def __call__(self, responses: Sequence[Response], prompts: Sequence[Prompt]) -> list[Verdict]:
        """Judge responses[i] as an answer to prompts[i]; equal answers to equal golds are judged once."""
        found = [_final(response) for response in responses]
        golds = [_gold(prompt.answer) for prompt in prompts]
        keys = [
            None if answer is None else (answer[0], answer[1], gold) for answer, gold in zip(found, golds, strict=True)
        ]
        verdicts = self._judge([key for key in dict.fromkeys(keys) if key is not None])
        return [Verdict(0.0, Status.UNPARSABLE) if key is None else verdicts[key] for key in keys]

    def equivalent(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Say for each pair whether one answers the other as gold, in either order; False if time runs out."""
        ordered = [(a, b) if a <= b else (b, a) for a, b in pairs]
        known: dict[tuple[str, str], bool] = {}
        for pair in dict.fromkeys(ordered):
            quick = pair[0] == pair[1] or same_number(plain_number(pair[0]), plain_number(pair[1]))
            cached = self._same.get(pair) if quick is None else quick
            if max(map(len, pair)) > 2 * MAX_ANSWER and cached is None:
                cached = False
            if cached is not None:
                known[pair] = cached
        open_pairs = [pair for pair in dict.fromkeys(ordered) if pair not in known]
        outcomes = self._pool.map([{"do": "same", "a": a, "b": b} for a, b in open_pairs])
        for pair, outcome in zip(open_pairs, outcomes, strict=True):
            known[pair] = bool(outcome.value)
            if isinstance(outcome.value, bool):
                self._same.put(pair, outcome.value)
        return [known[pair] for pair in ordered]

    def close(self) -> None:
        """Kill the worker processes; the next call starts them again."""
        self._pool.close()

    def _judge(self, keys: Sequence[Key]) -> dict[Key, Verdict]:
        known = {key: verdict for key in keys if (verdict := _quick(key) or self._verdicts.get(key))}
        hard = [key for key in keys if key not in known]
        outcomes = self._pool.map(
            [{"do": "verdict", "answer": answer, "whole": whole, "gold": gold} for answer, whole, gold in hard]
        )
        for key, outcome in zip(hard, outcomes, strict=True):
            known[key] = _verdict(outcome)
            if known[key].status not in (Status.TIMEOUT, Status.ERROR):  # those may be the machine's fault
                self._verdicts.put(key, known[key])
        return known


def _tidy(text: str) -> str:
    """Write thousands as 1,234, the minus sign as - and powers as ^; put the answer on one line."""
    text = " ".join(text.split()).replace("\N{MINUS SIGN}", "-").replace("**", "^")
    return _THOUSANDS.sub(",", text)


def _gold(answer: str) -> str:
    marked = extract.marked_answer(answer)
    return _tidy(answer if marked is None else marked)


def _final(response: Response) -> tuple[str, bool] | None:
    """Return the final answer and True, or the last lines and False, or None if there is nothing to judge."""
    marked = extract.marked_answer(response.text)
    if marked is not None:
        return (_tidy(marked), True) if marked.strip() and len(marked) <= MAX_ANSWER else None
    if plain_number(response.text) is not None:
        return _tidy(response.text), True
    lines = extract.last_lines(response.text, LAST_LINES)
    return None if response.truncated or not lines.strip() else (lines, False)


def _quick(key: Key) -> Verdict | None:
    """Judge in process where both sides are plain numbers that do not nearly miss each other."""
    answer, whole, gold = key
    number = plain_number(answer) if whole else None
    correct = same_number(number, plain_number(gold))
    if correct is None:
        return None
    return Verdict(float(correct), Status.CORRECT if correct else Status.WRONG, str(number))


def _verdict(outcome: Outcome) -> Verdict:
    value: Any = outcome.value
    if outcome.timed_out:
        return Verdict(0.0, Status.TIMEOUT)
    if not isinstance(value, dict):
        return Verdict(0.0, Status.ERROR)
    status, normal = Status(value["status"]), value["normal"]
    number = None if normal is None else plain_number(normal)
    return Verdict(float(status is Status.CORRECT), status, normal if number is None else str(number))
