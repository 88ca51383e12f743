"""What must hold for every objective, on batches full of ties."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_rlvr.objectives import GRPO, SENT, Clipped

SENT_SETTINGS = {"low_entropy_quantile": 0.6, "high_cov_fraction": 0.4, "beta_low": 0.25, "beta_high": 1.5}
OBJECTIVES = {
    "grpo": GRPO(),
    "grpo_kl_token_mean": GRPO(surrogate=Clipped(high=0.28), kl_coef=0.5, aggregation="token_mean"),
    "sent": SENT(**SENT_SETTINGS),
    "sent_scope_fixed_k2": SENT(
        **SENT_SETTINGS,
        covariance_scope="low_entropy",
        kl_estimator="k2",
        aggregation="fixed_length",
        fixed_length=7,
    ),
    "sent_high_only_k1": SENT(
        beta_low=0.0, beta_high=0.5, high_cov_fraction=0.3, kl_estimator="k1", aggregation="token_mean"
    ),
}
EVERY = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
FAST = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def cut(n, cuts):
    edges = [0, *sorted(c % (n + 1) for c in cuts), n]
    return [slice(a, b) for a, b in itertools.pairwise(edges) if a < b]


@EVERY
@FAST
@given(data=st.data())
def test_micro_batches_change_neither_loss_nor_gradient_nor_metrics(batches, rows, evaluate, objective, data):
    batch = data.draw(batches)
    order = torch.tensor(data.draw(st.permutations(range(len(batch.stats.mask)))))
    pieces = [order[piece] for piece in cut(len(order), data.draw(st.lists(st.integers(0, 5), max_size=4)))]
    whole = evaluate(objective, batch)
    parts = [
        evaluate(objective, SimpleNamespace(tokens=rows(batch.tokens, piece)), whole.plan.rows(piece))
        for piece in pieces
    ]
    close(sum(part.loss for part in parts), whole.loss)
    gradient = torch.zeros_like(whole.gradient)
    for piece, part in zip(pieces, parts, strict=True):
        gradient[piece] = part.gradient
    close(gradient, whole.gradient)
    for name, ratio in whole.metrics.items():
        close(sum(part.metrics[name].numerator.double() for part in parts), ratio.numerator.double())
        assert sum(int(part.metrics[name].denominator) for part in parts) == int(ratio.denominator), name


@EVERY
@FAST
@given(data=st.data())
def test_permuting_rows_permutes_the_plan_to_the_bit(batches, rows, same_plan, objective, data):
    stats = data.draw(batches).stats
    order = torch.tensor(data.draw(st.permutations(range(len(stats.mask)))))
    same_plan(objective.plan(rows(stats, order)), objective.plan(stats).rows(order))


@EVERY
@FAST
@given(data=st.data(), columns=st.integers(1, 5), value=st.sampled_from([0.0, float("nan"), float("inf")]))
def test_padding_columns_change_nothing(batches, pad, evaluate, same_plan, objective, data, columns, value):
    batch = data.draw(batches)
    wide = SimpleNamespace(stats=pad(batch.stats, columns, value), tokens=pad(batch.tokens, columns, value))
    before, after = evaluate(objective, batch), evaluate(objective, wide)
    same_plan(after.plan, pad(before.plan, columns))
    close(after.loss, before.loss)
    close(after.gradient, torch.nn.functional.pad(before.gradient, (0, columns)))
    for name, ratio in before.metrics.items():
        close(after.metrics[name].numerator, ratio.numerator)
        assert after.metrics[name].denominator == ratio.denominator, name


@EVERY
@FAST
@given(data=st.data(), value=st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e300]))
def test_masked_positions_may_hold_anything(batches, evaluate, same_plan, objective, data, value):
    batch = data.draw(batches)
    hole = ~batch.stats.mask
    empty = hole.all(dim=1)

    def spoil(owner, *names):
        return replace(owner, **{name: getattr(owner, name).masked_fill(hole, value) for name in names})

    stats = replace(spoil(batch.stats, "logp", "entropy"), advantage=batch.stats.advantage.masked_fill(empty, value))
    spoilt = SimpleNamespace(stats=stats, tokens=spoil(batch.tokens, "logp", "old_logp", "ref_logp"))
    clean, got = evaluate(objective, batch), evaluate(objective, spoilt)
    same_plan(got.plan, clean.plan)
    assert torch.equal(got.loss, clean.loss)
    assert torch.equal(got.gradient, clean.gradient)
    assert (got.gradient[hole] == 0).all()
    for name, ratio in clean.metrics.items():
        assert torch.equal(got.metrics[name].numerator, ratio.numerator), name


@EVERY
@FAST
@given(data=st.data())
def test_uncounted_positions_of_a_plan_hold_zero_and_false(batches, objective, data):
    stats = data.draw(batches).stats
    plan = objective.plan(stats)
    for tensor in (plan.advantage, plan.weight, plan.kl_weight, plan.policy_mask, *plan.classes.values()):
        assert not tensor[~stats.mask].any()


@EVERY
@FAST
@given(data=st.data())
def test_denominators_count_over_one_update_only(batches, rows, objective, data):
    stats = data.draw(batches).stats
    whole = objective.plan(stats).weight
    for update in stats.update.unique():
        mine = stats.update == update
        assert torch.equal(whole[mine], objective.plan(rows(stats, mine)).weight)


@FAST
@given(data=st.data())
def test_loss_of_grpo_is_the_sum_over_its_updates(batches, rows, evaluate, data):
    batch, objective = data.draw(batches), GRPO(kl_coef=0.5)
    alone = [
        evaluate(objective, SimpleNamespace(stats=rows(batch.stats, mine), tokens=rows(batch.tokens, mine))).loss
        for mine in (batch.stats.update == update for update in batch.stats.update.unique())
    ]
    close(evaluate(objective, batch).loss, sum(alone))


@pytest.mark.parametrize("scope", ["all", "low_entropy"])
@FAST
@given(data=st.data(), share=st.sampled_from([0.0, 0.3, 1.0]))
def test_sent_with_one_beta_on_all_tokens_is_grpo_with_kl(batches, evaluate, scope, data, share):
    batch = data.draw(batches)
    sent = SENT(low_entropy_quantile=1.0, high_cov_fraction=share, beta_low=0.1, beta_high=0.1, covariance_scope=scope)
    ours, theirs = evaluate(sent, batch), evaluate(GRPO(kl_coef=0.1), batch)
    assert torch.equal(ours.plan.kl_weight, theirs.plan.kl_weight)
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.gradient, theirs.gradient)


@FAST
@given(data=st.data(), quantile=st.sampled_from([0.0, 0.5, 1.0]))
def test_sent_without_betas_is_grpo(batches, evaluate, data, quantile):
    batch = data.draw(batches)
    sent = SENT(low_entropy_quantile=quantile, beta_low=0.0, beta_high=0.0)
    assert not sent.needs_reference
    ours = evaluate(sent, SimpleNamespace(stats=batch.stats, tokens=replace(batch.tokens, ref_logp=None)))
    theirs = evaluate(GRPO(), batch)
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.gradient, theirs.gradient)


@FAST
@given(data=st.data(), tenths=st.integers(0, 10), share=st.integers(0, 10))
def test_selection_counts_are_exact_despite_ties(batches, data, tenths, share):
    stats = data.draw(batches).stats
    classes = SENT(low_entropy_quantile=tenths / 10, high_cov_fraction=share / 10).plan(stats).classes
    total = int(stats.mask.sum())
    low = -(-tenths * total // 10)
    assert int(classes["low"].sum()) == low
    assert int(classes["high"].sum()) == -(-share * low // 10)
    assert not (classes["high"] & ~classes["low"]).any()


@EVERY
@FAST
@given(data=st.data())
def test_gradient_shares_and_clip_fraction_count_tokens_by_definition(batches, evaluate, objective, data):
    batch = data.draw(batches)
    got = evaluate(objective, batch)
    tokens, a = batch.tokens, batch.stats.token_advantage()
    ratio = (tokens.logp - tokens.old_logp).exp()
    clipped = ((a > 0) & (ratio > 1 + objective.surrogate.high)) | ((a < 0) & (ratio < 1 - objective.surrogate.low))
    count = int(tokens.mask.sum())
    assert_share(got.metrics["clip_fraction"], clipped & tokens.mask, count)
    assert_share(got.metrics["grad_share/policy"], (a != 0) & ~clipped & tokens.mask, count)
    if objective.needs_reference:
        pulled = got.plan.kl_weight != 0
        if objective.kl_estimator != "k1":  # k2 and k3 are at their minimum where the policies agree
            pulled &= tokens.logp != tokens.ref_logp
        assert_share(got.metrics["grad_share/kl"], pulled, count)
    else:
        assert "grad_share/kl" not in got.metrics


def assert_share(ratio, expected, count):
    assert (int(ratio.numerator), int(ratio.denominator)) == (int(expected.sum()), count)
