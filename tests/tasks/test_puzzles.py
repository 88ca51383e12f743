"""Countdown and MakeNumber: puzzles that can be solved, none of them in two splits."""

from dataclasses import replace
from itertools import islice

import pytest

from lightning_rlvr.rewards import ChainAnswer
from lightning_rlvr.tasks import Countdown, MakeNumber
from lightning_rlvr.types import Response, UserError

TASKS = [Countdown(terms=3, size=200), Countdown(terms=4, size=200), MakeNumber(terms=4, largest=12, size=200)]


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_every_puzzle_is_solved_by_the_chain_it_was_made_from(task):
    prompts, reward = task.load(), ChainAnswer()
    reward.check(prompts)
    verdicts = reward([Response(prompt.answer) for prompt in prompts], prompts)
    assert [verdict.score for verdict in verdicts] == [1.0] * 200


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_questions_are_different_the_same_again_and_in_one_split(task):
    train, held_out = task.load(), replace(task, split="held_out", size=40).load()
    assert task.load() == train
    for key in ("uid", "text"):
        names = [getattr(prompt, key) for prompt in train + held_out]
        assert len(set(names)) == 240
    assert replace(task, seed=1).load() != train


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_the_teacher_solves_puzzles_of_the_training_split_in_several_ways(task):
    examples = list(islice(task.examples(seed=3), 3000))
    held_out = {prompt.text for prompt in replace(task, split="held_out", size=40).load()}
    assert held_out.isdisjoint(text for text, _ in examples)
    assert examples[:50] == list(islice(task.examples(seed=3), 50))
    assert examples[:50] != list(islice(task.examples(seed=4), 50))
    ways: dict[str, set[str]] = {}
    for text, solution in examples:
        ways.setdefault(text, set()).add(solution)
    assert max(map(len, ways.values())) > 1


def test_a_solution_does_not_run_into_its_prompt():
    for task in TASKS:
        assert all(prompt.text.endswith(":") for prompt in task.load())


def test_more_questions_than_there_are_puzzles():
    with pytest.raises(UserError, match="size must be at most the number of different puzzles, got 500 "):
        Countdown(terms=2, largest=3, limit=9, size=500).load()


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"size": 0}, "size"), ({"terms": 1}, "terms"), ({"limit": 5}, "limit"), ({"operators": "+/"}, "operators")],
)
def test_settings_that_make_no_puzzles(settings, key):
    with pytest.raises(UserError, match=key):
        Countdown(**settings)


def test_make_number_needs_enough_different_numbers():
    with pytest.raises(UserError, match="largest must be at least terms"):
        MakeNumber(terms=9, largest=8)
    with pytest.raises(UserError, match="terms must be at least 3"):
        MakeNumber(terms=2)
