from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlvr.curriculum.order import Adaptive, Curriculum
from lightning_rlvr.types import Prompt, UserError

ENTROPY = np.array([0.7, 0.0, 1.1, 0.3, 0.9, 0.1, 0.5])


def frame(discrete, **columns):
    return pd.DataFrame({"semantic_entropy_discrete": discrete, **columns})


def questions(size):
    return [Prompt(f"q{i}", f"{i}=", str(i)) for i in range(size)]


def joined(stages):
    return np.concatenate(stages).tolist()


@pytest.mark.parametrize(
    ("order", "expected"), [("ascending", [1, 5, 3, 6, 0, 4, 2]), ("descending", [2, 4, 0, 6, 3, 5, 1])]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_sorted_by_semantic_entropy(order, expected, seed):
    stages = Curriculum(order, stages=3).cut(questions(7), frame(ENTROPY), seed)
    assert joined(stages) == expected
    assert [len(s) for s in stages] == [3, 2, 2]


@pytest.mark.parametrize("estimator", ["discrete", "rao_blackwell", "likelihood"])
def test_the_estimator_says_which_column_orders(estimator):
    other = -ENTROPY
    columns = {f"semantic_entropy_{e}": other for e in ("discrete", "rao_blackwell", "likelihood")}
    columns[f"semantic_entropy_{estimator}"] = ENTROPY
    got = Curriculum(estimator=estimator, stages=1).cut(questions(7), pd.DataFrame(columns), 0)
    assert joined(got) == [1, 5, 3, 6, 0, 4, 2]


def test_pass_rate_puts_the_often_solved_first():
    scores = frame(ENTROPY, pass_rate=[0.0, 1.0, 0.5, 0.25, 0.75, 0.125, 0.875])
    assert joined(Curriculum("pass_rate").cut(questions(7), scores, 0)) == [1, 6, 4, 2, 3, 5, 0]


def test_a_frame_with_a_sliced_index_is_read_by_position():
    scores = frame(ENTROPY).iloc[::-1]
    assert joined(Curriculum().cut(questions(7), scores, 0)) == [5, 1, 3, 0, 6, 2, 4]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["ascending", "descending", "pass_rate", "shuffled"]),
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_stages_are_a_sorted_partition_of_nearly_equal_parts(order, values, stages, seed):
    size = len(values)
    stages = min(stages, size)
    scores = frame(values, pass_rate=values)
    got = Curriculum(order, stages).cut(questions(size), scores, seed)
    assert len(got) == stages
    assert sorted(joined(got)) == list(range(size))
    sizes = [len(s) for s in got]
    assert max(sizes) - min(sizes) <= 1
    key = [values[i] for i in joined(got)]
    if order == "ascending":
        assert key == sorted(values)
    elif order != "shuffled":
        assert key == sorted(values, reverse=True)
    assert joined(Curriculum(order, stages).cut(questions(size), scores, seed)) == joined(got)


@pytest.mark.parametrize("order", ["ascending", "descending", "pass_rate", "shuffled"])
def test_ties_are_in_an_order_that_the_seed_decides(order):
    values = np.repeat([0.0, 1.0], 50)
    scores = frame(values, pass_rate=values)
    cuts = [joined(Curriculum(order).cut(questions(100), scores, seed)) for seed in (0, 1, 0)]
    assert cuts[0] == cuts[2] != cuts[1]
    first = cuts[0][:50]
    assert first != sorted(first)
    assert first != sorted(first, reverse=True)
    # neither half of the tied questions is favoured: of a random order half goes up
    assert 10 < sum(a < b for a, b in pairwise(first)) < 40


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize("level", [0.0, np.log(2), 0.5623351446188083, np.log(8)])
def test_rounding_noise_is_a_tie(order, level):
    noise = np.random.default_rng(0).uniform(-1e-12, 1e-12, 40)
    exact = joined(Curriculum(order).cut(questions(40), frame(np.full(40, level)), 3))
    assert joined(Curriculum(order).cut(questions(40), frame(level + noise), 3)) == exact
    # but a difference is none
    values = level + 1e-6 * np.arange(40)
    assert (
        joined(Curriculum(order).cut(questions(40), frame(values), 3))
        == list(range(40))[:: 1 if order == "ascending" else -1]
    )


def test_shuffled_needs_no_scores():
    curriculum = Curriculum("shuffled", stages=3)
    assert not curriculum.needs_scores
    got = joined(curriculum.cut(questions(30), None, 0))
    assert sorted(got) == list(range(30))
    assert got != sorted(got)
    assert all(Curriculum(order).needs_scores for order in ("ascending", "descending", "pass_rate"))


@pytest.mark.parametrize("scores", [None, frame(ENTROPY[:3])])
def test_each_question_needs_a_score(scores):
    with pytest.raises(ValueError, match=r"ordering 7 questions needs 7 scores, got (None|3)"):
        Curriculum().cut(questions(7), scores, 0)


@pytest.mark.parametrize("key", ["stages", "epochs"])
def test_bad_settings_name_the_key(key):
    with pytest.raises(UserError, match=rf"^{key} must be at least 1, got 0\. Set data\.curriculum\.{key}\.$"):
        Curriculum(**{key: 0})


def test_no_stage_may_be_empty():
    Curriculum(stages=7).check(7)
    with pytest.raises(UserError, match=r"at most the number of questions \(6\), got 7.*Set data\.curriculum\.stages"):
        Curriculum(stages=7).cut(questions(6), frame(ENTROPY[:6]), 0)


# --- filters and columns ---------------------------------------------------------------------------

KINDS = frame(
    [0.0, 0.0, 0.6, 0.5, 0.0, 0.9],
    pass_rate=[1.0, 0.0, 0.5, 0.25, 0.0, 0.0],
    majority=[1.0, 1.0, 0.5, 0.75, 0.0, 0.5],
    majority_correct=[True, False, True, False, False, False],
)  # right; wrong always the same way; split; mostly wrong the same way; never parsed; wrong in many ways


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"all_right": "drop"}, {1, 2, 3, 4, 5}),
        ({"all_wrong": "drop"}, {0, 2, 3}),
        ({"confident_and_wrong": "drop"}, {0, 2, 4, 5}),
        ({"all_right": "drop", "all_wrong": "drop", "confident_and_wrong": "drop"}, {2}),
    ],
)
@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_filters_drop_and_count(settings, left, order):
    curriculum = Curriculum(order, stages=1, **settings)
    assert curriculum.needs_scores == bool(settings or order == "ascending")
    assert set(joined(curriculum.cut(questions(6), KINDS, 0))) == left
    counts = {name: int(chosen.sum()) for name, chosen in curriculum.dropped(KINDS).items()}
    assert counts.keys() == settings.keys()
    assert sum(counts.values()) == 6 - len(left)


def test_the_confident_and_wrong_may_come_last_though_their_entropy_is_low():
    order = joined(Curriculum(stages=1, confident_and_wrong="last").cut(questions(6), KINDS, 0))
    assert order[4:] == [1, 3]
    assert set(order[:2]) == {0, 4}
    assert order[2:4] == [2, 5]


def test_too_few_questions_after_the_filters():
    with pytest.raises(UserError, match=r"\(3 after the filters of data\.curriculum dropped 3\), got 4"):
        Curriculum(stages=4, all_wrong="drop").cut(questions(6), KINDS, 0)


def test_a_column_of_the_data():
    levels = [3, 1.5, "2", 0]
    prompts = [Prompt(f"q{i}", "", "", {"level": level}) for i, level in enumerate(levels)]
    up, down = (Curriculum("column", column=name, stages=1) for name in ("level", "-level"))
    assert not up.needs_scores
    assert joined(up.cut(prompts, None, 0)) == [3, 1, 2, 0]
    assert joined(down.cut(prompts, None, 0)) == [0, 2, 1, 3]


def test_questions_without_a_number_have_no_place_in_the_order():
    scores = pd.DataFrame({"semantic_entropy_likelihood": [0.1, float("nan")]})
    with pytest.raises(UserError, match="1 of semantic_entropy_likelihood are"):
        Curriculum(estimator="likelihood").key([Prompt(str(i), "", "") for i in range(2)], scores)


@pytest.mark.parametrize("value", [None, "hard", float("nan"), [1]])
def test_a_column_must_hold_numbers(value):
    prompts = [Prompt("a", "", "", {"level": 1}), Prompt("b", "", "", {"level": value})]
    with pytest.raises(UserError, match=r"'level': question 'b' has .* and level\. Set data\.curriculum\.column"):
        Curriculum("column", column="level", stages=1).cut(prompts, None, 0)


def test_a_number_of_the_score_file_goes_before_a_column_of_the_data():
    prompts = [Prompt(f"q{i}", "", "", {"mean_length": -i}) for i in range(3)]
    curriculum = Curriculum("column", column="-mean_length", stages=1)
    assert curriculum.needs_scores
    assert joined(curriculum.cut(prompts, frame([0.0] * 3, mean_length=[5, 9, 7]), 0)) == [1, 2, 0]


# --- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"epochs": [1, 2, 3]}, "epochs"),
        ({"epochs": []}, "epochs"),
        ({"epochs": [1, 0]}, "epochs"),
        ({"order": "column"}, "column"),
        ({"column": "level"}, "column"),
        ({"adaptive": Adaptive()}, "epochs"),
        ({"adaptive": Adaptive(), "epochs": [2, 3]}, "epochs"),
        ({"adaptive": Adaptive(), "epochs": 2, "order": "shuffled"}, "order"),
        ({"adaptive": Adaptive(), "epochs": 2, "order": "column", "column": "level"}, "order"),
    ],
)
def test_settings_that_do_not_go_together_name_the_key(settings, key):
    with pytest.raises(UserError, match=rf"data\.curriculum\.{key}"):
        Curriculum(**settings)


@pytest.mark.parametrize(("key", "value"), [("every", 0), ("weight", 0.0), ("weight", 1.5), ("weight", float("nan"))])
def test_adaptive_settings_name_the_key(key, value):
    with pytest.raises(UserError, match=rf"^{key} must.*{value}.*data\.curriculum\.adaptive\.{key}"):
        Adaptive(**{key: value})


def test_passes_of_each_stage():
    assert Curriculum(stages=3, epochs=2).passes == [2, 2, 2]
    assert Curriculum(stages=2, epochs=[1, 4]).passes == [1, 4]
    assert Curriculum(epochs=2, adaptive=Adaptive()).passes == [2, 2]
