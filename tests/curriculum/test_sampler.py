import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_rlvr.curriculum import Adaptive, AdaptiveSampler, CurriculumSampler
from lightning_rlvr.types import UserError


def sampler(stages, epochs, *args, **kwargs):
    """A sampler with as many passes over each stage."""
    return CurriculumSampler(stages, [epochs] * len(stages), *args, **kwargs)


STAGES = [np.array([9, 4, 7, 1, 0]), np.array([2, 3, 8, 5, 6, 10, 11])]
CUTS = st.tuples(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),  # sizes of stages
    st.integers(1, 3),  # epochs
    st.integers(1, 3),  # world
    st.integers(1, 4),  # questions of a rank in a batch
    st.integers(0, 9),  # seed
)


def passes(order, stages, epochs):
    """The batches of each pass, by the number of batches that a pass has."""
    batches = list(order)
    out = []
    for stage in range(len(stages)):
        mine = [b for i, b in enumerate(batches) if order.batch(i).stage == stage]
        each = len(mine) // epochs
        out += [(stage, mine[k * each : (k + 1) * each]) for k in range(epochs)]
    return out


@settings(max_examples=60, deadline=None)
@given(CUTS)
def test_ranks_share_out_each_pass_stage_after_stage(cut):
    sizes, epochs, world, share, seed = cut
    assume(min(sizes) >= world)
    names = np.random.default_rng(seed).permutation(sum(sizes))
    stages = np.split(names, np.cumsum(sizes)[:-1])
    size = world * share
    ranks = [sampler(stages, epochs, size, seed, rank, world) for rank in range(world)]
    whole = sampler(stages, epochs, size, seed)
    order = [whole.batch(i).stage for i in range(len(whole))]
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
            assert 1 <= len(shares[0]) <= share
            seen += [q for share in shares for q in share]
        assert len(seen) == len(set(seen)) == sizes[stage] - sizes[stage] % world
        assert set(seen) <= set(stages[stage].tolist())


@settings(max_examples=40, deadline=None)
@given(CUTS, st.integers(0, 30))
def test_start_continues_exactly(cut, start):
    sizes, epochs, world, share, seed = cut
    assume(min(sizes) >= world)
    stages = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    for rank in range(world):
        full = sampler(stages, epochs, world * share, seed, rank, world)
        rest = sampler(stages, epochs, world * share, seed, rank, world, start)
        assert list(rest) == list(full)[start % len(full) :]
        assert list(rest) == list(full)  # the next time round, the curriculum is whole again
        assert len(rest) == len(full)


def test_every_question_once_a_pass_and_no_batch_over_two_passes():
    got = sampler(STAGES, epochs=3, batch_size=3, seed=0)
    assert [len(b) for b in got] == [3, 2] * 3 + [3, 3, 1] * 3
    assert len(got) == 15
    assert [got.batch(i).stage for i in range(15)] == [0] * 6 + [1] * 9
    for stage, batches in passes(got, STAGES, 3):
        assert sorted(q for b in batches for q in b) == sorted(STAGES[stage].tolist())
    assert all(type(q) is int for b in got for q in b)


def test_each_pass_is_shuffled_anew_by_the_seed():
    stages = [np.arange(20), np.arange(20, 40)]
    runs = [list(sampler(stages, 2, 20, seed)) for seed in (0, 1, 0)]
    assert runs[0] == runs[2] != runs[1]
    first, second, third, _ = runs[0]
    assert len({tuple(first), tuple(second), tuple(q - 20 for q in third), tuple(range(20))}) == 4


def test_two_ranks_split_the_batches_of_one():
    stages = [np.arange(12), np.arange(12, 20)]
    whole = sampler(stages, 2, 4, 7)
    ranks = [sampler(stages, 2, 4, 7, rank, 2) for rank in (0, 1)]
    for batch, a, b in zip(whole, *ranks, strict=True):
        assert len(a) == len(b) == 2
        assert set(a) | set(b) == set(batch)


def test_a_remainder_left_out_of_one_pass_is_in_another():
    ranks = [list(sampler([np.arange(5)], 8, 2, 0, rank, 2)) for rank in (0, 1)]
    passes_ = [[q for rank in ranks for b in rank[2 * k : 2 * k + 2] for q in b] for k in range(8)]
    left_out = [(set(range(5)) - set(p)) for p in passes_]
    assert all(len(x) == 1 for x in left_out)
    assert len(set.union(*left_out)) > 1
    assert set.union(*map(set, passes_)) == set(range(5))


@pytest.mark.parametrize("size", [0, 3, 6])
def test_each_process_needs_as_many_questions(size):
    match = rf"multiple of the number of processes \(4\), got {size}.*Set data\.prompts_per_batch"
    with pytest.raises(UserError, match=match):
        sampler(STAGES, 1, size, 0, rank=0, world=4)


def test_the_callers_stages_are_left_alone():
    kept = [s.copy() for s in STAGES]
    list(sampler(STAGES, 2, 3, 0))
    assert all(np.array_equal(a, b) for a, b in zip(STAGES, kept, strict=True))


def test_a_stage_with_fewer_questions_than_ranks_is_refused():
    with pytest.raises(UserError, match=r"data\.curriculum\.stages"):
        sampler([np.arange(4), np.arange(1)], 1, 4, 0, rank=0, world=2)


def test_the_fingerprint_is_that_of_the_order_over_all_ranks():
    def fingerprint(**changes):
        settings = {"epochs": 1, "batch_size": 4, "seed": 0, "rank": 0, "world": 1, "start": 0} | changes
        return sampler([np.arange(8), np.arange(8, 16)], **settings).fingerprint()

    assert fingerprint() == fingerprint(start=2)
    assert fingerprint(world=2) == fingerprint(world=2, rank=1) == fingerprint()
    assert len({fingerprint(), fingerprint(seed=1), fingerprint(batch_size=8), fingerprint(epochs=2)}) == 4


def test_stages_may_have_passes_of_their_own():
    got = CurriculumSampler([np.arange(4), np.arange(4, 8)], [1, 3], 4, 0)
    assert [(got.batch(i).stage, got.batch(i).epoch) for i in range(4)] == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert got.batch(4) == got.batch(0)  # batches count on


# --- AdaptiveSampler -------------------------------------------------------------------------------


def adaptive(stages, epochs, batch_size, key, every=2, weight=0.5, seed=0, late=(), **where):
    key = np.asarray(key, dtype=float)
    tie = np.random.default_rng(seed).permutation(len(key))
    settings = Adaptive(every, weight)
    last = np.isin(np.arange(len(key)), late)
    by = {"key": key, "tie": tie, "last": last, "adaptive": settings}
    return AdaptiveSampler(stages, [epochs] * len(stages), batch_size, seed, **by, **where)


def train(order, rng, until=None):
    """Consume the batches, showing random estimates of each as training would; return what was consumed."""
    consumed = []
    for number in range(order.start, until or len(order)):
        batch = order.batch(number)
        consumed.append(batch)
        order.observe(number, rng.normal(size=len(batch.questions)))
    return consumed


def test_a_running_estimate_is_an_exponential_average():
    order = adaptive([np.arange(4)], 2, 2, [0.0, 1.0, 2.0, 3.0], weight=0.25)
    first, second = order.batch(0).questions
    order.observe(0, [8.0, 4.0])
    order.observe(0, [8.0, 4.0])
    assert order.estimate[first] == 0.75 * (0.75 * first + 0.25 * 8) + 0.25 * 8
    assert order.estimate[second] == 0.75 * (0.75 * second + 0.25 * 4) + 0.25 * 4
    assert [order.estimate[q] for q in range(4) if q not in (first, second)] == [
        q for q in range(4) if q not in (first, second)
    ]
    with pytest.raises(ValueError, match="zip"):
        order.observe(0, [8.0])


def test_without_news_each_stage_keeps_its_questions():
    order = adaptive([np.arange(6), np.arange(6, 12)], 2, 3, np.arange(12), every=1)
    for number in range(len(order)):
        batch = order.batch(number)
        order.observe(number, order.estimate[batch.questions].tolist())
        assert {q < 6 for q in batch.questions} == {batch.stage == 0}


def test_what_turned_out_disputed_waits_and_what_turned_out_agreed_comes_sooner():
    order = adaptive([np.arange(8), np.arange(8, 16)], 2, 4, np.arange(16), every=2, weight=1.0)
    moved = next(q for q in order.batch(0).questions if q in order.batch(3).questions)
    order.observe(0, [100.0 if q == moved else float(q) for q in order.batch(0).questions])
    assert order.observe(1, [float(q) for q in order.batch(1).questions])
    assert [batch.stage for batch in order.batches[3:] if moved in batch.questions] == [1]
    assert [batch.stage for batch in order.batches[3:] if 8 in batch.questions] == [0, 1]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(2, 9), min_size=1, max_size=3),
    st.integers(2, 4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_every_visit_is_paid_and_none_twice_in_a_pass(sizes, epochs, world, share, every, seed):
    size = max(sizes)
    sizes = [size] * len(sizes)  # equal stages: visits are kept exactly
    assume(size >= world and size % world == 0)
    stages = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    rng = np.random.default_rng(seed)
    order = adaptive(stages, epochs, world * share, rng.normal(size=sum(sizes)), every=every, seed=seed, world=world)
    shape = [(b.stage, b.epoch, len(b.questions)) for b in order.batches]
    consumed = train(order, rng)
    assert [(b.stage, b.epoch, len(b.questions)) for b in consumed] == shape
    visits = np.bincount([q for b in consumed for q in b.questions], minlength=sum(sizes))
    assert visits.tolist() == [epochs] * sum(sizes)
    for name in {(b.stage, b.epoch) for b in consumed}:
        once = [q for b in consumed if (b.stage, b.epoch) == name for q in b.questions]
        assert len(once) == len(set(once))
    assert all(type(q) is int for b in order.batches for q in b.questions)


def test_stages_that_differ_by_a_question_lose_next_to_nothing():
    rng = np.random.default_rng(0)
    for _ in range(50):
        order = adaptive([np.arange(6), np.arange(6, 11)], 3, 4, rng.normal(size=11), every=1)
        visits = np.bincount([q for b in train(order, rng) for q in b.questions], minlength=11)
        assert visits.sum() == 33
        assert np.abs(visits - 3).sum() <= 2


def test_each_pass_takes_the_first_with_a_visit_left():
    order = adaptive([np.arange(4), np.arange(4, 8)], 2, 4, np.arange(8), every=1, weight=1.0)
    assert set(order.batch(0).questions) == {0, 1, 2, 3}
    assert order.observe(0, [50.0 + q for q in order.batch(0).questions])  # all turned out disputed
    # batch 1 was with the trainer already; what is left is 4 to 7 twice
    assert set(order.batch(1).questions) == {0, 1, 2, 3}
    assert set(order.batch(2).questions) == set(order.batch(3).questions) == {4, 5, 6, 7}
    order = adaptive([np.arange(2), np.arange(2, 4)], 3, 2, np.arange(4), every=1, weight=1.0)
    assert order.observe(0, [50.0 + q for q in order.batch(0).questions])
    # 0 and 1 have one visit left beyond batch 1, 2 and 3 have three; passes left are four
    assert [sorted(order.batch(n).questions) for n in range(6)] == [[0, 1], [0, 1], [2, 3], [2, 3], [2, 3], [0, 1]]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 11), st.integers(1, 3), st.integers(0, 9))
def test_a_saved_state_goes_on_as_if_nothing_had_happened(stop, every, seed):
    def fresh(start=0):
        return adaptive([np.arange(6), np.arange(6, 12)], 3, 4, np.arange(12), every=every, seed=seed, start=start)

    whole = train(fresh(), np.random.default_rng(1))
    rng = np.random.default_rng(1)
    first = fresh()
    before = train(first, rng, until=stop)
    second = fresh(start=stop)
    second.load_state_dict(first.state_dict())
    assert second.fingerprint() == first.fingerprint()
    assert before + train(second, rng) == whole
    assert whole != fresh().batches  # else nothing was re-ordered


def test_ranks_share_the_order_that_they_observe_together():
    ranks = [adaptive([np.arange(6), np.arange(6, 12)], 2, 4, np.arange(12), rank=r, world=2) for r in (0, 1)]
    rng = np.random.default_rng(0)
    for number in range(len(ranks[0])):
        fresh = rng.normal(size=len(ranks[0].batch(number).questions)).tolist()
        assert ranks[0].observe(number, fresh) == ranks[1].observe(number, fresh)
    assert ranks[0].batches == ranks[1].batches
    for mine, other, batch in zip(*ranks, ranks[0].batches, strict=True):
        assert sorted(mine + other) == sorted(batch.questions)


def test_what_comes_last_stays_last():
    stages = [np.array([4, 5, 6, 7]), np.array([0, 1, 2, 3])]
    order = adaptive(stages, 2, 4, np.arange(8), every=1, late=(0, 1, 2, 3))
    for number in range(len(order)):
        order.observe(number, order.estimate[order.batch(number).questions].tolist())
    assert [set(order.batch(n).questions) for n in range(4)] == [{4, 5, 6, 7}] * 2 + [{0, 1, 2, 3}] * 2


def test_another_way_to_adapt_is_another_order():
    stages = [np.arange(4), np.arange(4, 8)]
    plain = CurriculumSampler(stages, [2, 2], 4, 0).fingerprint()
    one, two = (adaptive(stages, 2, 4, np.arange(8), every=every).fingerprint() for every in (1, 2))
    assert len({plain, one, two}) == 3
