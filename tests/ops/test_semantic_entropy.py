import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlvr.ops.semantic_entropy import cluster_groups, semantic_entropy

ANSWERS = st.lists(st.sampled_from(["0", "1", "2", "3", "4", None]), max_size=10)
POLICIES = st.sampled_from(["own_cluster_each", "one_cluster"])


def close(a, b):
    return abs(int(a) - int(b)) <= 1  # not transitive: 0 ~ 1 ~ 2 but not 0 ~ 2


def cluster_answers(answers, equivalent, unparsable="own_cluster_each"):
    """The answers to one question, by a verdict on one pair."""
    return cluster_groups([answers], lambda pairs: [equivalent(a, b) for a, b in pairs], unparsable)[0]


def clusters_by_loop(answers, unparsable):
    """First match against the representatives, in sample order, straight from the definition."""
    clusters = []  # lists of sample indices; the first is the representative
    for i, answer in enumerate(answers):
        for members in clusters:
            head = answers[members[0]]
            both_none = head is None and answer is None
            same = unparsable == "one_cluster" if both_none else None not in (head, answer) and close(head, answer)
            if same:
                members.append(i)
                break
        else:
            clusters.append([i])
    return [next(k for k, members in enumerate(clusters) if i in members) for i in range(len(answers))]


@given(ANSWERS, POLICIES)
@settings(max_examples=50, deadline=None)
def test_clusters_are_first_matches_against_representatives(answers, unparsable):
    assert cluster_answers(answers, close, unparsable) == clusters_by_loop(answers, unparsable)


@given(st.lists(ANSWERS, max_size=5), POLICIES)
@settings(max_examples=50, deadline=None)
def test_many_questions_at_once_are_each_alone(groups, unparsable):
    calls = []

    def equivalent(pairs):
        calls.append(len(pairs))
        return [close(a, b) for a, b in pairs]

    got = cluster_groups(groups, equivalent, unparsable)
    assert got == [clusters_by_loop(answers, unparsable) for answers in groups]
    assert 0 not in calls
    assert len(calls) <= max((len({a for a in answers if a is not None}) for answers in groups), default=0)


def test_non_transitive_equivalence_follows_the_sample_order():
    assert cluster_answers(["0", "1", "2"], close) == [0, 0, 1]
    assert cluster_answers(["1", "0", "2"], close) == [0, 0, 0]
    assert cluster_answers(["0", "2", "1"], close) == [0, 1, 0]


def test_members_that_are_no_representatives_attract_nobody():
    assert cluster_answers(["0", "1", "2", "3"], close) == [0, 0, 1, 1]


@given(ANSWERS, POLICIES)
@settings(max_examples=40, deadline=None)
def test_labels_count_up_in_order_of_first_appearance_and_repeat(answers, unparsable):
    labels = cluster_answers(answers, close, unparsable)
    assert list(dict.fromkeys(labels)) == list(range(len(set(labels))))
    assert labels == cluster_answers(answers, close, unparsable)


@given(ANSWERS)
@settings(max_examples=40, deadline=None)
def test_no_pair_is_asked_twice_and_identical_texts_never(answers):
    asked = []

    def equivalent(a, b):
        asked.append(frozenset((a, b)))
        return close(a, b)

    cluster_answers(answers, equivalent)
    assert all(len(pair) == 2 for pair in asked)
    assert len(asked) == len(set(asked))


def test_identical_texts_share_a_cluster_even_if_nothing_is_equivalent():
    assert cluster_answers(["a", "b", "a"], lambda a, b: False) == [0, 1, 0]


def test_an_empty_text_may_equal_another_answer_while_other_questions_go_on():
    assert cluster_groups([["x", ""], ["a", "b", "c"]], lambda pairs: [b == "" for _, b in pairs]) == [
        [0, 0],
        [0, 1, 2],
    ]


def test_unparsable_answers_by_policy():
    answers = [None, "5", None, "5", None]
    assert cluster_answers(answers, close, "own_cluster_each") == [0, 1, 2, 1, 3]
    assert cluster_answers(answers, close, "one_cluster") == [0, 1, 0, 1, 0]


def test_an_empty_text_is_an_answer_of_its_own():
    assert cluster_answers(["", None, ""], lambda a, b: False, "one_cluster") == [0, 1, 0]


def test_equivalence_sees_no_unparsable_answer():
    def never(a, b):
        raise AssertionError((a, b))

    assert cluster_answers([None, "x", None, "x"], never) == [0, 1, 2, 1]


def test_no_answers_no_clusters():
    assert cluster_answers([], close) == []


@pytest.mark.parametrize("level", [0.0, -2000.0])
def test_closed_forms(level):
    """2 + 1 + 1 samples: masses known, at any level of log-probability."""
    labels = torch.tensor([0, 1, 0, 2])
    logp = level + torch.tensor([0.0, math.log(2), math.log(3), math.log(2)], dtype=torch.float64)
    lengths = torch.ones(4, dtype=torch.long)
    two_one_one = 1.5 * math.log(2)  # p = 1/2, 1/4, 1/4: also of the masses 1 + 3, 2, 2
    for estimator in ("discrete", "rao_blackwell", "likelihood"):
        assert abs(semantic_entropy(labels, logp, lengths, estimator) - two_one_one) < 1e-12
    by_length = torch.tensor([2000, 1000, 2000, 1000])  # exp(-1) for all: the masses are the counts
    same = torch.tensor([-2000.0, -1000.0, -2000.0, -1000.0], dtype=torch.float64)
    assert abs(semantic_entropy(labels, same, by_length, "rao_blackwell") - two_one_one) < 1e-12
    one_wins = semantic_entropy(labels, same, by_length, "likelihood")  # exp(-1000) and exp(-1000) against nothing
    assert abs(one_wins - math.log(2)) < 1e-12


@pytest.mark.parametrize("estimator", ["discrete", "rao_blackwell", "likelihood"])
def test_one_cluster_has_zero_entropy_and_not_minus_zero(estimator):
    got = semantic_entropy(torch.tensor([4, 4, 4]), torch.full((3,), -900.0), torch.tensor([3, 3, 3]), estimator)
    assert got == 0.0
    assert math.copysign(1.0, got) == 1.0


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-3000, 0), st.integers(1, 500)), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_entropy_lies_between_zero_and_log_of_the_number_of_clusters(samples):
    labels, logp, lengths = (torch.tensor(list(column)) for column in zip(*samples, strict=True))
    for estimator in ("discrete", "rao_blackwell", "likelihood"):
        got = semantic_entropy(labels, logp.double(), lengths, estimator)
        assert 0 <= got <= math.log(len(labels.unique())) + 1e-12


@given(st.permutations(range(6)))
@settings(max_examples=30, deadline=None)
def test_neither_sample_order_nor_label_names_matter(order):
    labels, names = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([9, -4, 2])
    logp = torch.tensor([-5.0, -7.0, -6.0, -5.5, -9.0, -4.0], dtype=torch.float64)
    lengths = torch.tensor([3, 4, 2, 5, 6, 1])
    order = torch.tensor(order)
    for estimator in ("discrete", "rao_blackwell", "likelihood"):
        expected = semantic_entropy(labels, logp, lengths, estimator)
        got = semantic_entropy(names[labels][order], logp[order], lengths[order], estimator)
        assert got == pytest.approx(expected, abs=1e-13)


def test_discrete_needs_neither_likelihoods_nor_lengths():
    nan = torch.tensor([math.nan, math.nan])
    assert semantic_entropy(torch.tensor([0, 1]), nan) == pytest.approx(math.log(2), abs=1e-15)


def test_no_sample_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        semantic_entropy(torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize("estimator", ["rao_blackwell", "likelihood"])
@pytest.mark.parametrize("logp", [None, torch.tensor([-1.0, -math.inf]), torch.tensor([-1.0, math.nan])])
def test_likelihood_estimators_need_finite_log_probabilities(estimator, logp):
    with pytest.raises(ValueError, match=rf"{estimator}.*logp"):
        semantic_entropy(torch.tensor([0, 1]), logp, torch.tensor([1, 1]), estimator)


@pytest.mark.parametrize("lengths", [None, torch.tensor([0, 2])])
def test_rao_blackwell_needs_lengths(lengths):
    with pytest.raises(ValueError, match="length"):
        semantic_entropy(torch.tensor([0, 1]), torch.tensor([-1.0, -2.0]), lengths, "rao_blackwell")


def test_unknown_estimator_is_refused():
    bare = inspect.unwrap(semantic_entropy)  # as users run it: without the type checks of pytest
    with pytest.raises(ValueError, match=r"'seed'.*rao_blackwell"):
        bare(torch.tensor([0, 1]), estimator="seed")
