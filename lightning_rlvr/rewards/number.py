"""Plain numbers: read and compared exactly, without math-verify."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

MAX_CHARACTERS = 60  # longer digit strings go to math-verify in its worker
MAX_EXPONENT = 40  # of ten, in scientific notation
ROUNDED_DIGITS = 6  # significant digits that a decimal needs to stand for a number which it is not
ROUNDED_PLACES, PLACES_DIGITS = 6, 4  # or places, with as many significant digits among them
FLOAT_DIGITS, FLOAT_NOISE = 16, Fraction(1, 10**12)  # 0.30000000000000004 is what a float makes of 0.3

_INTEGER = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)"
_DECIMAL = re.compile(rf"(-?)({_INTEGER}|)\.(\d+)", re.ASCII)
_WHOLE = re.compile(rf"(-?)({_INTEGER})\.?", re.ASCII)
_SLASH = re.compile(r"(-?)(\d+)/(\d+)", re.ASCII)
_FRAC = re.compile(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}", re.ASCII)
_SCIENTIFIC = re.compile(
    r"(-?)(\d{1,8})(?:\.(\d{1,16}))?(?:[eE]([+-]?\d{1,2})|\s?\\(?:times|cdot)\s?10\^(?:\{(-?\d{1,2})\}|(\d)))", re.ASCII
)
DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_CURRENCIES = (r"\$", "$", "€", "£", "¥")


class Number(NamedTuple):
    """A number and, if it was written as a decimal, how many places it has (below 0: the power of ten it is in)."""

    value: Fraction
    places: int | None = None

    def __str__(self) -> str:
        """Return p, p/q or, of a decimal, its digits without needless zeros."""
        if self.places is None or self.value.denominator == 1:
            return str(self.value)
        digits = str(abs(int(self.value * 10**self.places))).rjust(self.places + 1, "0")
        text = f"{digits[: -self.places]}.{digits[-self.places :]}".rstrip("0")
        return f"-{text}" if self.value < 0 else text

    def rounds(self, other: Fraction) -> bool:
        """Say whether this is a decimal of enough digits that `other` has when it is rounded to its last place."""
        if self.places is None:
            return False
        unit = Fraction(10) ** -self.places
        digits = len(str(abs(int(self.value / unit))))
        enough = digits >= ROUNDED_DIGITS or (self.places >= ROUNDED_PLACES and digits >= PLACES_DIGITS)
        noise = FLOAT_NOISE * abs(other) if digits >= FLOAT_DIGITS else Fraction(0)
        return enough and abs(self.value - other) <= max(unit / 2, noise)


def plain_number(text: str) -> Number | None:
    r"""Read an integer (also 1,234), a decimal, p/q, \frac{p}{q} or 1.5\times10^{3}, with or without a currency sign.

    None for anything else: signs of percent, units, a zero denominator, over 60 characters.

    >>> str(plain_number("$1,234")), str(plain_number("0.50")), str(plain_number(r"\frac{2}{4}"))
    ('1234', '0.5', '1/2')
    """
    if len(text) > MAX_CHARACTERS:
        return None
    text = _bare(text)
    if match := _WHOLE.fullmatch(text):
        return Number(_signed(match, Fraction(match.group(2).replace(",", ""))))
    if match := _DECIMAL.fullmatch(text):
        whole, places = match.group(2).replace(",", ""), match.group(3)
        return Number(_signed(match, Fraction(f"{whole or '0'}.{places}")), len(places))
    match = _SLASH.fullmatch(text) or _FRAC.fullmatch(text)
    if match and int(match.group(3)):
        return Number(_signed(match, Fraction(int(match.group(2)), int(match.group(3)))))
    return _scientific(text)


def same_number(a: Number | None, b: Number | None) -> bool | None:
    """Say whether two numbers are equal, or one is the other rounded to six digits or places; None if one is none.

    A decimal stands for every number that, rounded to its last place, is that decimal, if it has at least 6
    significant digits, or 6 places and 4 significant digits: 0.333333 is 1/3 and 0.083333 is 1/12, but neither
    0.3333 nor the cut-off 0.666666 is a third or two. Whole numbers and fractions are compared exactly.
    """
    if a is None or b is None:
        return None
    return a.value == b.value or a.rounds(b.value) or b.rounds(a.value)


def _scientific(text: str) -> Number | None:
    match = _SCIENTIFIC.fullmatch(text)
    exponent = int(match.group(4) or match.group(5) or match.group(6)) if match else 0
    if match is None or abs(exponent) > MAX_EXPONENT:
        return None
    fraction = match.group(3) or ""
    value = Fraction(f"{match.group(2)}.{fraction or '0'}") * Fraction(10) ** exponent
    return Number(_signed(match, value), len(fraction) - exponent)


def _bare(text: str) -> str:
    """Strip white space, one pair of math delimiters and a currency sign."""
    text = text.strip()
    for left, right in DELIMITERS:
        if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right):
            text = text[len(left) : -len(right)].strip()
            break
    for sign in _CURRENCIES:
        if text.startswith(sign):
            return text[len(sign) :].strip()
        if text.endswith(sign):
            return text[: -len(sign)].strip()
    return text


def _signed(match: re.Match[str], value: Fraction) -> Fraction:
    return -value if match.group(1) else value
