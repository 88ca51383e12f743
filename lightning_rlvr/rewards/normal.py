r"""Answers as text: one way to write each, what a percent sign means, and which answers only repeat the question."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from .number import Number, plain_number, same_number

_SIGNS = {
    **dict.fromkeys("\N{MINUS SIGN}\N{EN DASH}\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{FULLWIDTH HYPHEN-MINUS}", "-"),
    **{"\N{MULTIPLICATION SIGN}": r"\times ", "\N{MIDDLE DOT}": r"\cdot ", "\N{DIVISION SIGN}": r"\div "},
    **{"\N{PLUS-MINUS SIGN}": r"\pm ", "\N{LESS-THAN OR EQUAL TO}": r"\le ", "\N{GREATER-THAN OR EQUAL TO}": r"\ge "},
    **{"\N{GREEK SMALL LETTER PI}": r"\pi ", "\N{INFINITY}": r"\infty ", "\N{DEGREE SIGN}": r"^\circ"},
    **{"\N{UNION}": r"\cup ", "\N{INTERSECTION}": r"\cap ", "\N{ELEMENT OF}": r"\in "},
    **{"\N{SUPERSCRIPT TWO}": "^2", "\N{SUPERSCRIPT THREE}": "^3"},
}
_TRANSLATE = str.maketrans(_SIGNS)
_NUMBER_WORDS = "hundred|thousand|million|billion|trillion|dozen|percent|percentage|times|plus|minus|over|squared|cubed"
_REWRITES = tuple(
    (re.compile(pattern, re.ASCII), replacement)
    for pattern, replacement in (
        (r"√(\w+)", r"\\sqrt{\1}"),
        (r"\*\*", "^"),
        (r"\\varnothing", r"\\emptyset"),
        (r"\s*(?:\\(?:text|mathrm|mbox) ?\{ ?)(?:percent|percentage|pct) ?\}", r"\\%"),
        (r"(?<=\d) ?(?:percent|percentage|pct)\.?\Z", r"\\%"),
        (r"(?<=\d)(?:\{,\}|\\,|\\!,|,\\!)(?=\d{3}(?!\d))", ","),  # thousands
        (r"(?<=[^.])\.\Z", ""),  # the sentence's full stop
        (r"(\^ ?(?:\\circ|\{ ?\\circ ?\})) ?[CF]\Z", r"\1"),  # Celsius and Fahrenheit
        (r"\A(-?)(\d{1,3})((?: \d{3})+)(\.\d+)?\Z", lambda m: m[1] + m[2] + m[3].replace(" ", "") + (m[4] or "")),
        (r"\A(-?\d+) (\d+)/(\d+)\Z", r"\1\\frac{\2}{\3}"),  # a mixed number
        (r"\A[€£¥] ?(?=\d)", ""),
        # a unit after a number: a noun of four letters or more, so that it is no product of variables
        (rf"\A(-?[\d.,]*\d) (?!(?:{_NUMBER_WORDS}|and|or)\b)[A-Za-z]{{4,}}(?: (?!and\b|or\b)[A-Za-z]+)*\Z", r"\1"),
    )
)
_PLUS_MINUS = re.compile(r"\s*\\pm(?![A-Za-z])\s*")
_SEVERAL = re.compile(r",|;|\\\{|\\mp\b|\\text|\b(?:or|and)\b")
_GROUPS = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])", re.ASCII)
_SEPARATOR = re.compile(r"\s*(?:,|;|,?\s*(?:\\text ?\{ ?)?(?:and|or)(?: ?\})?)?\s*")
_EQUALS = re.compile(r"=|\\approx\b")
_MEASURE = re.compile(  # a number and a unit: of two letters or more, so that it is no variable
    r"(\S+?)(?:\\[ ,;:]|[\s~])+((?:in|ft|yd|mi|oz|mm|cm|dm|km|units?)(?:\^(?:[23]|\{[23]\}))?"
    r"|(?:m|cm|km|ft|mi)/(?:s|h|hr|min)(?:\^(?:2|\{2\}))?)",
)
_BRACKETS = re.compile(r"[(\[]|\\\{")


def tidy(text: str) -> str:
    r"""Write a text on one line with - for minus, ^ for powers, 1,234 or 1234 for thousands, \% for percent.

    The full stop behind it goes, and so do a currency sign before a number and a noun after one: 18 dollars.

    >>> tidy("12 345"), tidy("18 dollars"), tidy(r"1{,}234\sqrt{2}"), tidy("x ≥ 2 π.")
    ('12345', '18', '1234\\sqrt{2}', 'x \\ge  2 \\pi')
    """
    text = _both_signs(_undollar(" ".join(text.split()).translate(_TRANSLATE)).strip())
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text).strip()
    if text.count(",") == sum(group.count(",") for group in _GROUPS.findall(text)) and not _BRACKETS.search(text):
        text = _GROUPS.sub(lambda group: group[0].replace(",", ""), text)  # no list: they stand for thousands
    return text


def _undollar(text: str) -> str:
    """Take the dollar signs off several formulas that only commas, `and` and `or` join."""
    pieces = re.split(r"(?<!\\)\$", text)
    several = len(pieces) > 4 and len(pieces) % 2 == 1
    return "".join(pieces) if several and all(map(_SEPARATOR.fullmatch, pieces[::2])) else text


def _both_signs(text: str) -> str:
    r"""Write a text with one \pm within braces or brackets as two, which math-verify reads; points stay as they are.

    >>> _both_signs(r"x = \frac{1 \pm \sqrt{5}}{2}"), _both_signs(r"(\pm 1, 0)")
    ('x = \\frac{1 + \\sqrt{5}}{2}, x = \\frac{1 - \\sqrt{5}}{2}', '(\\pm 1, 0)')
    """
    parts = _PLUS_MINUS.split(text.strip("$"))
    inside = parts[0].count("{") + parts[0].count("(") > parts[0].count("}") + parts[0].count(")")
    if not inside or len(parts) != 2 or _SEVERAL.search(text):
        return text
    return ", ".join(sign.join(parts) for sign in (" + ", " - "))


def split_percent(text: str, chain: bool = False) -> tuple[str, bool]:
    r"""Return the text without its percent sign, if it has one and that at its end, and whether it had.

    The last sign of 3/8 = 37.5\% is not that of the whole, unless such a `chain` is asked for.

    >>> split_percent(r"50 \%"), split_percent("5"), split_percent(r"p = 5\%"), split_percent(r"p = 5\%", chain=True)
    (('50', True), ('5', False), ('p = 5\\%', False), ('p = 5', True))
    """
    bare = _bare(text)
    body = bare[:-1].rstrip().removesuffix("\\").rstrip()
    percent = bare.endswith("%") and "%" not in body and body and (chain or not _EQUALS.search(body))
    return (body, True) if percent else (text, False)


def plain_pair(gold: str, answer: str) -> tuple[Number, Number, str] | None:
    r"""Return a plain gold, the plain answer as it reads beside it, and that in its normal form; None if one is none.

    A percent sign in the gold is a unit: 300 and 300\% answer 300\%, 3 does not. A percentage answers a gold without
    sign by its value, 50\% is 0.5, and by its number where that is over 1: 50\% answers 50, 0.5\% not 0.5.

    >>> plain_pair("0.5", r"50\%")[2], plain_pair("50", r"50\%")[2], plain_pair("8", "8 m/s")[2]
    ('1/2', '50', '8')
    """
    (gold, unit), (answer, other) = _split_unit(gold), _split_unit(answer)
    (gold, gold_percent), (body, percent) = split_percent(gold), split_percent(answer)
    wanted, number = plain_number(gold), plain_number(body)
    if wanted is None or number is None or (unit != other and unit and other):
        return None
    if percent and gold_percent:
        return wanted, number, answer
    number = read_percent(wanted, number) if percent else number
    return wanted, number, str(number)


def read_percent(wanted: Number, number: Number) -> Number:
    """Return what a percentage stands for beside a gold without sign: its value, or its number if the gold is over 1.

    The value goes first: 300% is 3 beside 3.
    """
    value = Number(number.value / 100, None if number.places is None else number.places + 2)
    return number if abs(wanted.value) > 1 and not same_number(wanted, value) else value


def same_plain(gold: str, answer: str) -> bool | None:
    """Say whether a plain number answers another, as `plain_pair` reads them; None if one of them is none."""
    pair = plain_pair(gold, answer)
    return None if pair is None else same_number(pair[0], pair[1])


def _split_unit(text: str) -> tuple[str, str]:
    """Return a text without the unit of a short list that ends it, and the unit; those math-verify leaves in."""
    match = _MEASURE.fullmatch(unwrapped(text))
    return (match[1], re.sub(r"[{}]", "", match[2])) if match else (text, "")


# --- choices ---------------------------------------------------------------------------------------

_WRAPPED = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|mbox) ?\{([^{}]*)\}")
_LETTER = re.compile(r"\(?([A-J])\)?\.?")
_CHOICE = re.compile(r"(?:(?:option|choice) )?(?:\(([A-J])\)|([A-J])[.:)]|([A-J])\Z)((?:\\ |\s)*(.*))", re.IGNORECASE)


def same_choice(gold: str, answer: str) -> bool | None:
    r"""Say whether the answer names the letter that the gold is; None if the gold is none or the answer names none.

    >>> same_choice("B", r"\textbf{(B)}\ 12"), same_choice("(B)", "C."), same_choice("B", "A or B")
    (True, False, None)
    """
    letter = chosen(gold, answer)
    return None if letter is None else letter in unwrapped(gold)


def chosen(gold: str, answer: str) -> str | None:
    """Return the letter that the answer names where the gold is one; None if either is none.

    >>> chosen("B", "D. 12"), chosen("12", "D. 12")
    ('D', None)
    """
    wanted = _LETTER.fullmatch(unwrapped(gold))
    named = _CHOICE.fullmatch(unwrapped(answer)) if wanted else None
    if wanted is None or named is None or re.match(r",|and\b|or\b|&", named[5]) or re.search(r"\([A-J]\)", named[5]):
        return None
    letter = named[1] or named[2] or named[3]
    return letter if letter.isupper() else None


def same_text(gold: str, answer: str) -> bool | None:
    r"""Return True if two texts are the same but for \text{...} around them, None if they are not."""
    return unwrapped(gold) == unwrapped(answer) or None


def unwrapped(text: str) -> str:
    r"""Return a text without the \text{...} around its parts and the dollar signs around it."""
    return _bare(_WRAPPED.sub(r"\1", text))


def _bare(text: str) -> str:
    return text.strip().strip("$").strip()


# --- words and bases -------------------------------------------------------------------------------

_BASED = re.compile(r"\$?\s*-?[0-9A-Za-z.]+\s*_\s*(?:\{\s*(?:\\(?:text|mathrm)\s*\{\s*)?(\d+)[\s}]*\}|(\d+))\s*\$?")
_PLAIN = {"no", "on"}  # no products of variables, though they are two small letters
_INFINITE = {"inf", "infinity"}  # words that math-verify reads
_WORDS = re.compile(r"(?:\\(?:text|mathrm|textbf|textit|mbox)\s*\{\s*([^{}]*)\}|([^{}\\]*))")


def other_base(a: str, b: str) -> bool | None:
    """Return False if two numerals such as 4210_5 and 4210_6 name different bases, which math-verify leaves out."""
    bases = {base for base in (named_base(a), named_base(b)) if base}
    return False if len(bases) > 1 else None


def named_base(text: str) -> str | None:
    """Return the base that a numeral such as 4210_5 names, None if it names none."""
    match = _BASED.fullmatch(text.strip())
    return (match.group(1) or match.group(2)) if match else None


def same_words(a: str, b: str) -> bool | None:
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
    match = _WORDS.fullmatch(_bare(text))
    words = " ".join((match.group(1) or match.group(2) or "").split()) if match else ""
    letters = words.replace(" ", "")
    spaced = " " in words and len(letters) == len(words.split())  # x y z: variables
    return words if len(letters) > 1 and letters.isalpha() and not spaced else None


# --- echoes ----------------------------------------------------------------------------------------

_LOOKS = re.compile(r"\s|\$|\\(?:left|right|displaystyle|[,;!:> ])|(?<=\\)[dt](?=frac)")
_UNDONE = re.compile(
    r"(?!\A)[-+*/^!<>=]|\\(?:frac|sqrt|times|cdot|div|binom|log|ln|sin|cos|tan|sum|prod|int|lim|pm|l?eq?|g?eq?)\b"
)
_ASSIGNED = re.compile(r"[A-Za-z]\w*=-?[\d.]+")
_ONE_TOKEN = re.compile(r"(\\sqrt|[\^_])\{(\w+)\}")
_FRACTION = re.compile(r"\\frac(\{[^{}]*\}|\d)(\{[^{}]*\}|\d)")
_RATIO = re.compile(r"-?(\d{1,99})/(\d{1,99})", re.ASCII)


def is_echo(answer: str, question: str, golds: Iterable[str]) -> bool:
    r"""Say whether an answer stands so in the question, has something left to do, and is written unlike every gold.

    2+3 is no answer to "What is 2+3?", nor x^2-1 to "Factor x^2-1". Numbers, fractions in lowest terms, words and x=5
    are never echoes; 1/2 and \frac{1}{2} are written alike, and so are \sqrt{3} and \sqrt3.

    >>> is_echo("2 + 3", "What is $2+3$?", ["5"]), is_echo("5", "Is 5 prime or 6?", ["5"])
    (True, False)
    """
    compact = _LOOKS.sub("", answer)
    if not _UNDONE.search(compact) or _ASSIGNED.fullmatch(compact):
        return False
    spelt = _spelt(compact)
    ratio = _RATIO.fullmatch(spelt)
    if ratio and int(ratio[2]) > 1 and math.gcd(int(ratio[1]), int(ratio[2])) == 1:
        return False
    if any(spelt == _spelt(_LOOKS.sub("", gold)) for gold in golds):
        return False
    asked = question.translate(_TRANSLATE).replace("**", "^")
    if compact not in _LOOKS.sub("", asked):
        return False
    pieces = rf"(?:{_LOOKS.pattern})*".join(map(re.escape, compact))
    return re.search(rf"(?<![\w.]){pieces}(?![\w.]*\w)", asked) is not None


def _spelt(compact: str) -> str:
    """Return a text with a/b for fractions and without braces around one token: what only looks different is equal."""
    text = _FRACTION.sub(r"\1/\2", _ONE_TOKEN.sub(r"\1\2", compact))
    return text.replace("{", "").replace("}", "")
