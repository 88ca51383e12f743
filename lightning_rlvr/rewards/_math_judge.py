"""math-verify's judgements, as the worker processes make them (see math.py for the rules).

Loaded by path in a worker, as a package of its own: what it imports from here must not import lightning_rlvr.
math-verify's own time limits are off: a worker that takes too long is killed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache, wraps
from typing import Any

from antlr4 import PredictionMode
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
from math_verify import parse, verify
from sympy import Basic, Expr, Float, Integer, MatrixBase, Mul, Rational, UnevaluatedExpr

from ._math_forms import EVALUATED, differ, expands_to_zero, same_line, same_set
from .misread import is_moment, legible, named_moduli, other_modulus, same_moment
from .normal import (
    chosen,
    named_base,
    other_base,
    read_percent,
    same_choice,
    same_plain,
    same_text,
    same_words,
    split_percent,
    unwrapped,
)
from .number import DELIMITERS, Number, plain_number, same_number

logging.disable(logging.CRITICAL)

_DOLLAR = re.compile(r"(?<!\\)\$")
_FLOAT = 15  # digits of a value made from decimals that hold for sure: 5.4 is 5.40000000000000036 there
_LARGE, _SMALL = Integer(10) ** 99, Integer(10) ** -99  # beyond any plain number; exact digits would fill the memory
_WARM = (
    *(r"\frac{3}{7}x^2-5x+\sqrt[3]{11}", r"\left(3,-\frac{\pi}{2}\right)", r"[2,7)\cup(9,\infty)", r"\{1,-2,\pm 5\}"),
    *(r"x=\frac{-1+\sqrt{5}}{2}", r"1 \le x < 7", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"2+3i", r"\text{Monday}"),
    *(r"\log_2 8+\sin x", r"5\text{ cm}", r"2^{10}\cdot 3!", r"1.6\times10^{-19}", r"12.5\%", "1, 2"),
    *(r"(x+3)(x-7)", r"x\in(-\infty,3]", r"-\frac{1}{2}\ln 5+2\pi", r"\frac{2x+5}{3}", r"y=3x-\frac{2}{5}", r"x\ge 3"),
    *(r"\begin{bmatrix}1&-2\\0&\frac{1}{2}\end{bmatrix}", r"\frac{2\sqrt{3}}{5}", "3, -4, 10", r"90^\circ", r"x>-2"),
)


def judge(item: dict[str, Any]) -> Any:
    """Do what the item asks: parse a gold answer, judge an answer, or compare two."""
    if item["do"] == "gold":
        return _readable(item["gold"])
    if item["do"] == "same":
        return _same(item["a"], item["b"])
    answer = _read(item["answer"]) if item["whole"] else _parse(item["answer"])
    text = item["answer"] if item["whole"] else _kept(answer) or ""
    correct = _answers(item["gold"], text, answer)
    if not correct and not _expressions(answer):
        return {"status": "unparsable", "normal": None, "text": text}
    return {"status": "correct" if correct else "wrong", "normal": _normal(item["gold"], answer, text), "text": text}


def _readable(text: str) -> bool:
    """Say whether a gold answer can be read and equals itself."""
    if same_choice(text, text) or same_moment(text, text) or same_words(text, text):
        return True
    gold = _expressions(_read(split_percent(text, chain=True)[0]))
    _verified(gold, [Integer(0)])  # takes too long for 7^{60000000}: no response could be judged
    return _verified(gold, gold)


def warm() -> None:
    """Read and compare what is typical: the parser is ten times slower on what it meets for the first time."""
    for text in _WARM:
        _verified(_parse(f"${text}$"), _parse(f"${text}+1$"))


# --- reading ---------------------------------------------------------------------------------------


def _two_stages(create: Callable[..., Any]) -> Callable[..., Any]:
    """Let a parser first decide without full context, and if that fails begin anew with it.

    Half of the time goes into full context, and the tree is the same: SLL gives it or an error.
    Source: Parr, Harwell, Fisher (2014), "Adaptive LL(*) parsing", section 3.2.
    """

    @wraps(create)
    def create_parser(self: Any, text: str) -> Any:
        parser = create(self, text)
        parser._interp.predictionMode = PredictionMode.SLL
        first = parser.math

        def math() -> Any:
            try:
                return first()
            except Exception:  # noqa: BLE001 - what the parser's error listener raises
                return create(self, text).math()

        parser.math = math
        return parser

    return create_parser


_Latex2Sympy.create_parser = _two_stages(_Latex2Sympy.create_parser)


def _parse(text: str) -> list[Any]:
    return parse(legible(text), parsing_timeout=None)


@lru_cache(maxsize=2048)
def _read(text: str) -> list[Any]:
    """Parse a text that is an answer as a whole: LaTeX unless it holds dollar signs of its own."""
    text = text.strip()
    for left, right in DELIMITERS:
        if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right):
            text = text[len(left) : -len(right)].strip()
    return _parse(text if _DOLLAR.search(text) else f"${text}$")


def _expressions(parsed: list[Any]) -> list[Any]:
    return [part for part in parsed if isinstance(part, Basic | MatrixBase)]


def _kept(parsed: list[Any]) -> str | None:
    """Return the text of the answer as math-verify kept it."""
    return next((part for part in parsed if isinstance(part, str) and part.strip()), None)


# --- comparing -------------------------------------------------------------------------------------


def _same(a: str, b: str) -> bool:
    """Say whether one answers the other as gold; a percentage is the gold, where one is one and the other is not."""
    percents = split_percent(a)[1], split_percent(b)[1]
    if percents == (True, False):
        return _answers(a, b, _read(b))
    if same_choice(a, b) or _answers(b, a, _read(a)):
        return True
    return percents[0] == percents[1] and not _symmetric(a, b) and _answers(a, b, _read(b))


def _symmetric(a: str, b: str) -> bool:
    """Say whether verify treats both alike: it does for plain expressions, not for relations, sets and tuples."""
    return all(isinstance(part, Expr) for text in (a, b) for part in _expressions(_read(text)))


def _answers(gold: str, text: str, answer: list[Any]) -> bool:
    """Say whether an answer, a text and what it was parsed into, answers the gold."""
    for rule in (same_plain, same_choice, same_moment, other_modulus, same_text, same_words, other_base):
        same = rule(gold, text)
        if same is not None:
            return same
    (gold, gold_percent), (body, percent) = split_percent(gold, chain=True), split_percent(text, chain=True)
    wanted, number = _read(gold), _read(body)
    if not percent:
        return _matches(gold, wanted, text, answer)
    if gold_percent or (_matches(gold, wanted, body, number) and _over_one(wanted)):
        return _matches(gold, wanted, body, number)
    if not split_percent(text)[1]:  # a chain such as 3/8 = 37.5\%
        return _matches(gold, wanted, text, answer)
    return _verified(wanted, [part / 100 for part in _expressions(number) if isinstance(part, Expr)])


def _matches(gold: str, wanted: list[Any], text: str, answer: list[Any]) -> bool:
    """Verify; a decimal and a real number are compared by what the decimal's digits say (see number.py)."""
    first, second = plain_number(gold), plain_number(text)
    if any(number is not None and number.places is not None for number in (first, second)):
        same = same_number(first or _value(wanted), second or _value(answer))
        if same is not None:
            return same
    return _verified(wanted, answer)


def _value(parsed: list[Any]) -> Number | None:
    """Return the value to 30 digits, 15 if it was written with decimals; None if it is no real number."""
    parts = _expressions(parsed)
    if len(parts) != 1 or not isinstance(parts[0], Expr) or not parts[0].is_number:
        return None
    written = plain_number(_kept(parsed) or "")  # without its unit
    if written is not None:
        return written
    value = parts[0].evalf(_FLOAT if parts[0].has(Float) else EVALUATED)
    if not (value.is_Float or value.is_Integer or value.is_Rational):
        return None
    size = abs(value)
    exact = Rational(str(value if not size or _SMALL < size < _LARGE else _LARGE if size > 1 else _SMALL))
    return Number(Fraction(exact.p, exact.q))


def _over_one(parsed: list[Any]) -> bool:
    value = _value(parsed)
    return value is not None and abs(value.value) > 1


def _verified(wanted: list[Any], answer: list[Any]) -> bool:
    """Ask math-verify, unless the values differ; two inequalities, or one and an interval, are compared as sets."""
    pairs = [(a, b) for a in _expressions(wanted) for b in _expressions(answer)]
    if len(pairs) == 1:
        same = _tried(same_line, *pairs[0])
        if same is not None:
            return same
        if _tried(differ, *pairs[0]):
            return False
        if _tried(expands_to_zero, *pairs[0]):
            return True
    if verify(wanted, answer, timeout_seconds=None, allow_set_relation_comp=True):
        return True
    return any(bool(_tried(same_set, a, b)) for a, b in pairs)


def _tried(test: Callable[[Any, Any], bool | None], a: Any, b: Any) -> bool | None:
    """Return what the test says, None where sympy cannot say."""
    try:
        return test(a, b)
    except Exception:  # noqa: BLE001 - sympy raises whatever its parts do on what they were not made for
        return None


# --- the normal form -------------------------------------------------------------------------------


def _normal(gold: str, parsed: list[Any], text: str) -> str:
    """Return a text that reads back as the same answer: p/q for rationals, else the LaTeX math-verify kept.

    It is what the answer says beside the gold: the letter alone of a choice, 1/2 for 50% if the gold has no sign.
    """
    letter = chosen(gold, text)
    if letter is not None or is_moment(gold):
        return letter or unwrapped(text)
    body, percent = split_percent(text)
    if percent and not split_percent(gold, chain=True)[1]:
        wanted, number = _value(_read(gold)), plain_number(_kept(_read(body)) or "")
        if wanted is not None and number is not None:
            return str(read_percent(wanted, number))
    value = next(iter(_expressions(parsed)), None)
    kept = _kept(parsed)
    if kept is not None and (named_base(kept) or named_moduli(kept)):
        return kept
    if isinstance(value, Rational) and value.q != 0:
        return f"{value.p}/{value.q}" if value.q != 1 else f"{value.p}"
    normal = text if kept is None else kept
    if isinstance(value, Mul) and value.args[-1] == UnevaluatedExpr(Rational(1, 100)) and "%" not in normal:
        normal += r"\%"
    return normal.replace(" and ", ", ")
