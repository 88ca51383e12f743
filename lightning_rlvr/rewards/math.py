r"""Answers to mathematical questions, judged by math-verify in worker processes.

Which part of a response is its final answer: the last \boxed{...} whose braces close (several, if only commas, `and`
or `or` stand between them); else what follows #### on the last line; else the response as a whole if it is a plain
number; else, unless the response was truncated, the last expression that math-verify finds in the last lines.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from lightning_rlvr.rewards import extract
from lightning_rlvr.rewards.cache import BoundedCache
from lightning_rlvr.rewards.normal import is_echo, plain_pair, same_plain, split_percent, tidy
from lightning_rlvr.rewards.number import plain_number, same_number
from lightning_rlvr.rewards.pool import Outcome, WorkerPool
from lightning_rlvr.types import Prompt, Response, Reward, Status, UserError, Verdict

MAX_ANSWER = 1_000  # characters: a longer final answer is unparsable
LAST_LINES = 1_000  # characters in which the last expression is looked for
CACHE_ENTRIES = 100_000

_JUDGE = Path(__file__).with_name("_math_judge.py")
_DEFINITE = (Status.CORRECT, Status.WRONG, Status.UNPARSABLE)  # the others may be the machine's fault
_BY_WEIGHT = (Status.CORRECT, Status.TIMEOUT, Status.ERROR, Status.WRONG, Status.UNPARSABLE)
Key = tuple[str, bool, str]  # answer, whether it is an answer as a whole (or lines to search), gold answer


class _Judged(NamedTuple):
    """A verdict and the text of the final answer that it is about."""

    verdict: Verdict
    text: str


class MathAnswer(Reward):
    r"""Score 1.0 if the final answer means the same as the gold answer, else 0.0.

    Plain numbers are compared exactly in process; all else goes to math-verify in `workers` processes (default: 2,
    or 1 on one core) under a limit of `timeout_s` seconds an answer and `memory_mb` MiB a process. TIMEOUT and ERROR
    say that the verifier gave up, with score 0.0. `Verdict.answer` is a text that `equivalent` reads: 2/4 and
    \frac12 give 1/2, 1,234.0 gives 1234, other LaTeX is kept as math-verify normalises it. Further gold answers may
    stand in the prompt's metadata under "alternatives": any of them is right.

    - A decimal answers what it is when rounded to its last place, if it has 6 significant digits, or 6 places and 4
      digits: 0.333333 and 0.083333 are 1/3 and 1/12, 0.33 is not. Whole numbers and fractions are exact.
    - A repeating decimal is exact: 0.\overline{3} is 1/3. Two congruences must name the same residue and modulus; one
      answers its residue, but `7 \pmod{11}` by itself does not answer 7.
    - A gold with a percent sign is in percent: 300 answers 300\%, 3 does not. A percentage answers a gold without by
      its value, or by its number if that is over 1: 50\% answers 0.5 and 50, 0.5\% does not answer 0.5.
    - 1,234 and 1 234 are thousands, `1, 234` is a list. Units after a number are left out of both sides, and not
      compared: `5 cm`, 18 dollars, and of a short list `8 in`, `8 m/s`, `8 cm^2` beside a plain number.
    - A time that is no ratio in lowest terms, such as 12:30, and a date such as 2020-01-05 are compared as text.
    - A list of answers must hold all and no other, in any order; the order of (1, 2) counts, and so do brackets.
    - An answer that only repeats a formula of the question, unlike every gold, is wrong: 2+3 for "What is 2+3?".
    - Words are compared as words, whatever their case: live does not answer evil. Where the gold is a choice such as
      (B), `(B) 12` answers it. A base is compared where both sides name one: 4210_6 does not answer 4210_5, 4210 does.
    """

    def __init__(self, workers: int | None = None, timeout_s: float = 5.0, memory_mb: int = 1024) -> None:
        count = min(2, os.cpu_count() or 1) if workers is None else workers
        self.timeout_s = timeout_s
        self._pool = WorkerPool(_JUDGE, "judge", count, timeout_s, memory_mb)
        self._judged: BoundedCache[Key, _Judged] = BoundedCache(CACHE_ENTRIES)
        self._same: BoundedCache[tuple[str, str], bool] = BoundedCache(CACHE_ENTRIES)
        self._readable: BoundedCache[str, bool] = BoundedCache(CACHE_ENTRIES)

    def __repr__(self) -> str:
        return f"MathAnswer(timeout_s={self.timeout_s}, rules=4, math-verify {version('math-verify')})"

    def unjudgeable(self, prompts: Sequence[Prompt]) -> list[int]:
        """Return the places of the prompts with a gold answer that cannot be read or does not equal itself."""
        golds = [_golds(prompt) for prompt in prompts]
        every = dict.fromkeys(gold for several in golds for gold in several)
        readable = {gold: plain_number(gold) is not None or self._readable.get(gold) for gold in every}
        hard = [gold for gold, known in readable.items() if known is None]
        outcomes = self._pool.map([{"do": "gold", "gold": gold[:MAX_ANSWER]} for gold in hard])
        for gold, outcome in zip(hard, outcomes, strict=True):
            readable[gold] = known = bool(outcome.value) and len(gold) <= MAX_ANSWER
            self._readable.put(gold, known)
        return [i for i, several in enumerate(golds) if not all(readable[gold] for gold in several)]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError with the uid and value of the first gold answer that math-verify cannot read."""
        unread = self.unjudgeable(prompts)
        if unread:
            first = prompts[unread[0]]
            raise UserError(
                f"every gold answer must be mathematics that math-verify can read and that equals itself, got "
                f"{first.answer[:200]!r} for question {first.uid!r} ({len(unread)} such of "
                f"{len(prompts)}): no response could be judged. Put the answer column of the data set right, "
                "set the task's answer_column or answer_pattern, have such questions dropped (data.unjudgeable; in "
                "evaluate: unjudgeable), or choose another reward."
            )

    def __call__(self, responses: Sequence[Response], prompts: Sequence[Prompt]) -> list[Verdict]:
        """Judge responses[i] as an answer to prompts[i]; equal answers to equal golds are judged once."""
        found = [_final(response) for response in responses]
        golds = [_golds(prompt) for prompt in prompts]
        keys = [
            [] if answer is None else [(*answer, gold) for gold in several]
            for answer, several in zip(found, golds, strict=True)
        ]
        judged = self._judge(list(dict.fromkeys(key for several in keys for key in several)))
        return [
            _best([judged[key] for key in several], prompt, accepted)
            for several, prompt, accepted in zip(keys, prompts, golds, strict=True)
        ]

    def equivalent(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Say for each pair whether one answers the other as gold, in either order; False if time runs out.

        Where one is a percentage that is the gold: 50 is the same as 50%, 0.5 is not. `Verdict.answer` is what an
        answer says beside its gold, so the 50% that answers 0.5 is 1/2 there.
        Plain numbers are compared in process, each other pair is compared once and remembered: ask many at a time.
        """
        ordered = [(a, b) if a <= b else (b, a) for a, b in pairs]
        known: dict[tuple[str, str], bool] = {}
        hard: list[tuple[str, str]] = []
        for pair in dict.fromkeys(ordered):
            same = _quick_same(*pair)
            same = self._same.get(pair) if same is None else same
            if same is None:
                hard.append(pair)
            else:
                known[pair] = same
        outcomes = self._pool.map([{"do": "same", "a": a, "b": b} for a, b in hard])
        for pair, outcome in zip(hard, outcomes, strict=True):
            known[pair] = bool(outcome.value)
            if isinstance(outcome.value, bool):
                self._same.put(pair, outcome.value)
        return [known[pair] for pair in ordered]

    def close(self) -> None:
        """Kill the worker processes; the next call starts them again."""
        self._pool.close()

    def _judge(self, keys: Sequence[Key]) -> dict[Key, _Judged]:
        known = {key: judged for key in keys if (judged := _quick(key) or self._judged.get(key))}
        hard = [key for key in keys if key not in known]
        outcomes = self._pool.map(
            [{"do": "verdict", "answer": answer, "whole": whole, "gold": gold} for answer, whole, gold in hard]
        )
        for key, outcome in zip(hard, outcomes, strict=True):
            known[key] = _judged(outcome)
            if known[key].verdict.status in _DEFINITE:
                self._judged.put(key, known[key])
        return known


def _golds(prompt: Prompt) -> list[str]:
    """Return the gold answers, each on one line and free of the worked solution around it."""
    answers = dict.fromkeys([prompt.answer, *map(str, prompt.metadata.get("alternatives") or ())])
    marked = [(answer, extract.marked_answer(answer)) for answer in answers]
    return [tidy(answer if inner is None else inner) for answer, inner in marked]


def _final(response: Response) -> tuple[str, bool] | None:
    """Return the final answer and True, or the last lines and False, or None if there is nothing to judge."""
    marked = extract.marked_answer(response.text)
    if marked is not None:
        return (tidy(marked), True) if marked.strip() and len(marked) <= MAX_ANSWER else None
    if plain_number(response.text) is not None:
        return tidy(response.text), True
    lines = extract.last_lines(response.text, LAST_LINES)
    return None if response.truncated or not lines.strip() else (lines, False)


def _best(judged: Sequence[_Judged], prompt: Prompt, golds: Sequence[str]) -> Verdict:
    """Return the verdict by the gold that says most: CORRECT by any; what was not decided before WRONG."""
    if not judged:
        return Verdict(0.0, Status.UNPARSABLE)
    verdict, text = min(judged, key=lambda one: _BY_WEIGHT.index(one.verdict.status))
    if verdict.correct and is_echo(text, prompt.text, golds):
        return Verdict(0.0, Status.WRONG, verdict.answer)
    return verdict


def _quick(key: Key) -> _Judged | None:
    """Judge in process where both sides are plain numbers."""
    answer, whole, gold = key
    pair = plain_pair(gold, answer) if whole else None
    if pair is None:
        return None
    wanted, number, normal = pair
    correct = bool(same_number(wanted, number))
    return _Judged(Verdict(float(correct), Status.CORRECT if correct else Status.WRONG, normal), answer)


def _quick_same(a: str, b: str) -> bool | None:
    """Compare in process what are plain numbers, equal texts or too long; the one with a percent sign is the gold."""
    if a == b:
        return True
    same = same_plain(b, a) if split_percent(b)[1] else same_plain(a, b)
    return False if same is None and max(len(a), len(b)) > 2 * MAX_ANSWER else same


def _judged(outcome: Outcome) -> _Judged:
    value: Any = outcome.value
    if outcome.timed_out:
        return _Judged(Verdict(0.0, Status.TIMEOUT), "")
    if not isinstance(value, dict):
        return _Judged(Verdict(0.0, Status.ERROR), "")
    status, normal = Status(value["status"]), value["normal"]
    number = None if normal is None else plain_number(normal)
    answer = normal if number is None else str(number)
    return _Judged(Verdict(float(status is Status.CORRECT), status, answer), value["text"])
