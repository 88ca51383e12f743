import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlvr.ops.selection import highest, lowest, share_count

VALUES = st.lists(st.sampled_from([-1.5, 0.0, -0.0, 0.25, 3.0, math.inf]), max_size=12)


@given(VALUES, st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_lowest_takes_exactly_the_first_of_a_stable_sort(values, fraction):
    count = int(fraction * len(values))
    chosen = sorted(range(len(values)), key=lambda i: (values[i], i))[:count]
    got = lowest(torch.tensor(values, dtype=torch.float64), count)
    assert got.nonzero().flatten().tolist() == sorted(chosen)


@given(VALUES, st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_highest_takes_exactly_the_first_of_a_stable_descending_sort(values, fraction):
    count = int(fraction * len(values))
    chosen = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    got = highest(torch.tensor(values, dtype=torch.float64), count)
    assert got.nonzero().flatten().tolist() == sorted(chosen)


@pytest.mark.parametrize("select", [lowest, highest])
def test_ends_of_the_range(select):
    values = torch.tensor([1.0, 1.0, 2.0])
    assert select(values, 0).tolist() == [False] * 3
    assert select(values, 3).tolist() == [True] * 3
    assert select(torch.zeros(0), 0).shape == (0,)


@pytest.mark.parametrize("select", [lowest, highest])
def test_nan_has_no_rank(select):
    with pytest.raises(ValueError, match="nan"):
        select(torch.tensor([1.0, math.nan]), 1)


@pytest.mark.parametrize("count", [-1, 3])
def test_count_must_fit(count):
    with pytest.raises(ValueError, match=f"{count} of 2"):
        lowest(torch.zeros(2), count)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_share_must_be_one(fraction):
    with pytest.raises(ValueError, match="share"):
        share_count(fraction, 10)


@pytest.mark.parametrize("total", [0, 1, 3, 5, 10, 100, 12345, 2_000_000])
@pytest.mark.parametrize("hundredths", [0, 1, 7, 20, 29, 57, 80, 99, 100])
def test_share_count_is_the_exact_ceiling(hundredths, total):
    assert share_count(hundredths / 100, total) == -(-hundredths * total // 100)


@pytest.mark.parametrize("total", [1, 4999, 5000, 5001, 10_000, 1_000_000])
def test_share_of_two_in_ten_thousand(total):
    assert share_count(0.0002, total) == -(-2 * total // 10_000)


@pytest.mark.parametrize("fraction", [1e-4, 1e-6, 1e-9, 1e-12])
def test_no_positive_share_picks_nothing(fraction):
    assert share_count(fraction, 100) == 1
