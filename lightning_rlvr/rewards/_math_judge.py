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
from sympy import Basic, Expr, Integer, MatrixBase, Mul, Rational, UnevaluatedExpr

logging.disable(logging.CRITICAL)

_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_DOLLAR = re.compile(r"(?<!\\)\$")
_BASED = re.compile(r"\$?\s*-?[0-9A-Za-z.]+\s*_\s*(?:\{\s*(?:\\(?:text|mathrm)\s*\{\s*)?(\d+)[\s}]*\}|(\d+))\s*\$?")
_CLOSE = 1.000001e-6  # of the larger number; more than 1e-6 by what 0.333333 loses as a float
_PLAIN = {"no", "on"}  # no products of variables, though they are two small letters
_INFINITE = {"inf", "infinity"}  # words that math-verify reads
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
    correct = _answers(item["gold"], item["answer"] if item["whole"] else _kept(answer) or "", answer)
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
    return bool(verify(gold, answer, timeout_seconds=None)) and _close(_expressions(gold), _expressions(answer))


def _close(gold: list[Any], answer: list[Any]) -> bool:
    """Say whether two real numbers differ by a millionth at most: verify rounds them to 6 places, be they 1e-19."""
    values = [[_real(part) for part in side] for side in (gold, answer)]
    if not all(values) or any(value is None for side in values for value in side):
        return True
    return any(bool(abs(a - b) <= _CLOSE * max(abs(a), abs(b))) for a in values[0] for b in values[1])


def _real(part: Any) -> Any:
    """Return the value as a Float, None if it is no real number."""
    part = part if _percent(part) is None else _percent(part) / 100
    value = part.evalf() if isinstance(part, Expr) and part.is_number else None
    return value if value is not None and (value.is_Float or value.is_Integer) else None


def _same(a: str, b: str) -> bool:
    first, second = _read(a), _read(b)
    if _is_percent(first) and not _is_percent(second):
        return _answers(a, b, second)
    return _answers(b, a, first) or (not _is_percent(second) and _answers(a, b, second))


def _answers(gold: str, text: str, answer: list[Any]) -> bool:
    """Say whether an answer, a text and what it was parsed into, answers the gold."""
    same = _same_words(gold, text)
    if same is not None:
        return same
    bases = {base for base in (_base(gold), _base(text)) if base}
    return len(bases) < 2 and _matches(_read(gold), answer)


def _base(text: str) -> str | None:
    """Return the base of a numeral such as 4210_5, which math-verify leaves out."""
    match = _BASED.fullmatch(text.strip())
    return (match.group(1) or match.group(2)) if match else None


def _same_words(a: str, b: str) -> bool | None:
    r"""Say whether two words, in \text{...} or bare, are the same whatever their case; None if one is no word.

    math-verify would read bare ones as products: live = evil. Of two small letters that is meant: xy = yx.
    """
    first, second = _words(a), _words(b)
    if first is None or second is None:
        return None
    if first.casefold() == second.casefold():
        return True
    if {"and", "or"} & {*first.split(), *second.split()}:
        return None  # a list, in any order
    products = all(len(words) == 2 and words.islower() and words not in _PLAIN for words in (first, second))
    return None if products or {first.casefold(), second.casefold()} <= _INFINITE else False


def _words(text: str) -> str | None:
    match = _WORDS.fullmatch(text.strip().strip("$").strip())
    words = " ".join((match.group(1) or match.group(2) or "").split()) if match else ""
    letters = words.replace(" ", "")
    spaced = " " in words and len(letters) == len(words.split())  # x y z: variables
    return words if len(letters) > 1 and letters.isalpha() and not spaced else None


def _kept(parsed: list[Any]) -> str | None:
    """Return the text of the answer as math-verify kept it."""
    return next((part for part in parsed if isinstance(part, str) and part.strip()), None)


def _normal(parsed: list[Any], item: dict[str, Any]) -> str:
    """Return a text that reads back as the same answer: p/q for rationals, else the LaTeX math-verify kept."""
    value = next(iter(_expressions(parsed)), None)
    kept = _kept(parsed)
    if kept is not None and _base(kept):
        return kept
    if isinstance(value, Rational) and value.q != 0:
        return f"{value.p}/{value.q}" if value.q != 1 else f"{value.p}"
    text = kept if kept is not None else str(item["answer"])
    if value is not None and _percent(value) is not None and "%" not in text:
        text += r"\%"
    return text.replace(" and ", ", ")
