import random
import re
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import reasoning_gym

from lightning_rlvr.tasks.worked import WorkedChainSum, any_order, parse_terms
from lightning_rlvr.types import UserError

TEACHER = WorkedChainSum()
STEP = re.compile(r"([+-]\d+)=(-?\d+)")


def take(teacher, n, seed=0):
    return list(islice(teacher.examples(seed), n))


def style_of(prompt, solution):
    steps = solution.split("#")[0]
    if not steps:
        return "direct"
    first, sign, second = prompt.split()[:3]
    return "in_order" if steps.startswith(f"{first}{sign}{second}=") else "any_order"


@pytest.mark.parametrize("style", ["direct", "in_order", "any_order"])
@pytest.mark.parametrize("digits", [1, 3])
def test_each_style_derives_the_right_answer_from_the_terms_of_the_question(style, digits):
    shares = {"direct": 0.0, "in_order": 0.0, "any_order": 0.0, style: 1.0}
    for prompt, solution in take(WorkedChainSum(min_terms=2, max_digits=digits, **shares), 200):
        terms = parse_terms(prompt.removesuffix(" ="))
        derivation, answer = solution.split("#")

        assert int(answer) == sum(map(int, terms))
        if style == "direct":
            assert derivation == ""
            continue
        first = re.match(r"-?\d+", derivation).group()
        steps = STEP.findall(derivation)
        used = [first if first.startswith("-") else f"+{first}", *(term for term, _ in steps)]
        assert Counter(used) == Counter(terms)
        assert used == terms or style == "any_order"
        totals = [sum(map(int, used[: i + 2])) for i in range(len(steps))]
        assert [int(total) for _, total in steps] == totals
        assert f"{first}{''.join(f'{term}={total}' for term, total in steps)}" == derivation


def test_any_order_uses_many_orders():
    rng = random.Random(0)

    assert len({any_order(["+1", "-2", "+3"], rng) for _ in range(200)}) == 6


def test_styles_come_in_the_shares_asked_for():
    teacher = WorkedChainSum(direct=0.5, in_order=0.5, any_order=0.0)
    counts = Counter(style_of(*example) for example in take(teacher, 2000))

    assert counts["direct"] / 2000 == pytest.approx(0.5, abs=0.05)
    assert counts["direct"] + counts["in_order"] == 2000


def test_the_seed_decides_the_examples():
    assert take(TEACHER, 20, seed=3) == take(TEACHER, 20, seed=3)
    assert take(TEACHER, 20, seed=3) != take(TEACHER, 20, seed=4)


def test_examples_ask_what_reasoning_gym_asks_in_the_index_range_and_nothing_else():
    teacher = replace(TEACHER, first_index=10, last_index=13, question_seed=7)
    source = reasoning_gym.create_dataset(
        "chain_sum", min_terms=5, max_terms=5, min_digits=1, max_digits=1, seed=7, size=13
    )
    expected = {source[i]["metadata"]["expression"] + " =" for i in (10, 11, 12)}

    assert {prompt for prompt, _ in take(teacher, 100)} == expected


def test_held_out_questions_are_rarely_met_in_the_warm_start():
    """Disjoint indices still give equal texts now and then: 5 terms have 1.6 million expressions."""
    taught = {prompt for prompt, _ in take(TEACHER, 20_000)}
    held_out = {prompt for prompt, _ in take(replace(TEACHER, first_index=0, last_index=2000), 2000, seed=1)}

    assert len(held_out & taught) / len(held_out) < 0.03


def test_template_and_marker_are_used():
    teacher = replace(TEACHER, prompt_template="[{num_terms}] {expression}?", marker=" -> ")
    prompt, solution = take(teacher, 1)[0]

    assert prompt.startswith("[5] ")
    assert prompt.endswith("?")
    assert solution.count(" -> ") == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"direct": 0.9}, "direct"),
        ({"direct": -0.1, "in_order": 0.8}, "direct"),
        ({"first_index": 5, "last_index": 5}, "first_index"),
        ({"prompt_template": "{question_text}"}, "question_text"),
        ({"prompt_template": "{expression.__class__}"}, "plain"),
        ({"prompt_template": "sum:"}, "prompt_template must name"),
        ({"min_terms": 6}, "min"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, named):
    with pytest.raises(UserError, match=named):
        take(replace(TEACHER, **settings), 1)
