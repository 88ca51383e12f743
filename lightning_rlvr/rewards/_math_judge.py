"""math-verify's judgements, as the worker processes make them (see math.py for the rules).

Loaded by path in a worker: it must not import lightning_rlvr. math-verify's own time limits are off: the
parent kills a worker that takes too long.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import parse, verify
from sympy import Basic, Integer, MatrixBase, Mul, Rational, UnevaluatedExpr

logging.disable(logging.CRITICAL)

_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_DOLLAR = re.compile(r"(?<!\\)\$")
_WORDS = re.compile(r"(?:\\(?:text|mathrm|textbf|textit|mbox)\s*\{\s*([^{}]*)\}|([^{}\\]*))")


def judge(item: dict[str, Any]) -> Any:
    """Do what the item asks: parse a gold answer, judge an answer, or compare two."""
    if item["do"] == "gold":
        gold = _expressions(_read(item["gold"]))
        _matches(gold, [Integer(0)])  # takes too long for 7^{60000000}: no response could be judged
        return _matches(gold, gold)
    if item["do"] == "same":
        return _same(item["a"], item["b"])
    answer = _read(item["answer"]) if item["whole"] else _parse(item["answer"])
    correct = _matches(_read(item["gold"]), answer) or (item["whole"] and _same_words(item["gold"], item["answer"]))
    if not correct and not _expressions(answer):
        return {"status": "unparsable", "normal": None}
    return {"status": "correct" if correct else "wrong", "normal": _normal(answer, item)}


def _parse(text: str) -> list[Any]:
    return parse(text, parsing_timeout=None)


@lru_cache(maxsize=512)
def _read(text: str) -> list[Any]:
    """Parse a text that is an answer as a whole: LaTeX unless it holds dollar signs of its own."""
    text = text.strip()
    for left, right in _DELIMITERS:
        if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right):
            text = text[len(left) : -len(right)].strip()
    return _parse(text if _DOLLAR.search(text) else f"${text}$")


def _expressions(parsed: list[Any]) -> list[Any]:
    return [part for part in parsed if isinstance(part, Basic | MatrixBase)]


def _percent(part: Any) -> Any:
    """Return the number in front of a percent sign, None if `part` is no percentage."""
    percent = isinstance(part, Mul) and len(part.args) == 2 and part.args[1] == UnevaluatedExpr(Rational(1, 100))
    return part.args[0] if percent else None


def _is_percent(parsed: list[Any]) -> bool:
    return any(_percent(part) is not None for part in parsed)


def _matches(gold: list[Any], answer: list[Any]) -> bool:
    """Verify; a percentage asked for is a unit: 300 answers a gold of 300 %, 3 does not."""
    if _is_percent(gold) and not _is_percent(answer):
        gold = [_percent(part) for part in gold if _percent(part) is not None]
    return bool(verify(gold, answer, timeout_seconds=None))


def _same(a: str, b: str) -> bool:
    first, second = _read(a), _read(b)
    if _same_words(a, b):
        return True
    if _is_percent(first) != _is_percent(second):
        return _matches(first, second) if _is_percent(first) else _matches(second, first)
    return _matches(first, second) or _matches(second, first)


def _same_words(a: str, b: str) -> bool:
    r"""Say whether both are words and the same ones, in \text{...} or bare, whatever their case."""
    first, second = _words(a), _words(b)
    return first is not None and first == second


def _words(text: str) -> str | None:
    match = _WORDS.fullmatch(text.strip().strip("$").strip())
    words = " ".join((match.group(1) or match.group(2) or "").split()).casefold() if match else ""
    letters = words.replace(" ", "")
    return words if len(letters) > 1 and letters.isalpha() else None


def _normal(parsed: list[Any], item: dict[str, Any]) -> str:
    """Return a text that reads back as the same answer: p/q for rationals, else the LaTeX math-verify kept."""
    value = next(iter(_expressions(parsed)), None)
    if isinstance(value, Rational) and value.q != 0:
        return f"{value.p}/{value.q}" if value.q != 1 else f"{value.p}"
    kept = next((part for part in parsed if isinstance(part, str) and part.strip()), None)
    text = kept if kept is not None else str(item["answer"])
    if value is not None and _percent(value) is not None and "%" not in text:
        text += r"\%"
    return text.replace(" and ", ", ")
