"""ChainAnswer: what is right, what is not, and which chains mean the same."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rlvr.rewards import ChainAnswer
from lightning_rlvr.rewards.chain import formula
from lightning_rlvr.types import Prompt, Response, Status, UserError

COUNTDOWN = Prompt("c", "2 3 5 8>21:", "", {"target": 21, "numbers": [2, 3, 5, 8]})
MAKE = Prompt("m", "8>20/2:", "", {"target": 20, "start": 8, "terms": 3, "largest": 12})


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("8*3=24-5=19+2=21", Status.CORRECT),
        (" 8*3=24-5=19+2=21\n", Status.CORRECT),
        ("2-5=-3*8=-24", Status.WRONG),  # a negative result may be said, but this is not the target
        ("8*3=24-5=18+2=21", Status.WRONG),  # a step is wrong
        ("8*3=24-5=19+2=22", Status.WRONG),  # the last one is
        ("8*3=24-3=21", Status.WRONG),  # not every number, and one twice
        ("8*3=24-5=19+2=21+0=21", Status.WRONG),  # a number more
        ("3*5=15+8=23-2=21", Status.CORRECT),
        ("8*3=24-5=19+2=21 ", Status.CORRECT),
        ("8*3=24, 24-5=19", Status.UNPARSABLE),
        ("21", Status.UNPARSABLE),
        ("", Status.UNPARSABLE),
        ("8*3=24-5=19+2=", Status.UNPARSABLE),
        ("٨*3=24", Status.UNPARSABLE),
        ("9" * 5000 + "*9=1", Status.UNPARSABLE),
    ],
)
def test_countdown(text, status):
    (verdict,) = ChainAnswer()([Response(text)], [COUNTDOWN])
    assert verdict.status is status
    assert verdict.score == float(status is Status.CORRECT)
    assert (verdict.answer is None) == (status is Status.UNPARSABLE)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("8+3=11+9=20", True),
        ("8*3=24-4=20", True),
        ("8+2=10*2=20", False),  # 2 twice
        ("8+12=20+0=20", False),  # 0 is not from 1 on
        ("8-1=7+13=20", False),  # 13 is beyond the largest
        ("9+3=12+8=20", False),  # another start
        ("8+12=20", False),  # a step too few
    ],
)
def test_make_number(text, right):
    (verdict,) = ChainAnswer()([Response(text)], [MAKE])
    assert verdict.correct is right


def test_a_prompt_without_a_rule():
    with pytest.raises(UserError, match="metadata must hold target"):
        ChainAnswer().check([COUNTDOWN, Prompt("x", "", "", {"target": 3, "start": 1})])


chains = st.integers(2, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 9), min_size=n, max_size=n),
        st.lists(st.sampled_from("+-*"), min_size=n - 1, max_size=n - 1),
    )
)


@given(chains)
def test_the_formula_has_the_value_of_the_chain(chain):
    numbers, operators = chain
    result = numbers[0]
    for operator, number in zip(operators, numbers[1:], strict=True):
        result = {"+": result + number, "-": result - number, "*": result * number}[operator]
    assert eval(formula(numbers, operators)) == result


def test_orders_of_a_sum_and_of_a_product_mean_the_same_and_nothing_else_does():
    sums = {formula(order, "++") for order in itertools.permutations([2, 5, 9])}
    products = {formula([*order, 1], "**-") for order in itertools.permutations([2, 5, 9])}
    assert len(sums) == len(products) == 1
    assert formula([9, 2, 5], "-+") == formula([9, 5, 2], "+-")
    assert formula([9, 2, 5], "-+") != formula([9, 5, 2], "-+")
    assert formula([2, 3, 4], "+*") != formula([2, 3, 4], "*+")
