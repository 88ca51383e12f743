import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlvr.ops.selection import highest, lowest, share_count, token_lottery

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


def lottery_by_integers(row_id, position):
    """SplitMix64's finaliser in Python's integers, which do not overflow and have no sign bit."""
    x = ((row_id + 1) * 0x9E3779B97F4A7C15 + position * 0xD1342543DE82EF95) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return ((x ^ (x >> 31)) >> 11) / 2**53


IDS = st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**20)), min_size=1, max_size=8)


@given(IDS)
@settings(max_examples=200, deadline=None)
def test_lottery_is_splitmix64_to_the_bit(pairs):
    got = token_lottery(*(torch.tensor(x) for x in zip(*pairs, strict=True)))
    assert got.tolist() == [lottery_by_integers(*pair) for pair in pairs]
    assert ((got >= 0) & (got < 1)).all()


def tickets(ids, positions):
    row, position = torch.meshgrid(ids, torch.arange(positions), indexing="ij")
    return token_lottery(row.flatten(), position.flatten()).view(row.shape)


ID_KINDS = {
    "small": torch.arange(1, 4001),
    "hashed": torch.randint(-(2**62), 2**62, (4000,), generator=torch.Generator().manual_seed(0)),
    "spaced": torch.arange(1, 4001) * 2**32,
}


@pytest.mark.parametrize("ids", ID_KINDS.values(), ids=ID_KINDS)
def test_lottery_is_uniform_over_row_ids_and_over_positions(ids):
    values = tickets(ids, 16)
    for part in (values, values[:, 3], values[7], values[::200]):
        flat = part.flatten()
        bins = 20 if len(flat) > 200 else 4
        expected = len(flat) / bins
        counts = torch.histc(flat, bins, 0.0, 1.0)
        statistic = float(((counts - expected) ** 2 / expected).sum())
        assert statistic < bins - 1 + 6 * (2 * (bins - 1)) ** 0.5  # chi-square, mean + 6 standard deviations


@pytest.mark.parametrize("ids", ID_KINDS.values(), ids=ID_KINDS)
def test_lottery_of_neighbours_is_uncorrelated(ids):
    values = tickets(ids, 16)
    for a, b in ((values[:-1], values[1:]), (values[:, :-1], values[:, 1:]), (values[:-1, :-1], values[1:, 1:])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(float(correlation)) < 5 / len(a.flatten()) ** 0.5


def test_every_position_wins_equally_often():
    winners = tickets(ID_KINDS["hashed"], 8).argmin(dim=1).bincount(minlength=8)
    assert (winners - 500).abs().max() < 5 * (4000 * 7 / 64) ** 0.5


def test_lottery_numbers_are_distinct_and_do_not_depend_on_company():
    values = tickets(ID_KINDS["hashed"], 16)
    assert len(values.unique()) == values.numel()
    torch.manual_seed(5)
    alone = token_lottery(ID_KINDS["hashed"][17:18], torch.tensor([9]))
    assert alone.item() == values[17, 9].item()


def test_rows_are_not_shifted_copies_of_each_other():
    """A pattern such as ticket(row, t) = ticket(row + 1, t - 1) would drop diagonals."""
    values = tickets(torch.arange(1, 200), 64).flatten()
    assert len(values.unique()) == values.numel()


def test_no_token_has_a_fixed_ticket():
    assert token_lottery(torch.tensor([0]), torch.tensor([0])).item() > 0
