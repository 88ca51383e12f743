import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlvr.ops.reduce import token_weights

LENGTHS = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0, 1, 7])), min_size=1, max_size=6)


def layout(lengths, width=4):
    mask = torch.tensor([[t < length for t in range(width)] for length, _ in lengths])
    return mask, torch.tensor([update for _, update in lengths])


@given(LENGTHS)
@settings(max_examples=40, deadline=None)
def test_weights_of_each_update_sum_to_one_unless_rows_are_empty(lengths):
    mask, update = layout(lengths)
    token_mean, sequence_mean = (token_weights(mask, update, how) for how in ("token_mean", "sequence_mean"))
    for u in update.unique():
        here = mask[update == u]
        assert float(token_mean[update == u].sum()) == pytest.approx(float(here.any()), abs=1e-12)
        expected = here.any(dim=1).double().mean().item()
        assert float(sequence_mean[update == u].sum()) == pytest.approx(expected, abs=1e-12)


@given(LENGTHS, st.sampled_from(["sequence_mean", "token_mean", "fixed_length"]))
@settings(max_examples=40, deadline=None)
def test_denominators_stay_within_their_update(lengths, how):
    mask, update = layout(lengths)
    length = 5 if how == "fixed_length" else None
    whole = token_weights(mask, update, how, length)
    for u in update.unique():
        alone = token_weights(mask[update == u], update[update == u], how, length)
        assert torch.equal(whole[update == u], alone)


@pytest.mark.parametrize("how", ["sequence_mean", "token_mean", "fixed_length"])
def test_uncounted_tokens_weigh_nothing_even_in_an_empty_batch(how):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert not token_weights(mask, torch.tensor([0, 0]), how, 4 if how == "fixed_length" else None).any()


def test_an_empty_row_still_counts_as_a_row():
    mask = torch.tensor([[True, True], [False, False]])
    update = torch.tensor([0, 0])
    assert token_weights(mask, update, "sequence_mean").tolist() == [[0.25, 0.25], [0.0, 0.0]]
    assert token_weights(mask, update, "fixed_length", 10).tolist() == [[0.05, 0.05], [0.0, 0.0]]


def test_weights_are_float64():
    assert token_weights(torch.ones(1, 1, dtype=torch.bool), torch.tensor([0]), "token_mean").dtype == torch.float64


def test_no_rows_give_no_weights():
    got = token_weights(torch.zeros(0, 3, dtype=torch.bool), torch.zeros(0, dtype=torch.long), "token_mean")
    assert got.shape == (0, 3)


@pytest.mark.parametrize("length", [None, 0, -3])
def test_fixed_length_needs_a_positive_length(length):
    with pytest.raises(ValueError, match="length"):
        token_weights(torch.ones(1, 1, dtype=torch.bool), torch.tensor([0]), "fixed_length", length)


def test_unknown_aggregation_is_refused():
    bare = inspect.unwrap(token_weights)  # as users run it: without the type checks of pytest
    with pytest.raises(ValueError, match=r"'mean'.*sequence_mean"):
        bare(torch.ones(1, 1, dtype=torch.bool), torch.tensor([0]), "mean")
