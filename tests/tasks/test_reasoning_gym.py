import random

import numpy as np
import pytest
from jsonargparse import ArgumentParser

from lightning_rlvr.tasks import ReasoningGym
from lightning_rlvr.types import Task, UserError

pytest.importorskip("reasoning_gym")
SMALL = {"min_terms": 2, "max_terms": 2, "max_digits": 1}


def test_a_prompt_holds_what_the_scorer_needs():
    import reasoning_gym

    prompt = ReasoningGym("chain_sum", size=3, seed=42).load()[1]
    entry = reasoning_gym.create_dataset("chain_sum", seed=42, size=3)[1]
    assert (prompt.uid, prompt.text, prompt.answer) == ("chain_sum:42:1", entry["question"], entry["answer"])
    assert prompt.metadata == {"source_dataset": "chain_sum", "entry": entry, "config": {}}
    assert reasoning_gym.get_score_answer_fn("chain_sum")(prompt.answer, prompt.metadata["entry"]) == 1.0


def test_neighbouring_ranges_cut_one_set():
    whole = ReasoningGym("chain_sum", size=20).load()
    assert whole == ReasoningGym("chain_sum", size=12).load() + ReasoningGym("chain_sum", size=8, start=12).load()


def test_the_trap_that_ranges_avoid_neighbouring_seeds_overlap():
    a, b = (ReasoningGym("chain_sum", size=5, seed=seed).load() for seed in (42, 43))
    assert [p.text for p in a[1:]] == [p.text for p in b[:-1]]
    assert not {p.uid for p in a} & {p.uid for p in b}


def test_config_reaches_the_set_and_the_uid():
    plain, small = ReasoningGym("chain_sum", size=4), ReasoningGym("chain_sum", size=4, config=SMALL)
    assert {p.metadata["entry"]["metadata"]["num_terms"] for p in small.load()} == {2}
    assert not {p.uid for p in plain.load()} & {p.uid for p in small.load()}
    reordered = ReasoningGym("chain_sum", size=4, config=dict(reversed(SMALL.items())))
    assert reordered.load() == small.load()


def test_template_takes_metadata_keys():
    prompt = ReasoningGym("chain_sum", size=1, seed=42, prompt_template="{expression} =").load()[0]
    assert prompt.text == "4 + 3 ="
    with pytest.raises(UserError, match=r"got 'expresion': available are difficulty, expression,.*question"):
        ReasoningGym("chain_sum", size=1, prompt_template="{expresion} =").load()
    with pytest.raises(UserError, match=r"plain \{names\}"):
        ReasoningGym("chain_sum", size=1, prompt_template="{question.__class__}")


def test_unique_keeps_the_first_of_each_text():
    arguments = {"name": "chain_sum", "size": 300, "config": SMALL, "prompt_template": "{expression} ="}
    every, unique = ReasoningGym(**arguments).load(), ReasoningGym(**arguments, unique=True).load()
    texts = [p.text for p in every]
    assert len(every) == 300
    assert len({p.uid for p in every}) == 300
    assert [p.text for p in unique] == list(dict.fromkeys(texts))
    assert len(unique) < 300
    assert all(p == every[texts.index(p.text)] for p in unique)


@pytest.mark.parametrize("name", ["list_functions", "pool_matrix", "chain_sum"])
def test_items_neither_read_nor_leave_global_random_state(name):
    random.seed(1)
    np.random.seed(1)
    first = ReasoningGym(name, size=8, seed=1).load()
    drawn = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    assert drawn == (random.random(), np.random.random())
    random.seed(2)
    assert ReasoningGym(name, size=8, seed=1).load() == first


def test_a_set_that_shuffles_as_a_whole_needs_its_size():
    with pytest.raises(UserError, match=r"config.size must be given for 'acre'"):
        ReasoningGym("acre", size=4).load()
    whole = ReasoningGym("acre", size=20, config={"size": 20}).load()
    assert ReasoningGym("acre", size=5, start=15, config={"size": 20}).load() == whole[15:]


def test_an_answer_that_only_a_scorer_can_judge_is_empty():
    prompt = ReasoningGym("rubiks_cube", size=1).load()[0]
    assert prompt.answer == ""
    assert prompt.metadata["entry"]["answer"] is None


def test_a_set_that_follows_the_hash_seed_needs_it_fixed(monkeypatch):
    task = ReasoningGym("ransom_note", size=2)
    for loose in ("random", ""):
        monkeypatch.setenv("PYTHONHASHSEED", loose)
        with pytest.raises(UserError, match="PYTHONHASHSEED must be fixed for 'ransom_note'"):
            task.load()
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert len(task.load()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be >= 1, got 0"),
        ({"start": -1}, "start must be >= 0, got -1"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"name": "chain_sums"}, "got 'chain_sums': did you mean chain_sum"),
        ({"name": "zzzz"}, "did you mean .* Set the task's name"),
        ({"config": {"seed": 3}}, "config must not hold a seed, got 3"),
        ({"config": {"terms": 3}}, "got 'terms': it knows min_terms"),
        ({"config": {"size": 1}}, r"config.size must be a whole number >= start \+ size = 2"),
        ({"config": {"size": "9"}}, "config.size must be a whole number"),
        ({"config": {"min_terms": 0}}, "min_terms must be positive"),
        ({"config": {"min_terms": "a"}}, "config must suit the data set"),
        ({"config": {"min_terms": 2.5}}, "must be able to generate item 0"),
    ],
)
def test_bad_arguments_name_the_key(arguments, message):
    with pytest.raises(UserError, match=message):
        ReasoningGym(**{"name": "chain_sum", "size": 2, **arguments}).load()


def test_yaml_builds_it():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--task", type=Task)
    yaml = """{"task": {"class_path": "lightning_rlvr.tasks.ReasoningGym", "init_args":
        {"name": "chain_sum", "size": 2, "start": 5, "config": {"min_terms": 3}}}}"""
    task = parser.instantiate_classes(parser.parse_string(yaml)).task
    assert task == ReasoningGym("chain_sum", size=2, start=5, config={"min_terms": 3})
