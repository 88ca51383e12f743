r"""What math-verify misreads: digits that repeat, moduli, times and dates."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from .normal import unwrapped

_REPEATING = re.compile(
    r"(?<![\d.])(\d{0,999})\.(\d{0,999})\\(?:overline|bar|dot) ?(?:\{(\d{1,999})\}|(\d{1,999}))"
    r"(?:(\d{0,999})\\dot ?(?:\{(\d)\}|(\d)))?(?!\d)",
    re.ASCII,
)
_MODULUS = r"(?:\{ ?(\w+) ?\}|(\d+|[A-Za-z]))"
_MODULO = re.compile(
    rf"\( ?\\[pb]mod ?{_MODULUS} ?\)|\\[pb]mod ?{_MODULUS}"
    r"|\\(?:text|mathrm) ?\{ ?\( ?mod(?: ?\}[\s\\]*(\d+) ?\)| (\d+) ?\) ?\})"
    r"|\( ?(?:mod|\\(?:text|mathrm) ?\{ ?mod ?\})[\s\\]*(\d+) ?\)",
    re.ASCII,
)


def legible(text: str) -> str:
    r"""Write what math-verify misreads as it reads it: repeating decimals as fractions, a modulus in braces.

    >>> legible(r"-0.1\overline{6}"), legible(r"n \equiv 3 \pmod 4"), legible(r"n \equiv 3 (\text{mod } 4)")
    ('-\\frac{1}{6}', 'n \\equiv 3 \\pmod{4}', 'n \\equiv 3 \\pmod{4}')
    """
    return _MODULO.sub(lambda match: rf"\pmod{{{_first(match)}}}", _REPEATING.sub(_fraction, text))


def _fraction(match: re.Match[str]) -> str:
    whole, places = match[1], match[2]
    repeated = (match[3] or match[4]) + (match[5] or "") + (match[6] or match[7] or "")
    once, through = int(whole + places or "0"), int(whole + places + repeated)
    value = Fraction(through - once, 10 ** len(places) * (10 ** len(repeated) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _first(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group)


def other_modulus(a: str, b: str) -> bool | None:
    r"""Return False if two congruences name different moduli, which math-verify leaves out; None otherwise."""
    return False if len({match for text in (a, b) for match in named_moduli(text)}) > 1 else None


def named_moduli(text: str) -> list[str]:
    r"""Return the moduli that a text names.

    >>> named_moduli(r"n \equiv 3 \pmod{4}"), named_moduli("3")
    (['4'], [])
    """
    return [_first(match) for match in _MODULO.finditer(text)]


# --- times and dates -------------------------------------------------------------------------------

_TIME = re.compile(r"(\d{1,2}):([0-5]\d)(?:[\s\\~]*([ap])\.?m\.?)?", re.ASCII | re.IGNORECASE)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)


def is_moment(text: str) -> bool:
    """Say whether a text is a date such as 2020-01-05 or a time such as 12:30, not a ratio in lowest terms.

    >>> is_moment("2020-01-05"), is_moment("12:30"), is_moment("7:05"), is_moment("3:10"), is_moment("3:2")
    (True, True, True, False, False)
    """
    text = unwrapped(text)
    time = _TIME.fullmatch(text)
    if time is None:
        return _DATE.fullmatch(text) is not None
    return "0" in (time[1][0], time[2][0]) or bool(time[3]) or math.gcd(int(time[1]), int(time[2])) > 1


def same_moment(gold: str, answer: str) -> bool | None:
    """Say whether an answer is the date or the time that the gold is; None if none is, or one leaves out a.m. or p.m.

    math-verify would read 12:30 as 2/5, and a date as a difference.
    """
    wanted, named = _TIME.fullmatch(unwrapped(gold)), _TIME.fullmatch(unwrapped(answer))
    if any(_DATE.fullmatch(unwrapped(text)) for text in (gold, answer)):
        return unwrapped(gold) == unwrapped(answer)
    if wanted is None or not is_moment(gold):
        return None
    if named is None:
        return None if ":" in answer else False
    if (int(wanted[1]), wanted[2]) != (int(named[1]), named[2]):
        return False
    halves = [(time[3] or "").lower() for time in (wanted, named)]
    return halves[0] == halves[1] if all(halves) or not any(halves) else None
