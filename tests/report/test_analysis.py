"""From run folders to numbers."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from lightning_rlvr import analysis
from lightning_rlvr.types import UserError


def test_finished_runs_are_read_in_the_order_of_the_sweep(study):
    runs = analysis.read_runs(study)
    assert runs.index.tolist() == [("grpo", s) for s in (1, 2, 3)] + [("sent", s) for s in (1, 2, 3)] + [
        ("mask", 1),
        ("mask", 2),
    ]
    assert runs.loc[("sent", 2), "after/avg@4"] == pytest.approx(0.81)
    assert runs.loc[("sent", 2), "before/avg@4"] == 0.2
    assert analysis.held_out_metrics(runs) == ["avg@4", "pass@1", "pass@4", "entropy", "response_length"]


def test_without_a_manifest_variants_are_sorted(study):
    (study / "sweep.json").unlink()
    assert analysis.variants_of(analysis.read_runs(study)) == ["grpo", "mask", "sent"]


def test_a_folder_without_finished_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="must hold finished runs"):
        analysis.read_runs(tmp_path)


def test_batches_are_counted_as_trained(study):
    training, held_out = analysis.read_training(study), analysis.read_held_out(study)
    assert training.groupby(["variant", "seed"])["batch"].apply(list).tolist() == [[1, 2, 3, 4]] * 8
    assert held_out.groupby(["variant", "seed"])["batch"].apply(list).tolist() == [[0, 4]] * 8
    assert held_out.loc[held_out["batch"] == 0, "val/avg@4"].eq(0.2).all()
    assert not [column for column in training if column.startswith("val/")]


def test_a_validation_after_the_first_batch_is_not_the_one_before_it(study):
    path = study / "grpo" / "seed-1" / "metrics.csv"
    table = pd.read_csv(path)
    early = table.iloc[[0]].assign(**{"val/avg@4": 0.33})
    pd.concat([table.iloc[:2], early, table.iloc[2:]]).to_csv(path, index=False)
    mine = analysis.read_held_out(study).query("variant == 'grpo' and seed == 1")
    assert mine["batch"].tolist() == [0, 1, 4]
    assert mine["val/avg@4"].tolist() == [0.2, 0.33, 0.6]


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


def test_the_law_is_found_where_it_holds(study):
    training = analysis.read_training(study)
    law = analysis.entropy_law(training["train/entropy"], training["train/accuracy"])
    assert law == pytest.approx((1.0, 3.0, 1.0))


def test_the_law_needs_three_batches_that_differ():
    for entropy, accuracy in (([0.1, 0.2], [1, 2]), ([0.1] * 3, [1, 2, 3]), ([0.1, math.nan, 0.3], [1, 2, 3])):
        assert math.isnan(analysis.entropy_law(entropy, accuracy).a)
