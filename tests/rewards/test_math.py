import copy
import importlib
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import math_verify.parser
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tricky_pairs import TRICKY, TRICKY_BOTH

from lightning_rlvr.rewards import MathAnswer
from lightning_rlvr.rewards.math import CACHE_ENTRIES, _quick
from lightning_rlvr.rewards.normal import tidy
from lightning_rlvr.rewards.number import plain_number, same_number
from lightning_rlvr.types import Prompt, Response, Status, UserError


@pytest.fixture(scope="module")
def reward():
    reward = MathAnswer(workers=2, timeout_s=3.0)
    yield reward
    reward.close()


@pytest.fixture(scope="module")
def hasty():
    reward = MathAnswer(workers=2, timeout_s=1.0)
    reward.equivalent([("x", "y")])  # start before the clock runs
    yield reward
    reward.close()


def judge(reward, text, gold, truncated=False):
    return reward([Response(text, truncated)], [Prompt("u1", "question", gold)])[0]


ROWS = [
    *((answer, gold, "R", why) for answer, gold, why in TRICKY_BOTH),
    *((gold, answer, "R", f"{why}, the other way round") for answer, gold, why in TRICKY_BOTH),
    *TRICKY,
]
SLOW = "9^{9^{9^{9}}}"  # takes longer than anyone waits
STATUS = {"R": "correct", "W": "wrong", "U": "unparsable"}


def test_tricky_pairs(reward):
    found = reward(
        [Response(f"Hence \\boxed{{{answer}}}.") for answer, *_ in ROWS],
        [Prompt(str(i), "", gold) for i, (_, gold, *_) in enumerate(ROWS)],
    )
    failed = [(*row, v) for row, v in zip(ROWS, found, strict=True) if v.status.value != STATUS[row[2]]]
    assert failed == []
    assert [verdict.score for verdict in found] == [float(row[2] == "R") for row in ROWS]
    assert len(TRICKY_BOTH) + len(TRICKY) >= 240


def test_both_stages_of_the_parser_read_the_same(monkeypatch):
    judge = importlib.import_module("lightning_rlvr.rewards._math_judge")
    texts = {tidy(text) for answer, gold, *_ in ROWS for text in (answer, gold)}
    judge._read.cache_clear()
    first = {text: [(type(part), repr(part)) for part in judge._read(text)] for text in texts}
    monkeypatch.setattr(judge._Latex2Sympy, "create_parser", judge._Latex2Sympy.create_parser.__wrapped__)
    judge._read.cache_clear()
    math_verify.parser.parse_latex_cached.cache_clear()
    math_verify.parser.extract_latex.cache_clear()
    assert first == {text: [(type(part), repr(part)) for part in judge._read(text)] for text in texts}


def test_lines_and_inequalities_are_told_apart_without_solving():
    judge = importlib.import_module("lightning_rlvr.rewards._math_judge")
    rows = [
        ("y=2x+1", "2y-4x=2", True),
        ("y=2x+1", "y=2x+2", False),
        ("x<3", "3>x", True),
        ("-x<3", "x>-3", True),
        ("-x<3", "x<-3", False),
        (r"2x \le 6", r"x \le 3", True),
        ("x<3", r"x \le 3", False),
        ("x^2=1", "x^2=1", None),
        ("0.5x=1", "x=2", None),
        ("x=y", "a=b", False),
    ]
    for a, b, same in rows:
        first, second = judge._read(a)[0], judge._read(b)[0]
        assert judge._tried(judge.same_line, first, second) is same, (a, b)


def test_every_gold_of_the_table_can_be_read(reward):
    prompts = [Prompt(str(i), "", gold) for i, (_, gold, *_) in enumerate(ROWS)]
    assert [ROWS[i] for i in reward.unjudgeable(prompts)] == []
    reward.check(prompts)


def test_every_right_pair_is_equivalent_in_both_orders(reward):
    rows = [(answer, gold) for answer, gold, verdict, _ in ROWS if verdict == "R" and "%" not in answer + gold]
    found = reward([Response(f"\\boxed{{{a}}}") for a, _ in rows], [Prompt("u", "", g) for _, g in rows])
    golds = reward([Response(f"\\boxed{{{g}}}") for _, g in rows], [Prompt("u", "", g) for _, g in rows])
    pairs = [(a.answer, b.answer) for a, b in zip(found, golds, strict=True)]
    same = reward.equivalent(pairs)
    assert same == reward.equivalent([(b, a) for a, b in pairs])
    assert [(pair, row) for pair, row, ok in zip(pairs, rows, same, strict=True) if not ok] == []


def test_the_echo_of_the_question_is_no_answer(reward):
    rows = [  # question, answer, gold, whether it is an echo
        ("What is $2 + 3$?", "2+3", "5", True),
        ("What is $2 + 3$?", "5", "5", False),
        ("What is 12+34?", "2+3", "5", False),
        ("Simplify $\\sqrt{8}$.", r"\sqrt{8}", r"2\sqrt{2}", True),
        ("Simplify $\\dfrac{6}{8}$.", r"\frac{6}{8}", r"\frac{3}{4}", True),
        ("Simplify $\\frac{6}{8}$.", r"\frac{3}{4}", r"\frac{3}{4}", False),
        ("Factor $x^2 - 1$.", "x^2-1", "(x-1)(x+1)", True),
        ("Factor $x^2 - 1$.", "(x+1)(x-1)", "(x-1)(x+1)", False),
        ("Solve $2x = 10$.", "2x=10", "x=5", True),
        ("Solve $2x = 10$.", "x=5", "5", False),
        ("Is $\\sqrt{2}$ or $\\sqrt{3}$ larger?", r"\sqrt{3}", r"\sqrt{3}", False),
        ("Is $x=5$ a root?", "x=5", "5", False),
        ("7 apples at 0.5 dollars each?", "0.5", r"\frac{1}{2}", False),
        ("It lands heads with probability 1/2. And tails?", "1/2", r"\frac{1}{2}", False),
        ("Which is largest? 1/2, 2/3, 3/5", "2/3", r"\frac{2}{3}", False),
        ("If $\\frac{3}{4}$ of it is left, how much is that?", r"\frac{3}{4}", "3/4", False),
        ("Each of 2 painters does 1/2. What is left for one?", "1/2", "0.5", False),
        ("Two sides are $2\\sqrt{3}$. And the third?", r"2\sqrt{3}", r"2\sqrt3", False),
        ("Two sides are $\\frac{\\sqrt{3}}{2}$. And the third?", r"\frac{\sqrt{3}}{2}", r"\sqrt3/2", False),
        ("Simplify 6/8.", "6/8", r"\frac{3}{4}", True),
        ("Simplify 6/3.", "6/3", "2", True),
        ("What is 7/1?", "7/1", "7", True),
    ]
    found = reward([Response(f"\\boxed{{{row[1]}}}") for row in rows], [Prompt("u", row[0], row[2]) for row in rows])
    assert [(row[:2], verdict.correct) for row, verdict in zip(rows, found, strict=True)] == [
        (row[:2], not row[3]) for row in rows
    ]
    echo = reward([Response("So it is $2+3$.")], [Prompt("u", "What is $2+3$?", "5")])[0]
    assert (echo.status, echo.score) == (Status.WRONG, 0.0)


def test_any_of_the_alternatives_is_right(reward):
    prompt = Prompt("u", "", "1", {"alternatives": ["1", r"\sqrt{2}", r"$\frac{1}{3}$"]})
    answers = ["1", r"2/\sqrt{2}", "0.333333", "0.5", r"\sqrt{3}"]
    found = reward([Response(f"\\boxed{{{answer}}}") for answer in answers], [prompt] * 5)
    assert [verdict.correct for verdict in found] == [True, True, True, False, False]
    bad = Prompt("bad", "", "1", {"alternatives": ["?!"]})
    assert reward.unjudgeable([prompt, bad, prompt, Prompt("worse", "", "")]) == [1, 3]
    assert reward.unjudgeable([prompt, Prompt("v", "", "1", {"alternatives": None})]) == []


def test_equivalence_tells_apart(reward):
    pairs = [("1/2", "0.5"), ("3", r"300\%"), (r"300\%", "3"), ("300", r"300\%"), ("1<x<2", "(1,2)"), ("1", "2")]
    assert reward.equivalent(pairs) == [True, False, False, True, True, False]
    pairs = [("live", "evil"), ("xy", "yx"), ("4210_5", "4210_6"), ("0.0000004", "0.0000002")]
    assert reward.equivalent(pairs) == [False, True, False, False]
    pairs = [(r"0.\overline{72}", r"0.\overline{27}"), (r"n \equiv 1 \pmod 4", r"n \equiv 1 \pmod 7")]
    assert reward.equivalent(pairs) == [False, False]
    assert reward.equivalent([]) == []


@pytest.mark.parametrize(
    ("text", "gold", "status", "answer"),
    [
        (r"\boxed{1} no, \boxed{2}", "2", "correct", "2"),
        (r"\boxed{1} no, \boxed{2}", "1", "wrong", "2"),
        (r"\boxed{1} and \boxed{2}", r"\{1,2\}", "correct", "1, 2"),
        (r"\boxed{1} and \boxed{2}", "2", "wrong", "1, 2"),
        (r"$\boxed{1}$, $\boxed{2}$", "1", "wrong", "1, 2"),
        (r"\boxed{2}, that is, \boxed{2}", "2", "correct", "2"),
        (r"\boxed{2} or \boxed{2}", "2", "correct", "2"),
        ("\\boxed{1}\n\n\\boxed{2}", "2", "correct", "2"),
        (r"\boxed{1} \text{ or } \boxed{2}", "1, 2", "correct", "1, 2"),
        (r"\boxed{\boxed{3}}", "3", "correct", "3"),
        (r"\boxed{3} or rather \boxed{4", "3", "correct", "3"),
        (r"\fbox{3}", "3", "correct", "3"),
        (r"\boxed{}", "3", "unparsable", None),
        (r"#### 5 \boxed{3}", "3", "correct", "3"),
        ("9 - 4 = 5\n#### 1,005", "1005", "correct", "1005"),
        ("#### 4\n#### 5 \n\n", "5", "correct", "5"),
        ("#### 4\n#### 5 \nbye 6", "5", "wrong", "6"),
        ("#### Final answer\nThe answer is 42.", "42", "correct", "42"),
        ("The answer is 42.\n####", "42", "correct", "42"),
        ("It is $live$.", "evil", "wrong", "live"),
        (r"It is $4210_6$.", "4210_5", "wrong", "4210_6"),
        (r"It is $0.\overline{27}$.", "3/11", "correct", "3/11"),
        (r"It is $n \equiv 3 \pmod 4$.", r"n \equiv 1 \pmod 4", "wrong", r"n \equiv 3 \pmod{4}"),
        ("  42\n", "42", "correct", "42"),
        ("So it costs 18 dollars, and the answer is 20.", "20", "correct", "20"),
        (r"The final answer is $\frac{3}{6}$.", "0.5", "correct", "1/2"),
        ("I do not know.", "3", "unparsable", None),
        ("", "3", "unparsable", None),
        (r"\boxed{1 / 2}" + " then much text" * 100, "0.5", "correct", "1/2"),
        (r"\boxed{%s}" % ("1+" * 600 + "1"), "601", "unparsable", None),
    ],
)
def test_which_answer_counts(reward, text, gold, status, answer):
    verdict = judge(reward, text, gold)
    assert (verdict.status.value, verdict.answer) == (status, answer)


@pytest.mark.parametrize(
    ("gold", "answer", "normal"),
    [
        ("B", "B. 12", "B"),
        ("B", r"\textbf{(D)}\ 15", "D"),
        (r"\frac{1}{\sqrt{4}}", r"50\%", "1/2"),
        (r"\frac13", r"\frac{100}{3}\%", "1/3"),
        (r"10\sqrt{25}", r"50\%", "50"),
        ("12:30", r"\text{12:30}", "12:30"),
        ("2:3", "8:12", "2/3"),
    ],
)
def test_the_normal_form_is_what_the_answer_says_beside_the_gold(reward, gold, answer, normal):
    assert judge(reward, f"\\boxed{{{answer}}}", gold).answer == normal


def test_a_truncated_response_needs_a_marked_answer(reward):
    assert judge(reward, "so far 3", "3").correct
    assert judge(reward, "so far 3", "3", truncated=True).status is Status.UNPARSABLE
    assert judge(reward, r"\boxed{3} and", "3", truncated=True).correct


def test_gold_answers_may_stand_in_a_worked_solution(reward):
    assert judge(reward, "#### 1234", "5 + 6 = 11\n#### 1,234").correct
    assert judge(reward, r"\boxed{7}", r"We get \boxed{7}.").correct


@pytest.mark.parametrize("gold", ["", "?!", "1/0", SLOW, "x" * 3000])
def test_check_names_the_question_whose_gold_is_unreadable(hasty, gold):
    prompts = [Prompt("fine", "", "3"), Prompt("gsm-17", "", gold), Prompt("gsm-18", "", gold)]
    with pytest.raises(UserError, match=r"'gsm-17' \(2 such of 3\).*data\.unjudgeable"):
        hasty.check(prompts)


def test_hostile_answers_cost_only_themselves(hasty):
    hostile = [
        rf"\boxed{{{SLOW}}}",
        r"\boxed{9^{9^{9^{9^{9}}}}}",
        r"\boxed{10000000!!!}",
        r"\boxed{%s}" % ("(" * 400 + "1" + ")" * 400),
        r"\boxed{%s}" % (r"\frac{1}{" * 100 + "2" + "}" * 100),
        r"\boxed{%s}" % (r"\sqrt" * 190 + "{1}"),
        "\x00\x01\x1b[31m \ud800 \\boxed{\x00\u202e\ud800}",
        r"\boxed{__import__('os').system('touch /tmp/owned')}",
        "{" * 1_000_000,
        r"\boxed{" * 150_000,
        "$" * 1_000_000,
        r"\[" * 500_000,
        "#" * 1_000_000,
        "9" * 1_000_000,
        r"\boxed{%s}" % ("9" * 900),
        "answer: " * 120_000,
    ]
    rows = [text for bad in hostile for text in (bad, r"\boxed{\sqrt{8}}")]
    start = time.monotonic()
    found = hasty([Response(text) for text in rows], [Prompt("u", "", r"2\sqrt{2}")] * len(rows))
    assert time.monotonic() - start < 1.5 * len(hostile) / 2 + 3
    assert [verdict.score for verdict in found] == [0.0, 1.0] * len(hostile)
    assert found[0].status is Status.TIMEOUT
    assert found[0].answer is None
    assert all(verdict.status in set(Status) - {Status.CORRECT} for verdict in found[::2])
    assert hasty.equivalent([(SLOW, "3"), (r"\sqrt{8}", r"2\sqrt{2}")]) == [False, True]


def test_time_outs_are_not_remembered(hasty):
    assert judge(hasty, rf"\boxed{{{SLOW}}}", "3").status is Status.TIMEOUT
    assert len(hasty._judged) <= CACHE_ENTRIES
    assert hasty._judged.get((SLOW, True, "3")) is None


def test_judged_are_remembered(monkeypatch):
    reward = MathAnswer(workers=1)
    calls = []
    honest = reward._pool.map
    monkeypatch.setattr(reward._pool, "map", lambda items: calls.append(len(items)) or honest(items))
    responses, prompts = [Response(r"\boxed{\sqrt{8}}")] * 5, [Prompt("u", "", r"2\sqrt{2}")] * 5
    assert [v.score for v in reward(responses, prompts)] == [1.0] * 5
    assert calls == [1]
    assert [v.score for v in reward(responses, prompts)] == [1.0] * 5
    assert calls == [1, 0]
    assert reward.equivalent([("a", "b"), ("b", "a")]) == [False, False]
    assert reward.equivalent([("b", "a"), ("1", "2"), ("c", "c")]) == [False, False, True]
    assert calls == [1, 0, 1, 0]
    reward.close()


def test_a_closed_or_copied_reward_works(reward):
    other = copy.deepcopy(reward)
    for _ in range(2):
        assert judge(other, r"\boxed{\pi+1}", r"1+\pi").correct
        other._judged = type(other._judged)(CACHE_ENTRIES)
        other.close()


def test_the_module_is_light():
    code = "import sys, lightning_rlvr.rewards; print({'math_verify', 'sympy', 'reasoning_gym'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert done.stdout.strip() == "set()"


# --- plain numbers ---------------------------------------------------------------------------------

integers = st.integers(-(10**18), 10**18)
small = st.integers(-30, 30)
number_texts = st.one_of(
    integers.map(str),
    small.map(str),
    integers.map(lambda n: f"{n:,}"),
    st.tuples(st.integers(-9999, 9999), st.integers(0, 6)).map(lambda t: f"{t[0] / 10 ** t[1]:.{t[1]}f}"),
    st.tuples(st.integers(10**3, 10**7), st.integers(0, 99)).map(lambda t: f"{t[0]:,}.{t[1]:02d}"),
    st.integers(0, 999).map(lambda n: f".{n:03d}"),
    st.tuples(small, st.integers(1, 30)).map(lambda t: f"{t[0]}/{t[1]}"),
    st.tuples(st.sampled_from(["", "-"]), st.integers(0, 30), st.integers(1, 30)).map(
        lambda t: rf"{t[0]}\frac{{{t[1]}}}{{{t[2]}}}"
    ),
)


def by_math_verify(gold, answer):
    from math_verify import parse, verify

    first, second = (parse(f"${text}$", parsing_timeout=None) for text in (gold, answer))
    a, b = plain_number(gold).value, plain_number(answer).value
    return verify(first, second, timeout_seconds=None) and abs(a - b) <= max(abs(a), abs(b)) / 10**6


def by_rounding(gold, answer):
    """Whether one is a decimal of six digits, or of six places and four digits, that the other is rounded to."""
    for text, other in ((gold, answer), (answer, gold)):
        whole, point, places = text.replace(",", "").partition(".")
        digits = len((whole + places).lstrip("-0"))
        if point and "/" not in text and (digits >= 6 or (len(places) >= 6 and digits >= 4)):
            exact, scale = Fraction(str(plain_number(other).value)), 10 ** len(places)
            if abs(plain_number(text).value - exact) * scale * 2 <= 1:
                return True
    return False


@settings(max_examples=200, deadline=None)
@given(gold=number_texts, answer=number_texts)
@example(gold="0.1", answer="1/10")
@example(gold="-1,234.50", answer="-1234.5")
@example(gold="100,200", answer="100200")
@example(gold="0.0", answer="0")
@example(gold="00.50", answer=".5")
@example(gold="0.333333", answer="1/3")
def test_the_fast_path_agrees_with_math_verify_but_for_rounding(gold, answer):
    assert plain_number(gold) is not None
    fast = same_number(plain_number(gold), plain_number(answer))
    rounded = "." in gold + answer and plain_number(gold).value != plain_number(answer).value
    assert fast == (by_rounding(gold, answer) if rounded else by_math_verify(gold, answer))


@settings(max_examples=100, deadline=None)
@given(text=number_texts, digits=st.integers(1, 6))
def test_the_fast_path_finds_what_is_equal(text, digits):
    number = plain_number(text)
    value = Fraction(number.value)
    other = f"{value.numerator * digits}/{value.denominator * digits}"
    fast = same_number(number, plain_number(other))
    assert fast is True
    assert by_math_verify(text, other)


@given(text=number_texts)
def test_the_normal_form_reads_back(text):
    number = plain_number(text)
    again = plain_number(str(number))
    assert again is not None
    assert again.value == number.value
    assert str(again) == str(number)


@pytest.mark.parametrize(
    "text", ["", "-", ".", "1e99", "1,23", "0,123", "1 234", "+1,234", "3/0", "5%", "٣", "²", "1/2/3", "9" * 61, "x"]
)
def test_other_texts_are_left_to_math_verify(text):
    assert plain_number(text) is None


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("0.333333", "1/3", True),
        ("0.3333333333", "1/3", True),
        ("0.333334", "1/3", False),
        ("0.3333", "1/3", False),
        ("0.666666", "2/3", False),
        ("0.083333", "1/12", True),
        ("0.000333", "1/3000", False),
        ("0.0003333", "1/3000", True),
        ("12345.7", "12345.67", True),
        ("1234.6", "1234.56", False),
        ("0.0000004", "0.0000002", False),
        ("0.0000001", "0", False),
        ("0.30000000000000004", "0.3", True),
        ("1.00000000000001", "1", False),
        ("1.5e3", "1500", True),
        (r"2.5\times10^{-3}", "1/400", True),
        ("1000000", "1000001", False),
        ("1/3", "333333/1000000", False),
    ],
)
def test_rounded_decimals(a, b, same):
    assert same_number(plain_number(a), plain_number(b)) is same
    assert same_number(plain_number(b), plain_number(a)) is same


def test_plain_numbers_are_judged_in_process():
    assert _quick(("2", True, "2.00")).verdict.answer == "2"
    assert _quick((r"50\%", True, "0.5")).verdict.answer == "1/2"
    assert _quick((r"50\%", True, "50")).verdict.answer == "50"
    assert _quick((r"50\%", True, r"50\%")).verdict.answer == r"50\%"
    assert _quick(("8 m/s", True, "8")).verdict.answer == "8"
    assert _quick(("2", False, "2")) is None
    assert _quick(("x", True, "2")) is None
