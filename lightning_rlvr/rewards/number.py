"""Plain numbers: read and compared exactly, without math-verify and in agreement with it."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

MAX_CHARACTERS = 60  # longer digit strings go to math-verify in its worker
DECIMAL_DIGITS = 15  # what a float of math-verify's holds
TOLERANCE = Fraction(1, 1_000_000)  # of the larger number: math-verify, which rounds decimals to 6 places, says

_INTEGER = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)"
_DECIMAL = re.compile(rf"(-?)({_INTEGER}|)\.(\d+)", re.ASCII)
_WHOLE = re.compile(rf"(-?)({_INTEGER})\.?", re.ASCII)
_SLASH = re.compile(r"(-?)(\d+)/(\d+)", re.ASCII)
_FRAC = re.compile(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}", re.ASCII)
_DOLLARS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


class Number(NamedTuple):
    """A number and whether it was written as a decimal, which math-verify compares after rounding."""

    value: Fraction
    decimal: bool

    def __str__(self) -> str:
        """Return p, p/q or, of a decimal, its digits without needless zeros."""
        if not self.decimal or self.value.denominator == 1:
            return str(self.value)
        digits = str(abs(int(self.value * 10**DECIMAL_DIGITS))).rjust(DECIMAL_DIGITS + 1, "0")
        text = f"{digits[:-DECIMAL_DIGITS]}.{digits[-DECIMAL_DIGITS:]}".rstrip("0")
        return f"-{text}" if self.value < 0 else text


def plain_number(text: str) -> Number | None:
    r"""Read an integer (also 1,234), a decimal, p/q or \frac{p}{q}, with or without a dollar sign.

    None for anything else: signs of percent, units, exponents, a zero denominator, over 60 characters.

    >>> str(plain_number("$1,234")), str(plain_number("0.50")), str(plain_number(r"\frac{2}{4}"))
    ('1234', '0.5', '1/2')
    """
    if len(text) > MAX_CHARACTERS:
        return None
    text = _bare(text)
    if match := _WHOLE.fullmatch(text):
        return Number(_signed(match, Fraction(match.group(2).replace(",", ""))), decimal=False)
    if match := _DECIMAL.fullmatch(text):
        whole, places = match.group(2).replace(",", ""), match.group(3)
        if len(whole) + len(places) > DECIMAL_DIGITS:
            return None
        return Number(_signed(match, Fraction(f"{whole or '0'}.{places}")), decimal=True)
    match = _SLASH.fullmatch(text) or _FRAC.fullmatch(text)
    if match and int(match.group(3)):
        return Number(_signed(match, Fraction(int(match.group(2)), int(match.group(3)))), decimal=False)
    return None


def same_number(a: Number | None, b: Number | None) -> bool | None:
    """Say whether two numbers are equal; None where math-verify must say (no number, or a near miss)."""
    if a is None or b is None:
        return None
    if a.value == b.value:
        return True
    if (a.decimal or b.decimal) and abs(a.value - b.value) <= TOLERANCE * max(abs(a.value), abs(b.value)):
        return None
    return False


def _bare(text: str) -> str:
    """Strip white space, one pair of math delimiters and a currency sign."""
    text = text.strip()
    for left, right in _DOLLARS:
        if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right):
            text = text[len(left) : -len(right)].strip()
            break
    for sign in (r"\$", "$"):
        if text.startswith(sign):
            return text[len(sign) :].strip()
        if text.endswith(sign):
            return text[: -len(sign)].strip()
    return text


def _signed(match: re.Match[str], value: Fraction) -> Fraction:
    return -value if match.group(1) else value
