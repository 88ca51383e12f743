"""Intervals, paired tests, and means over seeds."""

import json
import math

import numpy as np
import pytest

from lightning_rlvr import analysis
from lightning_rlvr.types import UserError


@pytest.mark.parametrize(("dof", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (60, 2.0003)])
def test_t_quantiles_are_those_of_the_tables(dof, quantile):
    assert analysis.t_quantile(dof) == pytest.approx(quantile, abs=5e-5)


@pytest.mark.parametrize("dof", [1, 2, 3, 4, 7, 12])
def test_t_probabilities_are_the_integral_of_the_density(dof):
    t = np.linspace(-1.7, 1.7, 200_001)
    scale = math.gamma((dof + 1) / 2) / (math.sqrt(dof * math.pi) * math.gamma(dof / 2))
    assert analysis.t_within(1.7, dof) == pytest.approx(
        np.trapezoid(scale * (1 + t**2 / dof) ** (-(dof + 1) / 2), t), abs=1e-9
    )


def test_an_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(size=(4000, 3))
    found = [analysis.interval(row) for row in draws]
    covered = np.mean([abs(i.mean) <= i.half for i in found])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_few_values_have_no_interval():
    assert math.isnan(analysis.interval([]).mean)
    one = analysis.interval([1.0, math.nan])
    assert (one.mean, one.seeds) == (1.0, 1)
    assert math.isnan(one.half)


def test_the_summary_counts_what_variants_share_of_the_base_once(study):
    table = analysis.summarise(analysis.read_runs(study))
    assert table.index.tolist() == ["base", "grpo", "sent", "mask"]
    assert table.loc["base", ("avg@4", "mean")] == pytest.approx(0.2)
    assert table.loc["base", ("avg@4", "seeds")] == 3
    assert table.loc["sent", ("avg@4", "mean")] == pytest.approx(0.8)
    assert table.loc["sent", ("avg@4", "half")] == pytest.approx(0.01 * analysis.t_quantile(2) / math.sqrt(3))
    assert table.loc["mask", ("avg@4", "seeds")] == 2
    assert table.loc["grpo", ("train_entropy", "mean")] == pytest.approx(0.1)


def test_variants_are_compared_seed_by_seed(study):
    """Seeds move all variants alike here, so the differences have no spread although each variant does."""
    table = analysis.paired(analysis.read_runs(study), "grpo")
    assert set(table.index.get_level_values("variant")) == {"sent", "mask"}
    sent = table.loc[("sent", "avg@4")]
    assert sent["difference"] == pytest.approx(0.2)
    assert sent["high"] - sent["low"] == pytest.approx(0, abs=1e-9)
    assert sent["p"] == pytest.approx(0, abs=1e-9)
    assert table.loc[("mask", "avg@4"), "seeds"] == 2, "only the seeds that both have"
    assert table.loc[("sent", "response_length"), "p"] == 1


def test_the_paired_test_is_the_t_test(study):
    values = {1: 0.9, 2: 0.7, 3: 0.95}
    for seed, value in values.items():
        path = study / "sent" / f"seed-{seed}" / "summary.json"
        summary = json.loads(path.read_text())
        summary["after"]["val/avg@4"] = value
        path.write_text(json.dumps(summary))
    row = analysis.paired(analysis.read_runs(study), "grpo").loc[("sent", "avg@4")]
    differences = np.array([0.9 - 0.6, 0.7 - 0.61, 0.95 - 0.59])
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(3))
    assert row["difference"] == pytest.approx(differences.mean())
    assert row["p"] == pytest.approx(1 - t / math.sqrt(2 + t**2)), "the distribution for two degrees of freedom"
    assert row["low"] == pytest.approx(differences.mean() * (1 - 4.302653 / t), abs=1e-6)


def test_an_unknown_baseline_is_refused(study):
    with pytest.raises(UserError, match=r"baseline must be a variant .*grpo, sent, mask.*got 'ppo'"):
        analysis.paired(analysis.read_runs(study), "ppo")


def test_bands_are_intervals_over_seeds_at_each_batch(study):
    table = analysis.bands(analysis.read_training(study), "train/entropy").set_index(["variant", "batch"])
    assert table.loc[("sent", 4), "mean"] == pytest.approx(0.5)
    half = 0.01 * analysis.t_quantile(2) / math.sqrt(3)
    assert table.loc[("sent", 4), "high"] == pytest.approx(0.5 + half)
    smooth = analysis.bands(analysis.read_training(study), "train/response_length", 3).set_index(["variant", "batch"])
    assert smooth.loc["sent", "mean"].tolist() == [9.5, 10.0, 11.0, 11.5]
