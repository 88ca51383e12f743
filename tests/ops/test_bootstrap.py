from itertools import product

import pytest
import torch

from lightning_rlvr.ops import bootstrap
from lightning_rlvr.ops.bootstrap import bootstrap_interval, bootstrap_means, paired_difference
from lightning_rlvr.types import UserError


def test_bootstrap_interval_is_near_the_normal_one_and_widens_with_level():
    values = torch.rand(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    low, high = bootstrap_interval(values, 0.95, samples=2000)
    half = 1.96 * values.std().item() / 20
    assert low == pytest.approx(values.mean().item() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean().item() + half, abs=0.15 * half)
    wide_low, wide_high = bootstrap_interval(values, 0.99, samples=2000)
    assert wide_low < low < high < wide_high


def test_bootstrap_interval_has_its_own_generator():
    values = torch.rand(40, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    first = bootstrap_interval(values, seed=1)
    torch.manual_seed(5)
    assert bootstrap_interval(values, seed=1) == first
    assert bootstrap_interval(values, seed=2) != first
    torch.set_rng_state(before)
    bootstrap_interval(values)
    assert torch.equal(torch.get_rng_state(), before)


def test_bootstrap_interval_of_one_problem_is_a_point():
    assert bootstrap_interval(torch.tensor([0.25])) == (0.25, 0.25)


@pytest.mark.parametrize("values", [[], [float("nan"), 1.0], [float("inf")]])
def test_bootstrap_interval_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match="finite and at least one"):
        bootstrap_interval(torch.tensor(values))


@pytest.mark.parametrize(("key", "value"), [("level", 95.0), ("level", 0.0), ("samples", 0)])
def test_bootstrap_interval_names_the_key(key, value):
    with pytest.raises(UserError, match=f"{key} must be"):
        bootstrap_interval(torch.tensor([0.5]), **{key: value})


def every_resample(values: list[float]) -> torch.Tensor:
    """The means of all n ** n resamples, each as likely."""
    return torch.tensor([sum(drawn) / len(values) for drawn in product(values, repeat=len(values))])


@pytest.mark.parametrize("values", [[0.0, 1.0, 1.0], [0.1, -0.2, 0.4, 0.0]])
def test_the_resampled_means_have_the_distribution_of_all_resamples(values):
    got = bootstrap_means([torch.tensor(values)], 40_000, seed=3)
    expected = every_resample(values)
    assert got.mean().item() == pytest.approx(expected.mean().item(), abs=5e-3)
    assert got.var(unbiased=False).item() == pytest.approx(expected.var(unbiased=False).item(), rel=0.03)
    for quantile in (0.1, 0.5, 0.9):
        at = expected.quantile(quantile) + 1e-6
        share = (expected <= at).double().mean().item()
        assert (got <= at).double().mean().item() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("gains", [[1.0, 0.0, -1.0, 1.0], [0.3, -0.1, -0.1, -0.1], [0.5, 0.5], [-1.0, 0.25, 0.5]])
def test_the_share_without_a_gain_is_that_of_all_resamples(gains):
    base = torch.tensor([0.2 * i for i in range(len(gains))], dtype=torch.float64)
    found = paired_difference([base], [base + torch.tensor(gains, dtype=torch.float64)], samples=40_000)
    assert found.value == pytest.approx(sum(gains) / len(gains))
    assert found.not_better == pytest.approx((every_resample(gains) <= 1e-6).double().mean().item(), abs=0.01)


def test_a_gain_lost_to_rounding_is_none():
    gains = torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64)  # their sum is 5.6e-17 in some order
    found = paired_difference([torch.zeros(3)], [gains], samples=2000)
    exact = every_resample([1, 2, -3])
    assert found.not_better == pytest.approx((exact <= 0).double().mean().item(), abs=0.03)
    assert paired_difference([torch.zeros(2)], [torch.full((2,), 1e-15)]).not_better == 1


def test_models_are_resampled_in_pairs():
    hard = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = paired_difference([hard], [hard + 0.125], samples=200)
    assert found[1:3] == pytest.approx((0.125, 0.125))
    a, b = hard, hard.flip(0)
    torch.testing.assert_close(
        bootstrap_means([b], 100, seed=4) - bootstrap_means([a], 100, seed=4), bootstrap_means([b - a], 100, seed=4)
    )


def test_each_group_weighs_the_same_and_is_resampled_by_itself():
    large, small = torch.zeros(1000), torch.tensor([1.0, 1.0])
    means = bootstrap_means([large, small], 50, seed=0)
    torch.testing.assert_close(means, torch.full((50,), 0.5, dtype=torch.float64))
    values = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    variance = bootstrap_means([values], 20_000, seed=0).var()
    assert bootstrap_means([values, values], 20_000, seed=0).var().item() == pytest.approx(
        variance.item() / 2, rel=0.05
    )


def test_memory_does_not_decide_the_resamples(monkeypatch):
    values = torch.rand(7, generator=torch.Generator().manual_seed(1))
    whole = bootstrap_means([values], 100, seed=0)
    monkeypatch.setattr(bootstrap, "INDICES_AT_A_TIME", 20)
    assert torch.equal(bootstrap_means([values], 100, seed=0), whole)


def test_pairs_are_of_the_same_problems():
    with pytest.raises(ValueError, match="same problems"):
        paired_difference([torch.zeros(2)], [torch.zeros(3)])
