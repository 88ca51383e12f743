"""Clip-Cov's draw, and plans of Clip-Cov and KL-Cov by hand."""

from dataclasses import replace

import pytest
import torch

from lightning_rlvr.objectives import ClipCov, KLCov
from lightning_rlvr.types import TokenStats


def stats_of(n, width, row_id=None, seed=0):
    """Random statistics whose covariances spread over and beyond the band."""
    g = torch.Generator().manual_seed(seed)
    return TokenStats(
        logp=-4 * torch.rand(n, width, generator=g, dtype=torch.float64),
        entropy=torch.rand(n, width, generator=g, dtype=torch.float64),
        advantage=torch.randn(n, generator=g, dtype=torch.float64) * 3,
        mask=torch.ones(n, width, dtype=torch.bool),
        row_id=torch.arange(n) + 1 if row_id is None else row_id,
        update=torch.zeros(n, dtype=torch.long),
    )


def dropped(stats, **settings):
    return ClipCov(**settings).plan(stats).classes["dropped"]


EVERY_TOKEN = {"cov_low": -1e9, "cov_high": 1e9}


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (1e-4, 1), (0.01, 8), (0.1, 80)])
def test_the_share_is_of_all_tokens_and_not_of_candidates(fraction, count):
    stats = stats_of(100, 8)
    assert int(dropped(stats, fraction=fraction).sum()) == count


def test_fewer_candidates_than_the_share_are_all_dropped():
    stats = stats_of(100, 8)
    logp, a = stats.logp, stats.token_advantage()
    covariance = (logp - logp.mean()) * (a - a.mean())
    candidates = (covariance > 1) & (covariance < 5)
    assert 0 < int(candidates.sum()) < 700
    assert torch.equal(dropped(stats, fraction=0.9), candidates)


def test_dropped_tokens_lose_their_gradient_and_stay_in_the_denominators(make, evaluate):
    batch = make([[1.0, -1.0], [1.0, -1.0]], advantage=[3.0, -3.0])
    got = evaluate(ClipCov(cov_low=1.0, cov_high=5.0, fraction=1.0), batch)  # covariances 3, -3; -3, 3
    assert got.plan.classes["dropped"].tolist() == [[True, False], [False, True]]
    assert got.plan.weight.tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert got.gradient.tolist() == [[0.0, -0.75], [0.75, 0.0]]
    assert [int(x) for x in got.metrics["grad_share/policy"]] == [2, 4]


@pytest.mark.parametrize("old", ["equal", "clipped"])
def test_a_dropped_token_is_not_counted_as_clipped(make, evaluate, old):
    batch = make([[1.0, -1.0]], old_logp=[[1.0 - (old == "clipped"), -1.0]], advantage=[3.0])
    got = evaluate(ClipCov(**EVERY_TOKEN, fraction=1.0), batch)
    assert int(got.metrics["clip_fraction"].numerator) == 0
    assert not got.gradient.any()


def test_the_draw_depends_on_row_id_and_position_only():
    """Other rows, their order, padding and the generator's state do not change which of two tokens goes first."""
    stats = stats_of(40, 6)
    before = dropped(stats, **EVERY_TOKEN, fraction=0.25)
    torch.manual_seed(99)
    order = torch.randperm(40)
    wide = {n: torch.nn.functional.pad(getattr(stats, n), (0, 5)) for n in ("logp", "entropy", "mask")}
    moved = replace(stats, **wide)
    moved = TokenStats(
        *(x[order] for x in (moved.logp, moved.entropy, moved.advantage, moved.mask)), stats.row_id[order], stats.update
    )
    assert torch.equal(dropped(moved, **EVERY_TOKEN, fraction=0.25)[:, :6], before[order])
    # the statistics move, the draw does not
    other = stats_of(40, 6, seed=5)
    assert torch.equal(dropped(other, **EVERY_TOKEN, fraction=0.25), before)
    # a larger share contains a smaller one
    assert not (before & ~dropped(stats, **EVERY_TOKEN, fraction=0.5)).any()


def test_the_draw_differs_between_row_ids():
    first, second = (
        dropped(stats_of(40, 6, row_id=torch.arange(40) + k), **EVERY_TOKEN, fraction=0.25) for k in (1, 1001)
    )
    agreement = float((first == second).double().mean())
    assert 0.5 < agreement < 0.75  # 1 - 2 / 4 * 3 / 4 = 0.625 by chance


def test_every_token_is_drawn_equally_often():
    """One of 8 candidates over 1,000 batches of other row ids: each 125 times, give or take 5 standard deviations."""
    g = torch.Generator().manual_seed(3)
    trials, tally = 1000, torch.zeros(2, 4)
    template = stats_of(2, 4)
    objective = ClipCov(**EVERY_TOKEN, fraction=0.125)
    for ids in torch.randint(-(2**62), 2**62, (trials, 2), generator=g):
        tally += objective.plan(replace(template, row_id=ids)).classes["dropped"]
    assert int(tally.sum()) == trials
    assert (tally - trials / 8).abs().max() < 5 * (trials * 7 / 64) ** 0.5


def test_kl_cov_by_hand(make, evaluate):
    batch = make([[1.0, -1.0], [1.0, -1.0]], old_logp=[[0.5, -1.0], [1.0, -0.5]], advantage=[3.0, -3.0])
    got = evaluate(KLCov(fraction=0.5, beta=0.5), batch)
    # mean logp 0, mean A 0: covariances 1.5, -3; -3, 1.5
    assert got.plan.classes["held"].tolist() == [[True, False], [False, True]]
    assert got.plan.drift_weight.tolist() == [[0.5, 0.0], [0.0, 0.5]]
    up, down = float(torch.tensor(0.5).double().exp()), float(torch.tensor(-0.5).double().exp())
    expected = [[(-3 * up + 0.5) / 4, -0.75], [0.75, (3 * down - 0.5) / 4]]
    assert got.gradient.tolist() == [[pytest.approx(x, abs=1e-14) for x in row] for row in expected]
    assert [int(x) for x in got.metrics["grad_share/drift"]] == [2, 4]
    assert [int(x) for x in got.metrics["clip_fraction"]] == [0, 4]


def test_no_term_of_kl_cov_is_clipped(make, evaluate):
    batch = make([[-1.0, -3.0]], old_logp=[[-3.0, -1.0]], advantage=[1.0])
    got = evaluate(KLCov(fraction=0.0), batch)
    assert [int(x) for x in got.metrics["grad_share/policy"]] == [2, 2]
