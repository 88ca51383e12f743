from itertools import combinations, pairwise, product
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlvr.ops.pass_at_k import avg_at_k, maj_at_k, pass_at_k
from lightning_rlvr.types import UserError


def by_counting(n: int, c: int, k: int) -> float:
    subsets = list(combinations([i < c for i in range(n)], k))
    return sum(any(subset) for subset in subsets) / len(subsets)


@pytest.mark.parametrize("n", range(1, 13))
def test_pass_at_k_counts_all_subsets(n):
    for k in range(1, n + 1):
        c = torch.arange(n + 1)
        expected = [by_counting(n, int(x), k) for x in c]
        torch.testing.assert_close(
            pass_at_k(torch.full_like(c, n), c, k), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize(("n", "c", "k"), [(4096, 3, 1024), (4096, 1, 1), (100_000, 99_990, 11), (2048, 1024, 8)])
def test_pass_at_k_is_stable_for_many_samples(n, c, k):
    exact = 1 - comb(n - c, k) / comb(n, k)
    assert pass_at_k(torch.tensor([n]), torch.tensor([c]), k).item() == pytest.approx(exact, rel=1e-10)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 20).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=8))
def test_pass_at_k_properties(problems):
    n, c = torch.tensor(problems).T
    smallest = int(n.min())
    values = [pass_at_k(n, c, k) for k in range(1, smallest + 1)]
    torch.testing.assert_close(values[0], c / n.double())  # pass@1 is the mean
    for low, high in pairwise(values):
        assert (high >= low - 1e-12).all()
    for value in values:
        assert value.dtype is torch.float64
        assert ((value == 0) == (c == 0)).all()
        assert ((value >= 0) & (value <= 1)).all()
    order = torch.randperm(len(n), generator=torch.Generator().manual_seed(0))
    assert torch.equal(pass_at_k(n[order], c[order], smallest), values[-1][order])


def test_pass_at_k_refuses_what_has_no_estimate():
    n, c = torch.tensor([8, 4]), torch.tensor([1, 1])
    with pytest.raises(UserError, match="k = 5 with n = 4"):
        pass_at_k(n, c, 5)
    with pytest.raises(UserError, match="k = 0"):
        pass_at_k(n, c, 0)
    with pytest.raises(ValueError, match="c must lie"):
        pass_at_k(n, torch.tensor([1, 5]), 1)
    with pytest.raises(ValueError, match="c must lie"):
        pass_at_k(n, torch.tensor([-1, 1]), 1)
    assert pass_at_k(n[:0], c[:0], 4).shape == (0,)


def test_avg_at_k():
    assert avg_at_k(torch.tensor([[True, False, False, True], [False] * 4])).tolist() == [0.5, 0.0]
    with pytest.raises(ValueError, match="at least one sample"):
        avg_at_k(torch.zeros(2, 0, dtype=torch.bool))


def majority_loop(labels: list[int], correct: list[bool]) -> float:
    members: dict[int, list[bool]] = {}
    for label, good in zip(labels, correct, strict=True):
        if label != -1:
            members.setdefault(label, []).append(good)
    most = max(map(len, members.values()), default=0)
    tied = [sum(m) / len(m) for m in members.values() if len(m) == most]
    return sum(tied) / len(tied) if tied else 0.0


def test_maj_at_k_equals_the_loop_everywhere():
    cases = [(ls, cs) for ls in product([-1, 0, 5], repeat=4) for cs in product([False, True], repeat=4)]
    got = maj_at_k(torch.tensor([ls for ls, _ in cases]), torch.tensor([cs for _, cs in cases]))
    expected = torch.tensor([majority_loop(list(ls), list(cs)) for ls, cs in cases], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("labels", "correct", "expected"),
    [
        ([0, 0, 1], [True, True, False], 1.0),
        ([0, 1, 1], [True, False, False], 0.0),
        ([0, 0, 1, 1], [True, True, False, False], 0.5),  # a tie: the expectation over both
        ([-1, -1, -1, 2], [False, False, False, True], 1.0),  # the unparsable do not vote
        ([-1, -1], [False, False], 0.0),
    ],
)
def test_maj_at_k(labels, correct, expected):
    assert maj_at_k(torch.tensor([labels]), torch.tensor([correct])).tolist() == [expected]


@settings(max_examples=50)
@given(st.data())
def test_maj_at_k_ignores_order_and_names_of_clusters(data):
    n = data.draw(st.integers(1, 8))
    labels = torch.tensor([data.draw(st.lists(st.integers(-1, 3), min_size=n, max_size=n))])
    correct = torch.tensor([data.draw(st.lists(st.booleans(), min_size=n, max_size=n))])
    order = torch.tensor(data.draw(st.permutations(range(n))))
    renamed = torch.where(labels == -1, -1, 90 - labels)
    torch.testing.assert_close(maj_at_k(labels, correct), maj_at_k(renamed[:, order], correct[:, order]))


def test_maj_at_k_refuses_unknown_labels_and_no_samples():
    with pytest.raises(ValueError, match=">= -1"):
        maj_at_k(torch.tensor([[-2]]), torch.tensor([[True]]))
    with pytest.raises(ValueError, match="at least one sample"):
        maj_at_k(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0, dtype=torch.bool))
    assert maj_at_k(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3, dtype=torch.bool)).shape == (0,)
