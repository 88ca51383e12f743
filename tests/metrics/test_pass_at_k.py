from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlvr.metrics import AvgAtK, MajAtK, PassAtK
from lightning_rlvr.ops.pass_at_k import avg_at_k, maj_at_k, pass_at_k
from lightning_rlvr.types import UserError

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=12), st.integers(1, 11))
def test_any_cut_into_batches_gives_the_op_s_mean(rows, cut):
    correct = torch.tensor(rows)
    counts = correct.sum(1)
    for metric, values in (
        (PassAtK(2), pass_at_k(torch.full_like(counts, 4), counts, 2)),
        (AvgAtK(), avg_at_k(correct)),
    ):
        metric.update(correct[:cut])
        metric.update(correct[cut:])  # may be empty: a rank without rows
        torch.testing.assert_close(metric.compute().double(), values.mean(), rtol=1e-6, atol=1e-6)


def test_maj_at_k_is_the_op_s_mean():
    cluster = torch.tensor([[0, 0, 1], [-1, 2, 3], [4, 5, 5]])
    correct = torch.tensor([[True, True, False], [False, True, False], [True, False, False]])
    metric = MajAtK()
    metric.update(cluster[:1], correct[:1])
    metric.update(cluster[1:], correct[1:])
    torch.testing.assert_close(metric.compute().double(), maj_at_k(cluster, correct).mean())


def test_problems_weigh_the_same_whatever_their_number_of_samples():
    metric = AvgAtK()
    metric.update(torch.tensor([[True]]))
    metric.update(torch.tensor([[False] * 9]))
    assert metric.compute().item() == 0.5


def test_state_is_sums_so_ranks_add_up():
    ranks = [AvgAtK(), AvgAtK()]
    ranks[0].update(torch.tensor([[True, True], [True, True], [False, False]]))
    ranks[1].update(torch.tensor([[False, False]]))
    assert {fx.__name__ for fx in ranks[0]._reductions.values()} == {"dim_zero_sum"}
    merged = AvgAtK()
    merged.total, merged.problems = ranks[0].total + ranks[1].total, ranks[0].problems + ranks[1].problems
    assert merged.compute().item() == 0.5


@pytest.mark.parametrize("metric", [PassAtK(1), AvgAtK(), MajAtK()])
def test_no_problems_is_an_error_and_never_nan(metric):
    with pytest.raises(UserError, match="must see a problem"):
        metric.compute()


def test_reset_and_copy():
    metric = PassAtK(1)
    metric.update(torch.tensor([[True]]))
    assert deepcopy(metric).compute().item() == 1.0
    metric.reset()
    metric.update(torch.tensor([[False]]))
    assert metric.compute().item() == 0.0


def test_k_is_checked_at_once_and_against_n():
    with pytest.raises(UserError, match="k must be >= 1, got 0"):
        PassAtK(0)
    with pytest.raises(UserError, match="k = 3 with n = 2"):
        PassAtK(3).update(torch.tensor([[True, False]]))
    with pytest.raises(ValueError, match="at least one sample"):
        AvgAtK().update(torch.zeros(2, 0, dtype=torch.bool))
