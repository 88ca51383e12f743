import copy
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_rlvr.rewards import MathAnswer
from lightning_rlvr.rewards.math import CACHE_ENTRIES, _quick
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


RIGHT = [  # final answer, gold
    ("2", "2"),
    ("0.5", r"\frac{1}{2}"),
    (r"\frac12", "0.5"),
    (r"\dfrac{3}{6}", "1/2"),
    (r"\tfrac{-1}{2}", r"-\frac{1}{2}"),
    ("1,234", "1234"),
    ("1234", "1,234"),
    (r"1{,}234{,}567", "1234567"),
    (r"12\,345", "12345"),
    (r"\$1,234.50", "1234.5"),
    (r"18", "$18"),
    ("\N{MINUS SIGN}7", "-7"),
    ("007", "7"),
    ("5.", "5"),
    ("0.333333", r"\frac{1}{3}"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\sqrt{2}/2", r"\frac{1}{\sqrt{2}}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("2**10", "1024"),
    ("x=5", "5"),
    ("5", "x=5"),
    (r"\{3, 1, 2\}", r"\{1,2,3\}"),
    ("(1, 2)", "(1,2)"),
    (r"x \in [1, 2)", "[1,2)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"5\text{ cm}", "5"),
    (r"90^\circ", "90"),
    ("300", r"300\%"),
    (r"300\%", r"300\%"),
    (r"50\%", "0.5"),
    (r"\text{Evelyn}", "Evelyn"),
    ("evelyn", r"\text{Evelyn}"),
    (r"\text{(C)}", "C"),
    (r"\pi r^2", r"r^2\pi"),
    (r"1\frac{1}{2}", "1.5"),
    ("$\n\\frac{1}\n{2}\n$", "1/2"),
    ("0.142857", "1/7"),
    (r"1.6\times10^{-19}", r"16 \times 10^{-20}"),
    ("0.0000004", r"4\times10^{-7}"),
    ("1.414214", r"\sqrt{2}"),
    ("yx", "xy"),
    ("y x z", "xyz"),
    ("YES", r"\text{yes}"),
    ("Friday and Monday", "Monday and Friday"),
    ("infinity", "inf"),
    ("4210", "4210_5"),
    ("4210_5", "4210"),
    ("4210_{5}", "$4210_5$"),
]
WRONG = [
    ("3", "2"),
    ("3", r"300\%"),
    ("0.03", r"3\%"),
    ("-7", "7"),
    ("0.33", r"\frac{1}{3}"),
    ("1.0000001", "1"),
    ("2**3", "2"),
    ("(2,1)", "(1,2)"),
    ("[1,2]", "(1,2)"),
    ("x^2+2x", "x^2+2x+1"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    (r"\text{Evelyn}", r"\text{Angela}"),
    (r"\text{A}", "B"),
    (r"\sqrt{2}", "1.41"),
    ("12345678901234567890", "12345678901234567891"),
    ("1/0", "0"),
    (r"9\times10^{-31}", r"1.6\times10^{-19}"),
    ("0.0000002", "0.0000004"),
    ("0.0000002", r"4\times10^{-7}"),
    ("0.0000001", "0"),
    (r"0.0000002\%", r"0.0000004\%"),
    (r"4210_{\text{5}}", "4210_6"),
    ("live", "evil"),
    ("live", r"\text{evil}"),
    ("ABC", "CAB"),
    ("no", "on"),
    ("ON", "NO"),
    ("4210_5", "4210_6"),
    ("4210_{5}", "4210_{12}"),
]


def test_table_of_answers(reward):
    pairs = RIGHT + WRONG
    found = reward(
        [Response(f"Hence \\boxed{{{answer}}}.") for answer, _ in pairs],
        [Prompt(str(i), "", gold) for i, (_, gold) in enumerate(pairs)],
    )
    statuses = {pair: verdict.status.value for pair, verdict in zip(pairs, found, strict=True)}
    assert statuses == dict.fromkeys(RIGHT, "correct") | dict.fromkeys(WRONG, "wrong")
    assert [verdict.score for verdict in found] == [1.0] * len(RIGHT) + [0.0] * len(WRONG)


def test_every_gold_of_the_table_passes_check(reward):
    reward.check([Prompt(str(i), "", gold) for i, (_, gold) in enumerate(RIGHT)])


def test_every_right_pair_is_equivalent_in_both_orders(reward):
    found = reward([Response(f"\\boxed{{{a}}}") for a, _ in RIGHT], [Prompt("u", "", g) for _, g in RIGHT])
    golds = reward([Response(f"\\boxed{{{g}}}") for _, g in RIGHT], [Prompt("u", "", g) for _, g in RIGHT])
    pairs = [(a.answer, b.answer) for a, b in zip(found, golds, strict=True)]
    same = reward.equivalent(pairs)
    assert same == reward.equivalent([(b, a) for a, b in pairs])
    failed = [pair for pair, row, ok in zip(pairs, RIGHT, same, strict=True) if not ok and "%" not in str(row)]
    assert failed == []


def test_equivalence_tells_apart(reward):
    pairs = [("1/2", "0.5"), ("3", r"300\%"), (r"300\%", "3"), ("300", r"300\%"), ("1<x<2", "(1,2)"), ("1", "2")]
    assert reward.equivalent(pairs) == [True, False, False, True, True, False]
    pairs = [("live", "evil"), ("xy", "yx"), ("4210_5", "4210_6"), ("0.0000004", "0.0000002")]
    assert reward.equivalent(pairs) == [False, True, False, False]
    assert reward.equivalent([]) == []


@pytest.mark.parametrize(
    ("text", "gold", "status", "answer"),
    [
        (r"\boxed{1} no, \boxed{2}", "2", "correct", "2"),
        (r"\boxed{1} no, \boxed{2}", "1", "wrong", "2"),
        (r"\boxed{1} and \boxed{2}", r"\{1,2\}", "wrong", "2"),
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


def test_a_truncated_response_needs_a_marked_answer(reward):
    assert judge(reward, "so far 3", "3").correct
    assert judge(reward, "so far 3", "3", truncated=True).status is Status.UNPARSABLE
    assert judge(reward, r"\boxed{3} and", "3", truncated=True).correct


def test_gold_answers_may_stand_in_a_worked_solution(reward):
    assert judge(reward, "#### 1234", "5 + 6 = 11\n#### 1,234").correct
    assert judge(reward, r"\boxed{7}", r"We get \boxed{7}.").correct


@pytest.mark.parametrize("gold", ["", "?!", "1/0", "7^{60000000}", "x" * 3000])
def test_check_names_the_question_whose_gold_is_unreadable(hasty, gold):
    prompts = [Prompt("fine", "", "3"), Prompt("gsm-17", "", gold), Prompt("gsm-18", "", gold)]
    with pytest.raises(UserError, match=r"'gsm-17' \(2 such of 3\).*data\.train"):
        hasty.check(prompts)


def test_hostile_answers_cost_only_themselves(hasty):
    hostile = [
        r"\boxed{7^{60000000}}",
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
    assert hasty.equivalent([("7^{60000000}", "3"), (r"\sqrt{8}", r"2\sqrt{2}")]) == [False, True]


def test_time_outs_are_not_remembered(hasty):
    assert judge(hasty, r"\boxed{7^{60000000}}", "3").status is Status.TIMEOUT
    assert len(hasty._verdicts) <= CACHE_ENTRIES
    assert hasty._verdicts.get((r"7^{60000000}", True, "3")) is None


def test_verdicts_are_remembered(monkeypatch):
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
        other._verdicts = type(other._verdicts)(CACHE_ENTRIES)
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


@settings(max_examples=200, deadline=None)
@given(gold=number_texts, answer=number_texts)
@example(gold="0.1", answer="1/10")
@example(gold="-1,234.50", answer="-1234.5")
@example(gold="100,200", answer="100200")
@example(gold="0.0", answer="0")
@example(gold="00.50", answer=".5")
def test_the_fast_path_agrees_with_math_verify(gold, answer):
    fast = same_number(plain_number(gold), plain_number(answer))
    assert plain_number(gold) is not None
    if fast is not None:
        assert fast == by_math_verify(gold, answer)


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
    "text", ["", "-", ".", "1e5", "1,23", "0,123", "1 234", "+1,234", "3/0", "5%", "٣", "²", "1/2/3", "9" * 61, "x"]
)
def test_other_texts_are_left_to_math_verify(text):
    assert plain_number(text) is None


def test_near_misses_are_left_to_math_verify():
    assert same_number(plain_number("0.333333"), plain_number("1/3")) is None
    assert same_number(plain_number("0.3333"), plain_number("1/3")) is False
    assert same_number(plain_number("0.0000004"), plain_number("0.0000002")) is False
    assert same_number(plain_number("0.0000001"), plain_number("0")) is False
    assert _quick(("2", True, "2.00")).answer == "2"
    assert _quick(("2", False, "2")) is None
