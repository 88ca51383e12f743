"""GRPO and SENT against loops over tokens written from the formulas: plan, loss and gradient to 1e-10."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from lightning_rlvr.objectives import GRPO, SENT, Clipped

KL = {  # value, derivative in logp, of d = ref_logp - logp
    "k1": (lambda d: -d, lambda d: 1.0),
    "k2": (lambda d: d * d / 2, lambda d: -d),
    "k3": (lambda d: math.exp(d) - 1 - d, lambda d: 1 - math.exp(d)),
}
AGGREGATIONS = [("sequence_mean", None), ("token_mean", None), ("fixed_length", 9)]


def denominator(batch, i, aggregation, length):
    rows = [j for j, update in enumerate(batch.update) if update == batch.update[i]]
    if aggregation == "token_mean":
        return sum(sum(batch.mask[j]) for j in rows)
    return len(rows) * (length if aggregation == "fixed_length" else sum(batch.mask[i]))


def loss_by_loop(batch, beta, logp=None, clip=(0.2, 0.2), kl="k3", aggregation="sequence_mean", length=None):
    """Return -J and its gradient in logp; beta maps (row, position) to the KL coefficient."""
    logp = batch.logp if logp is None else logp
    total, gradient = [], [[0.0] * len(row) for row in logp]
    for i, t in batch.tokens:
        a, r = batch.advantage[i], math.exp(logp[i][t] - batch.old_logp[i][t])
        bounded = min(max(r, 1 - clip[0]), 1 + clip[1])
        d = batch.ref_logp[i][t] - logp[i][t]
        value, slope = KL[kl]
        weight = 1 / denominator(batch, i, aggregation, length)
        total.append(weight * (-min(r * a, bounded * a) + beta.get((i, t), 0.0) * value(d)))
        policy = 0.0 if bounded * a < r * a else -r * a
        gradient[i][t] = weight * (policy + beta.get((i, t), 0.0) * slope(d))
    return math.fsum(total), gradient


def ceiling(share, total):
    return math.ceil(Fraction(str(share)) * total)


def classes_by_loop(batch, low_share, high_share, scope):
    """T_low and T_high as sets of (row, position); ties go by row id, then position."""

    def place(token):
        return batch.row_id[token[0]], token[1]

    by_entropy = sorted(batch.tokens, key=lambda it: (batch.entropy[it[0]][it[1]], *place(it)))
    low = by_entropy[: ceiling(low_share, len(batch.tokens))]
    around = batch.tokens if scope == "all" else low
    n = max(len(around), 1)
    mean_logp = math.fsum(batch.old_logp[i][t] for i, t in around) / n
    mean_advantage = math.fsum(batch.advantage[i] for i, _ in around) / n

    def covariance(token):
        i, t = token
        return (batch.old_logp[i][t] - mean_logp) * (batch.advantage[i] - mean_advantage)

    by_covariance = sorted(low, key=lambda it: (-covariance(it), *place(it)))
    return set(low), set(by_covariance[: ceiling(high_share, len(low))])


def members(chosen):
    return {(int(i), int(t)) for i, t in chosen.nonzero()}


def agrees(batch, objective, beta, **settings):
    tokens = batch.token_batch
    loss = objective.loss(tokens, objective.plan(batch.stats)).loss
    (gradient,) = torch.autograd.grad(loss, tokens.logp)
    expected, expected_gradient = loss_by_loop(batch, beta, **settings)
    assert loss.item() == pytest.approx(expected, abs=1e-10)
    torch.testing.assert_close(gradient, torch.tensor(expected_gradient, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kl", KL)
def test_the_loop_agrees_with_its_own_finite_differences(batch, kl):
    beta = dict.fromkeys(batch.tokens, 0.3)
    _, gradient = loss_by_loop(batch, beta, kl=kl)
    step = 1e-6
    for i, t in batch.tokens:
        values = []
        for sign in (1, -1):
            moved = [list(row) for row in batch.logp]
            moved[i][t] += sign * step
            values.append(loss_by_loop(batch, beta, moved, kl=kl)[0])
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(gradient[i][t], abs=1e-7)


@pytest.mark.parametrize(("aggregation", "length"), AGGREGATIONS)
@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.1, 0.28)])
def test_grpo_without_kl(batch, aggregation, length, clip):
    objective = GRPO(surrogate=Clipped(*clip), aggregation=aggregation, fixed_length=length)
    agrees(batch, objective, {}, clip=clip, aggregation=aggregation, length=length)


@pytest.mark.parametrize(("aggregation", "length"), AGGREGATIONS)
@pytest.mark.parametrize("kl", KL)
def test_grpo_with_kl(batch, aggregation, length, kl):
    objective = GRPO(kl_coef=0.25, kl_estimator=kl, aggregation=aggregation, fixed_length=length)
    beta = dict.fromkeys(batch.tokens, 0.25)
    agrees(batch, objective, beta, kl=kl, aggregation=aggregation, length=length)


SELECTIONS = [(0.8, 0.0002), (0.8, 0.3), (0.5, 0.5), (1.0, 0.1), (0.25, 1.0), (0.6, 0.0), (0.0, 0.5)]
SCOPES = pytest.mark.parametrize("scope", ["all", "low_entropy"])


@SCOPES
@pytest.mark.parametrize(("low_share", "high_share"), SELECTIONS)
def test_sent_selection_with_ties(batch, scope, low_share, high_share):
    objective = SENT(low_entropy_quantile=low_share, high_cov_fraction=high_share, covariance_scope=scope)
    plan = objective.plan(batch.stats)
    low, high = classes_by_loop(batch, low_share, high_share, scope)
    assert members(plan.classes["low"]) == low
    assert members(plan.classes["high"]) == high


@SCOPES
@pytest.mark.parametrize(("low_share", "high_share"), SELECTIONS)
@pytest.mark.parametrize("betas", [(0.0625, 0.25), (0.0, 0.5)])
def test_sent_loss(batch, scope, low_share, high_share, betas):
    objective = SENT(
        low_entropy_quantile=low_share,
        high_cov_fraction=high_share,
        covariance_scope=scope,
        beta_low=betas[0],
        beta_high=betas[1],
    )
    low, high = classes_by_loop(batch, low_share, high_share, scope)
    beta = {token: betas[token in high] for token in low}
    agrees(batch, objective, beta)


@pytest.mark.parametrize(("aggregation", "length"), AGGREGATIONS)
@pytest.mark.parametrize("kl", KL)
def test_sent_loss_in_every_estimator_and_aggregation(batch, aggregation, length, kl):
    objective = SENT(
        low_entropy_quantile=0.7,
        high_cov_fraction=0.4,
        beta_low=0.25,
        beta_high=1.5,
        surrogate=Clipped(high=0.28),
        kl_estimator=kl,
        aggregation=aggregation,
        fixed_length=length,
    )
    low, high = classes_by_loop(batch, 0.7, 0.4, "all")
    beta = {token: 1.5 if token in high else 0.25 for token in low}
    agrees(batch, objective, beta, clip=(0.2, 0.28), kl=kl, aggregation=aggregation, length=length)


def test_coefficients_keep_their_float64_digits(batch):
    """0.1, 0.05 and 0.2 are no binary fractions: a detour through float32 costs 1e-9."""
    agrees(batch, GRPO(kl_coef=0.1), dict.fromkeys(batch.tokens, 0.1))
    low, high = classes_by_loop(batch, 0.8, 0.3, "all")
    objective = SENT(high_cov_fraction=0.3, beta_low=0.05, beta_high=0.2)
    agrees(batch, objective, {token: 0.2 if token in high else 0.05 for token in low})


def test_without_ties_low_lies_below_the_quantile_and_high_above(batch):
    """T_low = {H < tau_H} and T_high = {Cov > tau_cov} of the paper, tau being the next value in rank."""
    generator = torch.Generator().manual_seed(3)
    entropy, logp = torch.rand(2, *batch.stats.mask.shape, generator=generator, dtype=torch.float64)
    batch.advantage = torch.randn(len(batch.mask), generator=generator, dtype=torch.float64).tolist()
    stats = replace(batch.stats, entropy=entropy, logp=-logp, advantage=torch.tensor(batch.advantage).double())
    classes = SENT(low_entropy_quantile=0.5, high_cov_fraction=0.3).plan(stats).classes

    ranked = sorted(entropy[i, t].item() for i, t in batch.tokens)
    low = {(i, t) for i, t in batch.tokens if entropy[i, t] < ranked[ceiling(0.5, len(ranked))]}
    assert members(classes["low"]) == low

    mean_logp = sum(-logp[i, t].item() for i, t in batch.tokens) / len(ranked)
    mean_advantage = sum(batch.advantage[i] for i, _ in batch.tokens) / len(ranked)
    cov = {(i, t): (-logp[i, t].item() - mean_logp) * (batch.advantage[i] - mean_advantage) for i, t in low}
    tau = sorted(cov.values(), reverse=True)[ceiling(0.3, len(low))]
    assert members(classes["high"]) == {token for token in low if cov[token] > tau}
