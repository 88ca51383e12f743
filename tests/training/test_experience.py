"""Metrics of a rollout batch."""

from types import SimpleNamespace

import pytest
import torch

from lightning_rlvr.objectives import GRPO, SENT, DrGRPO, EntropyBonus, KLCov
from lightning_rlvr.training.experience import pull_covariance
from lightning_rlvr.types import TokenStats

ROWS, T = 8, 5


def batch(updates=1):
    """Statistics and reference log-probabilities with rubbish where no token counts."""
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(T) < torch.randint(1, T + 1, (ROWS, 1), generator=g)
    logp, ref, entropy = (torch.rand(3, ROWS, T, generator=g, dtype=torch.float64) - 2).masked_fill(~mask, torch.nan)
    update = torch.arange(ROWS) * updates // ROWS
    stats = TokenStats(logp, -entropy, torch.randn(ROWS, generator=g).double(), mask, torch.randperm(ROWS), update)
    return stats, ref


def covariance_of(objective, stats, ref):
    record = SimpleNamespace(stats=stats, plan=objective.plan(stats), ref_logp=ref)
    numerator, denominator = pull_covariance(objective, record)
    return float(numerator / denominator)


def in_plain_python(pairs):
    """The covariance of (log-probability, pull) pairs."""
    mean = [sum(values) / len(pairs) for values in zip(*pairs, strict=True)]
    return sum((x - mean[0]) * (y - mean[1]) for x, y in pairs) / len(pairs)


def pairs_of(stats, pull):
    return [(float(stats.logp[i, t]), float(pull(i, t))) for i, t in stats.mask.nonzero().tolist()]


def test_it_is_the_covariance_of_log_probability_and_advantage():
    stats, ref = batch()
    wanted = in_plain_python(pairs_of(stats, lambda i, t: stats.advantage[i]))
    assert abs(wanted) > 0.01
    assert covariance_of(GRPO(aggregation="token_mean"), stats, ref) == pytest.approx(wanted)
    assert covariance_of(EntropyBonus(aggregation="token_mean"), stats, ref) == pytest.approx(wanted)


def test_a_kl_pulls_against_the_advantage():
    stats, ref = batch()
    settings = SENT(aggregation="token_mean", beta_low=0.3, beta_high=0.3, kl_estimator="k2", low_entropy_quantile=1.0)
    wanted = in_plain_python(pairs_of(stats, lambda i, t: stats.advantage[i] - 0.3 * (stats.logp - ref)[i, t]))
    assert covariance_of(settings, stats, ref) == pytest.approx(wanted)


def test_the_weights_of_the_aggregation_are_in_the_pull():
    stats, ref = batch()
    tokens = int(stats.mask.sum())
    wanted = in_plain_python(pairs_of(stats, lambda i, t: stats.advantage[i] * tokens / (ROWS * 9)))
    assert covariance_of(DrGRPO(fixed_length=9), stats, ref) == pytest.approx(wanted)


def test_a_drift_penalty_does_not_pull_on_policy():
    stats, ref = batch()
    plain = covariance_of(KLCov(beta=0.0, aggregation="token_mean"), stats, ref)
    assert covariance_of(KLCov(beta=9.0, aggregation="token_mean"), stats, ref) == pytest.approx(plain)


def test_updates_on_one_batch_add_up():
    _, ref = batch()
    twice, _ = batch(updates=2)
    first, second = ((twice.update == number)[:, None] & twice.mask for number in (0, 1))
    share = [int(part.sum()) / int(twice.mask.sum()) for part in (first, second)]
    wanted = in_plain_python(pairs_of(twice, lambda i, t: twice.advantage[i] / share[int(twice.update[i])]))
    assert covariance_of(GRPO(aggregation="token_mean"), twice, ref) == pytest.approx(wanted)
