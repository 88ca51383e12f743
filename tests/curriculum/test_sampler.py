from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_rlvr.curriculum.sampler import Curriculum, CurriculumSampler
from lightning_rlvr.types import UserError

ENTROPY = np.array([0.7, 0.0, 1.1, 0.3, 0.9, 0.1, 0.5])


def frame(discrete, **columns):
    return pd.DataFrame({"semantic_entropy_discrete": discrete, **columns})


def joined(stages):
    return np.concatenate(stages).tolist()


# --- Curriculum ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "expected"), [("ascending", [1, 5, 3, 6, 0, 4, 2]), ("descending", [2, 4, 0, 6, 3, 5, 1])]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_sorted_by_semantic_entropy(order, expected, seed):
    stages = Curriculum(order, stages=3).cut(7, frame(ENTROPY), seed)
    assert joined(stages) == expected
    assert [len(s) for s in stages] == [3, 2, 2]


@pytest.mark.parametrize("estimator", ["discrete", "rao_blackwell", "likelihood"])
def test_the_estimator_says_which_column_orders(estimator):
    other = -ENTROPY
    columns = {f"semantic_entropy_{e}": other for e in ("discrete", "rao_blackwell", "likelihood")}
    columns[f"semantic_entropy_{estimator}"] = ENTROPY
    got = Curriculum(estimator=estimator, stages=1).cut(7, pd.DataFrame(columns), 0)
    assert joined(got) == [1, 5, 3, 6, 0, 4, 2]


def test_pass_rate_puts_the_often_solved_first():
    scores = frame(ENTROPY, pass_rate=[0.0, 1.0, 0.5, 0.25, 0.75, 0.125, 0.875])
    assert joined(Curriculum("pass_rate").cut(7, scores, 0)) == [1, 6, 4, 2, 3, 5, 0]


def test_a_frame_with_a_sliced_index_is_read_by_position():
    scores = frame(ENTROPY).iloc[::-1]
    assert joined(Curriculum().cut(7, scores, 0)) == [5, 1, 3, 0, 6, 2, 4]


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
    got = Curriculum(order, stages).cut(size, scores, seed)
    assert len(got) == stages
    assert sorted(joined(got)) == list(range(size))
    sizes = [len(s) for s in got]
    assert max(sizes) - min(sizes) <= 1
    key = [values[i] for i in joined(got)]
    if order == "ascending":
        assert key == sorted(values)
    elif order != "shuffled":
        assert key == sorted(values, reverse=True)
    assert joined(Curriculum(order, stages).cut(size, scores, seed)) == joined(got)


@pytest.mark.parametrize("order", ["ascending", "descending", "pass_rate", "shuffled"])
def test_ties_are_in_an_order_that_the_seed_decides(order):
    values = np.repeat([0.0, 1.0], 50)
    scores = frame(values, pass_rate=values)
    cuts = [joined(Curriculum(order).cut(100, scores, seed)) for seed in (0, 1, 0)]
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
    exact = joined(Curriculum(order).cut(40, frame(np.full(40, level)), 3))
    assert joined(Curriculum(order).cut(40, frame(level + noise), 3)) == exact
    # but a difference is none
    values = level + 1e-6 * np.arange(40)
    assert joined(Curriculum(order).cut(40, frame(values), 3)) == list(range(40))[:: 1 if order == "ascending" else -1]


def test_shuffled_needs_no_scores():
    curriculum = Curriculum("shuffled", stages=3)
    assert not curriculum.needs_scores
    got = joined(curriculum.cut(30, None, 0))
    assert sorted(got) == list(range(30))
    assert got != sorted(got)
    assert all(Curriculum(order).needs_scores for order in ("ascending", "descending", "pass_rate"))


@pytest.mark.parametrize("scores", [None, frame(ENTROPY[:3])])
def test_each_question_needs_a_score(scores):
    with pytest.raises(ValueError, match=r"ordering 7 questions needs 7 scores, got (None|3)"):
        Curriculum().cut(7, scores, 0)


@pytest.mark.parametrize("key", ["stages", "epochs"])
def test_bad_settings_name_the_key(key):
    with pytest.raises(UserError, match=rf"^{key} must be at least 1, got 0\. Set data\.curriculum\.{key}\.$"):
        Curriculum(**{key: 0})


def test_no_stage_may_be_empty():
    Curriculum(stages=7).check(7)
    with pytest.raises(UserError, match=r"at most the number of questions \(6\), got 7.*Set data\.curriculum\.stages"):
        Curriculum(stages=7).cut(6, frame(ENTROPY[:6]), 0)


# --- CurriculumSampler -----------------------------------------------------------------------------

STAGES = [np.array([9, 4, 7, 1, 0]), np.array([2, 3, 8, 5, 6, 10, 11])]
CUTS = st.tuples(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),  # sizes of stages
    st.integers(1, 3),  # epochs
    st.integers(1, 3),  # world
    st.integers(0, 6),  # batch size above world
    st.integers(0, 9),  # seed
)


def passes(sampler, stages, epochs):
    """The batches of each pass, by the number of batches that a pass has."""
    batches = list(sampler)
    out = []
    for stage in range(len(stages)):
        mine = [b for i, b in enumerate(batches) if sampler.stage_of(i) == stage]
        each = len(mine) // epochs
        out += [(stage, mine[k * each : (k + 1) * each]) for k in range(epochs)]
    return out


@settings(max_examples=60, deadline=None)
@given(CUTS)
def test_ranks_share_out_each_pass_stage_after_stage(cut):
    sizes, epochs, world, extra, seed = cut
    assume(min(sizes) >= world)
    names = np.random.default_rng(seed).permutation(sum(sizes))
    stages = np.split(names, np.cumsum(sizes)[:-1])
    size = world + extra
    ranks = [CurriculumSampler(stages, epochs, size, seed, rank, world) for rank in range(world)]
    whole = CurriculumSampler(stages, epochs, size, seed)
    order = [whole.stage_of(i) for i in range(len(whole))]
    assert order == sorted(order)  # stage after stage
    assert len({len(r) for r in ranks}) == 1
    for r in ranks:
        assert len(list(r)) == len(r)
    by_rank = [passes(r, stages, epochs) for r in ranks]
    for group in zip(*by_rank, strict=True):  # one pass, seen by all ranks
        stage = group[0][0]
        seen = []
        for shares in zip(*(batches for _, batches in group), strict=True):
            assert len({len(s) for s in shares}) == 1  # ranks work equally much
            assert 1 <= len(shares[0]) <= size // world
            seen += [q for share in shares for q in share]
        assert len(seen) == len(set(seen)) == sizes[stage] - sizes[stage] % world
        assert set(seen) <= set(stages[stage].tolist())


@settings(max_examples=40, deadline=None)
@given(CUTS, st.integers(0, 30))
def test_start_continues_exactly(cut, start):
    sizes, epochs, world, extra, seed = cut
    assume(min(sizes) >= world)
    stages = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    for rank in range(world):
        full = CurriculumSampler(stages, epochs, world + extra, seed, rank, world)
        rest = CurriculumSampler(stages, epochs, world + extra, seed, rank, world, start)
        assert list(rest) == list(full)[start % len(full) :]
        assert list(rest) == list(full)  # the next time round, the curriculum is whole again
        assert len(rest) == len(full)


def test_every_question_once_a_pass_and_no_batch_over_two_passes():
    sampler = CurriculumSampler(STAGES, epochs=3, batch_size=3, seed=0)
    assert [len(b) for b in sampler] == [3, 2] * 3 + [3, 3, 1] * 3
    assert len(sampler) == 15
    assert [sampler.stage_of(i) for i in range(15)] == [0] * 6 + [1] * 9
    for stage, batches in passes(sampler, STAGES, 3):
        assert sorted(q for b in batches for q in b) == sorted(STAGES[stage].tolist())
    assert all(type(q) is int for b in sampler for q in b)


def test_each_pass_is_shuffled_anew_by_the_seed():
    stages = [np.arange(20), np.arange(20, 40)]
    runs = [list(CurriculumSampler(stages, 2, 20, seed)) for seed in (0, 1, 0)]
    assert runs[0] == runs[2] != runs[1]
    first, second, third, _ = runs[0]
    assert len({tuple(first), tuple(second), tuple(q - 20 for q in third), tuple(range(20))}) == 4


def test_two_ranks_split_the_batches_of_one():
    stages = [np.arange(12), np.arange(12, 20)]
    whole = CurriculumSampler(stages, 2, 4, 7)
    ranks = [CurriculumSampler(stages, 2, 4, 7, rank, 2) for rank in (0, 1)]
    for batch, a, b in zip(whole, *ranks, strict=True):
        assert len(a) == len(b) == 2
        assert set(a) | set(b) == set(batch)


def test_a_batch_size_that_ranks_cannot_share_is_rounded_down():
    a, b = ([len(x) for x in CurriculumSampler([np.arange(8)], 1, 5, 0, rank, 2)] for rank in (0, 1))
    assert a == b == [2, 2]


def test_a_remainder_left_out_of_one_pass_is_in_another():
    ranks = [list(CurriculumSampler([np.arange(5)], 8, 2, 0, rank, 2)) for rank in (0, 1)]
    passes_ = [[q for rank in ranks for b in rank[2 * k : 2 * k + 2] for q in b] for k in range(8)]
    left_out = [(set(range(5)) - set(p)) for p in passes_]
    assert all(len(x) == 1 for x in left_out)
    assert len(set.union(*left_out)) > 1
    assert set.union(*map(set, passes_)) == set(range(5))


def test_each_process_needs_a_question():
    with pytest.raises(UserError, match=r"at least the number of processes \(4\), got 3.*Set data\.prompts_per_batch"):
        CurriculumSampler(STAGES, 1, 3, 0, rank=0, world=4)


def test_the_callers_stages_are_left_alone():
    kept = [s.copy() for s in STAGES]
    list(CurriculumSampler(STAGES, 2, 3, 0))
    assert all(np.array_equal(a, b) for a, b in zip(STAGES, kept, strict=True))


def test_a_stage_with_fewer_questions_than_ranks_is_refused():
    with pytest.raises(UserError, match=r"data\.curriculum\.stages"):
        CurriculumSampler([np.arange(4), np.arange(1)], 1, 4, 0, rank=0, world=2)


def test_the_fingerprint_is_that_of_the_order_over_all_ranks():
    def fingerprint(**changes):
        settings = {"epochs": 1, "batch_size": 4, "seed": 0, "rank": 0, "world": 1, "start": 0} | changes
        return CurriculumSampler([np.arange(8), np.arange(8, 16)], **settings).fingerprint()

    assert fingerprint() == fingerprint(start=2)
    assert fingerprint(world=2) == fingerprint(world=2, rank=1) == fingerprint()
    assert len({fingerprint(), fingerprint(seed=1), fingerprint(batch_size=8), fingerprint(epochs=2)}) == 4
