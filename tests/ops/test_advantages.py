import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlvr.ops.advantages import group_advantages

REWARDS = st.lists(st.sampled_from([0.0, 1.0, 0.1, -0.5]), min_size=2, max_size=6)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [3, 7, 11])
def test_tied_group_has_exactly_zero_advantage(scale, dtype, size):
    # 0.1 is no binary fraction: its mean over 3 or 7 copies may miss it by a rounding
    got = group_advantages(torch.full((2, size), 0.1, dtype=dtype), scale_by_std=scale)
    assert torch.equal(got, torch.zeros(2, size, dtype=dtype))


def test_groups_do_not_see_each_other():
    rewards = torch.tensor([[1.0, 0.0, 0.0], [100.0, 0.0, 50.0]], dtype=torch.float64)
    whole = group_advantages(rewards, scale_by_std=True)
    alone = torch.cat([group_advantages(row[None], scale_by_std=True) for row in rewards])
    torch.testing.assert_close(whole, alone, rtol=0, atol=0)


def test_a_tied_group_leaves_its_neighbour_alone():
    got = group_advantages(torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64), scale_by_std=True)
    assert got[0].tolist() == [0.0, 0.0]
    assert got[1].tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)], abs=1e-5)


@given(REWARDS)
@settings(max_examples=40, deadline=None)
def test_scaled_advantages_sum_to_zero_and_have_unit_spread(rewards):
    got = group_advantages(torch.tensor([rewards], dtype=torch.float64), scale_by_std=True)[0]
    assert abs(float(got.sum())) < 1e-9
    spread = math.sqrt(float(got.square().sum()) / (len(rewards) - 1))
    assert spread == 0.0 if len(set(rewards)) == 1 else spread == pytest.approx(1.0, abs=1e-4)


@given(REWARDS, st.sampled_from([0.5, 3.0]), st.sampled_from([-2.0, 1.0]))
@settings(max_examples=40, deadline=None)
def test_shift_of_rewards_does_not_matter_and_scale_does_only_unscaled(rewards, factor, shift):
    base = torch.tensor([rewards], dtype=torch.float64)
    moved = factor * base + shift
    torch.testing.assert_close(
        group_advantages(moved, scale_by_std=False),
        factor * group_advantages(base, scale_by_std=False),
        rtol=1e-12,
        atol=1e-12,
    )
    torch.testing.assert_close(
        group_advantages(moved, scale_by_std=True), group_advantages(base, scale_by_std=True), rtol=1e-4, atol=1e-9
    )


def test_a_lone_response_is_refused_by_the_name_of_the_key():
    with pytest.raises(ValueError, match="group_size"):
        group_advantages(torch.zeros(3, 1), scale_by_std=False)
