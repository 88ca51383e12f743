"""The law of accuracy and entropy, and predicted against measured changes."""

import math

import numpy as np
import pandas as pd
import pytest

from lightning_rlvr import analysis


def test_the_law_is_found_where_it_holds(study):
    training = analysis.read_training(study)
    law = analysis.entropy_law(training["train/entropy"], training["train/accuracy"])
    assert law == pytest.approx((1.0, 3.0, 1.0))


def test_the_law_needs_three_batches_that_differ():
    for entropy, accuracy in (([0.1, 0.2], [1, 2]), ([0.1] * 3, [1, 2, 3]), ([0.1, math.nan, 0.3], [1, 2, 3])):
        assert math.isnan(analysis.entropy_law(entropy, accuracy).a)


def walk(covariance, noise=0.0, batches=40):
    """A run whose entropy follows the theory with eta = 5 lr, and a seeded disturbance of each measurement."""
    step = -0.01 * 5 * np.asarray(covariance)
    entropy = 2 + np.concatenate([[0], step.cumsum()[:-1]]) + noise * np.random.default_rng(0).normal(size=batches)
    metrics = {"train/entropy": entropy, "train/lr": 0.01, "train/covariance": covariance}
    return pd.DataFrame({"variant": "a", "seed": 1, "batch": np.arange(1, batches + 1), **metrics})


@pytest.mark.parametrize("window", [1, 3, 7])
def test_a_run_that_follows_the_theory_has_its_scale(window):
    run = walk(np.linspace(0.5, -0.1, 40) ** 3)
    changes = analysis.entropy_changes(run, window)
    assert len(changes) == 40 // window - 1
    assert changes["batch"].tolist() == [window * k for k in range(1, 40 // window)]
    assert (changes["measured"] / changes["predicted"]).tolist() == pytest.approx([5.0] * len(changes))
    assert analysis.fit_changes(changes) == pytest.approx((5.0, 1.0))


def test_windows_average_out_what_questions_bring():
    run = walk(np.linspace(0.5, 0.0, 40), noise=0.05)
    single, wide = (analysis.fit_changes(analysis.entropy_changes(run, window)).r for window in (1, 5))
    assert single < 0.6 < wide


def test_runs_are_kept_apart_and_in_order():
    one = walk(np.linspace(0.5, 0.0, 40))
    both = pd.concat([one, one.assign(seed=2)]).sample(frac=1, random_state=0)
    changes = analysis.entropy_changes(both, 4)
    assert changes.groupby("seed").size().tolist() == [9, 9]
    assert analysis.fit_changes(changes) == pytest.approx((5.0, 1.0))


def test_nothing_is_fitted_to_two_changes_or_to_none():
    for window in (14, 99):
        assert math.isnan(analysis.fit_changes(analysis.entropy_changes(walk(np.ones(40)), window)).slope)
    assert math.isnan(analysis.fit_changes(analysis.entropy_changes(walk(np.zeros(40)), 4)).slope)
