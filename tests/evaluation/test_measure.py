"""Numbers from responses and verdicts."""

from itertools import combinations, permutations

import pandas as pd
import pytest
import torch

from lightning_rlvr.evaluation.measure import Bootstrap, Result, chosen_ks, differences, estimates, measure
from lightning_rlvr.ops.pass_at_k import maj_at_k
from lightning_rlvr.types import UserError

C, W, U, T, E = "correct", "wrong", "unparsable", "timeout", "error"


def tables(status, cluster, tokens=None, entropy=None, truncated=None):
    shape = [[0] * len(row) for row in status]
    uids = [f"q{i}" for i in range(len(status))]
    samples = pd.DataFrame(
        {"uid": uids, "tokens": tokens or shape, "entropy": entropy or shape, "truncated": truncated or shape}
    )
    return samples, pd.DataFrame({"uid": uids, "status": status, "cluster": cluster})


def test_every_measure_of_two_problems():
    status = [[C, W, C, U], [W, T, E, W]]
    cluster = [[0, 1, 0, -1], [0, -1, -1, 0]]
    tokens, entropy = [[1, 2, 3, 4], [5, 5, 5, 5]], [[1.0, 0.5, 0.0, 0.25], [0.2] * 4]
    truncated = [[False, False, False, True], [False] * 4]
    found = measure(*tables(status, cluster, tokens, entropy, truncated), [1, 2, 4])
    scores = {name: values.tolist() for name, values in found.scores.items()}
    assert list(scores) == ["pass@1", "pass@2", "pass@4", "avg@4", "maj@1", "maj@2", "maj@4"]
    assert scores["pass@1"] == pytest.approx([0.5, 0])
    assert scores["pass@2"] == pytest.approx([1 - 1 / 6, 0])
    assert scores["pass@4"] == [1, 0]
    assert scores["avg@4"] == [0.5, 0]
    assert scores["maj@1"] == [0.5, 0]
    assert scores["maj@2"] == [0.75, 0]  # first two tie, of the others one votes
    assert scores["maj@4"] == [1, 0]
    assert found.uids == ("q0", "q1")
    assert found.responses == pytest.approx(
        {
            "length": 3.75,
            "entropy": (1.0 + 1.0 + 0.0 + 1.0 + 4.0) / 30,
            "truncated": 1 / 8,
            "correct": 2 / 8,
            "wrong": 3 / 8,
            "unparsable": 1 / 8,
            "timeout": 1 / 8,
            "error": 1 / 8,
        }
    )


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_maj_at_k_is_the_mean_over_all_subsets_on_average_over_the_order_of_samples(k):
    correct, cluster = [True, False, False, False], [0, 1, 1, -1]
    orders = list(permutations(range(4)))
    status = [[C if correct[i] else W for i in order] for order in orders]
    found = measure(*tables(status, [[cluster[i] for i in order] for order in orders]), [k])
    subsets = [list(subset) for subset in combinations(range(4), k)]
    exact = maj_at_k(torch.tensor(cluster)[torch.tensor(subsets)], torch.tensor(correct)[torch.tensor(subsets)])
    assert found.scores[f"maj@{k}"].mean().item() == pytest.approx(exact.mean().item())


def test_samples_beyond_the_last_whole_group_do_not_vote():
    assert measure(*tables([[C, C, W]], [[0, 0, 1]]), [2]).scores["maj@2"].tolist() == [1]


def test_the_order_of_problems_does_not_matter_to_means():
    status, cluster = [[C, W], [W, W], [C, C]], [[0, 1], [0, 0], [0, 0]]
    means = [
        {name: values.mean().item() for name, values in measure(*tables(s, c), [1, 2]).scores.items()}
        for s, c in ((status, cluster), (status[::-1], cluster[::-1]))
    ]
    assert means[0] == pytest.approx(means[1])


@pytest.mark.parametrize(
    ("ks", "samples", "expected"),
    [(None, 32, [8, 16, 32]), (None, 20, [8, 16]), (None, 4, [4]), ([4, 1, 4], 4, [1, 4])],
)
def test_ks(ks, samples, expected):
    assert chosen_ks(ks, samples) == expected


@pytest.mark.parametrize("ks", [[8], [0], [-1, 2], []])
def test_ks_beyond_the_samples_are_refused(ks):
    with pytest.raises(UserError, match=r"ks must be numbers in \[1, samples\].* with 4 samples"):
        chosen_ks(ks, 4)


def result(values, uids=None):
    return Result(tuple(uids or range(len(values))), {"avg@2": torch.tensor(values, dtype=torch.float64)}, {})


def test_the_average_weighs_benchmarks_alike_and_differences_are_paired():
    results = {
        "base": {"a": result([0.0, 0.5]), "b": result([0.5, 0.5, 0.5, 0.5])},
        "better": {"a": result([0.5, 1.0]), "b": result([0.5, 0.5, 0.5, 0.5])},
    }
    bootstrap = Bootstrap(resamples=200)
    found = estimates(results, bootstrap)
    assert found["better"]["average"]["avg@2"].value == pytest.approx((0.75 + 0.5) / 2)
    assert found["base"]["b"]["avg@2"] == (0.5, 0.5, 0.5)
    low, high = found["base"]["a"]["avg@2"][1:]
    assert (low, high) == (0.0, 0.5)
    gains = differences(results, bootstrap)
    assert list(gains) == ["better"]
    assert gains["better"]["a"]["avg@2"] == (0.5, 0.5, 0.5, 0.0)
    assert gains["better"]["b"]["avg@2"] == (0.0, 0.0, 0.0, 1.0)
    assert gains["better"]["average"]["avg@2"] == (0.25, 0.25, 0.25, 0.0)


def test_models_on_different_problems_are_not_compared():
    results = {"base": {"a": result([0.0, 1.0])}, "other": {"a": result([0.0, 1.0], ["x", "y"])}}
    with pytest.raises(UserError, match="different problems of 'a'"):
        differences(results, Bootstrap())


@pytest.mark.parametrize(("key", "value"), [("level", 1.0), ("level", 0.0), ("resamples", 0)])
def test_bootstrap_settings_are_checked(key, value):
    with pytest.raises(UserError, match=f"{key} must be .* Set {key}"):
        Bootstrap(**{key: value})
