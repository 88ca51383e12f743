"""Objectives that must be another one at certain settings, in value and gradient."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_rlvr.objectives import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    SENT,
    AdaptiveEntropy,
    ClipCov,
    Clipped,
    DrGRPO,
    EntropyAdvantage,
    EntropyBonus,
    HighEntropyKL,
    HighEntropyMask,
    KLCov,
    SequenceClipped,
    Unclipped,
)

FAST = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
COMMON = {"kl_coef": 0.1, "kl_estimator": "k2"}
LOOSE_KL_COV = KLCov(fraction=0.0, surrogate=Clipped(), **COMMON)
RELEASE = {"variant": "release", "release_kl_coef": 0.5}
PAIRS = {
    "dr_grpo": (DrGRPO(fixed_length=5), GRPO(aggregation="fixed_length", fixed_length=5)),
    "dapo": (DAPO(), GRPO(surrogate=Clipped(0.2, 0.28), aggregation="token_mean")),
    "gspo": (GSPO(), GRPO(surrogate=SequenceClipped(3e-4, 4e-4))),
    "clip_cov_draws_none": (ClipCov(cov_low=-9.0, cov_high=9.0, fraction=0.0, **COMMON), GRPO(**COMMON)),
    "clip_cov_has_no_candidates": (ClipCov(cov_low=80.0, cov_high=90.0, fraction=0.5, **COMMON), GRPO(**COMMON)),
    "kl_cov_holds_none": (KLCov(fraction=0.0, **COMMON), GRPO(surrogate=Unclipped(), **COMMON)),
    "kl_cov_without_beta": (KLCov(fraction=0.5, beta=0.0, **COMMON), GRPO(surrogate=Unclipped(), **COMMON)),
    "kl_cov_clipped": (LOOSE_KL_COV, GRPO(**COMMON)),
    "mask_keeps_all": (HighEntropyMask(fraction=1.0, **COMMON), GRPO(**COMMON)),
    "advantage_without_alpha": (EntropyAdvantage(alpha=0.0, **COMMON), GRPO(**COMMON)),
    "bonus_without_weight": (EntropyBonus(entropy_coef=0.0, **COMMON), GRPO(**COMMON)),
    "adaptive_short": (AdaptiveEntropy(target=9.0, **COMMON), EntropyBonus(entropy_coef=0.3, **COMMON)),
    "adaptive_off": (AdaptiveEntropy(target=1e-9, **COMMON), GRPO(**COMMON)),
    "release_without_betas": (
        SENT(beta_low=0.0, beta_high=0.0, **RELEASE),
        GRPO(surrogate=Unclipped(), aggregation="token_mean", kl_coef=0.5),
    ),
    "release_without_shares": (
        SENT(high_cov_fraction=0.0, **RELEASE),
        GRPO(surrogate=Unclipped(), aggregation="token_mean", kl_coef=0.5),
    ),
    # the top of all tokens by covariance, and nothing at the bottom: KL-Cov
    "release_with_the_top_only": (
        SENT(
            variant="release",
            low_entropy_quantile=1.0,
            high_cov_fraction=0.25,
            beta_low=0.0,
            beta_high=0.5,
            kl_to="old",
        ),
        KLCov(fraction=0.25, beta=0.5, kl_coef=0.001, kl_to="old", aggregation="token_mean"),
    ),
    "high_entropy_kl_holds_none": (HighEntropyKL(low_entropy_quantile=1.0), GRPO()),
}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def same(ours, theirs):
    close(ours.loss, theirs.loss)
    for source, gradient in theirs.gradients.items():
        close(ours.gradients[source], gradient)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)
@FAST
@given(data=st.data())
def test_at_these_settings_one_is_the_other(batches, evaluate, ours, theirs, data):
    batch = data.draw(batches)
    same(evaluate(ours, batch), evaluate(theirs, batch))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
@FAST
@given(data=st.data(), quantile=st.sampled_from([0.2, 0.5, 0.8]), beta=st.sampled_from([0.1, 0.75]))
def test_sent_and_high_entropy_kl_share_out_the_tokens(batches, evaluate, estimator, data, quantile, beta):
    """One holds T_low, the other all the rest: together they are GRPO with the KL on every token."""
    batch = data.draw(batches)
    both = {"low_entropy_quantile": quantile, "beta_low": beta, "beta_high": beta, "kl_estimator": estimator}
    low, rest = evaluate(SENT(**both), batch), evaluate(HighEntropyKL(**both), batch)
    assert torch.equal(low.plan.classes["low"] ^ rest.plan.classes["low"], batch.stats.mask)
    assert not (low.plan.classes["low"] & rest.plan.classes["low"]).any()
    held, free = evaluate(GRPO(kl_coef=beta, kl_estimator=estimator), batch), evaluate(GRPO(), batch)
    close(low.loss + rest.loss, held.loss + free.loss)
    for source, gradient in held.gradients.items():
        close(low.gradients[source] + rest.gradients[source], gradient + free.gradients[source])


def test_high_entropy_kl_on_all_tokens_is_sent_on_all_tokens(make, evaluate):
    batch = make([[-1.0, -2.0]], ref_logp=[[-1.5, -1.0]], advantage=[1.0], entropy=[[0.1, 0.9]])
    settings = {"high_cov_fraction": 0.5, "beta_low": 0.25, "beta_high": 1.5}
    every = HighEntropyKL(low_entropy_quantile=0.0, **settings)
    assert every.needs_reference
    same(evaluate(every, batch), evaluate(SENT(low_entropy_quantile=1.0, **settings), batch))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
@pytest.mark.parametrize("to", ["reference", "old"])
@FAST
@given(data=st.data())
def test_sent_with_one_beta_on_all_tokens_is_grpo_in_every_estimator(batches, evaluate, estimator, to, data):
    if (estimator, to) == ("full", "old"):
        return
    batch, kl = data.draw(batches), {"kl_estimator": estimator, "kl_to": to}
    sent = SENT(low_entropy_quantile=1.0, high_cov_fraction=0.3, beta_low=0.1, beta_high=0.1, **kl)
    same(evaluate(sent, batch), evaluate(GRPO(kl_coef=0.1, **kl), batch))


def on_policy(batch):
    return SimpleNamespace(stats=batch.stats, tokens=replace(batch.tokens, logp=batch.tokens.old_logp))


@pytest.mark.parametrize(
    ("ours", "aggregation"),
    [
        (CISPO(), "token_mean"),
        (GSPO(), "sequence_mean"),
        (KLCov(fraction=0.5, beta=3.0), "sequence_mean"),
        (SENT(variant="release", high_cov_fraction=0.5, release_kl_coef=0.0), "token_mean"),
        (GRPO(kl_coef=3.0, kl_to="old"), "sequence_mean"),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, str) else x,
)
@FAST
@given(data=st.data())
def test_at_the_first_update_the_gradient_is_that_of_grpo(batches, evaluate, ours, aggregation, data):
    batch = on_policy(data.draw(batches))
    close(evaluate(ours, batch).gradient, evaluate(GRPO(aggregation=aggregation), batch).gradient)


def test_off_policy_they_differ(make, evaluate):
    """The same settings, one step on: what was equal at r = 1 is not."""
    batch = make([[-1.0, -2.0], [-1.5, -0.5]], old_logp=[[-1.3, -1.9], [-1.4, -0.3]], advantage=[1.0, -1.0])
    base = {how: evaluate(GRPO(aggregation=how), batch).gradient for how in ("token_mean", "sequence_mean")}
    for ours in (CISPO(), GSPO(), KLCov(fraction=0.5, beta=3.0), GRPO(kl_coef=3.0, kl_to="old")):
        assert not torch.allclose(evaluate(ours, batch).gradient, base[ours.aggregation], atol=1e-3), ours
