"""Every setting of every objective: what is refused names the key; what cannot act says so, as measured."""

import inspect
import math
from dataclasses import fields

import pytest

import lightning_rlvr.objectives as room
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
    Unclipped,
)
from lightning_rlvr.types import Objective, UserError

nan, inf = math.nan, math.inf
KINDS = [x for x in map(vars(room).get, room.__all__) if issubclass(x, Objective)]


def base(kind):
    return {"fixed_length": 8} if kind is DrGRPO else {}


def refused(kind, key, settings):
    with pytest.raises(UserError, match=rf"^{key} must be .*, got .*Set model\.objective\.init_args\.{key}\."):
        # as users run it: without the type checks of pytest, which would refuse an unknown choice first
        inspect.unwrap(kind.__init__)(object.__new__(kind), **{**base(kind), **settings})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("aggregation", {"aggregation": "mean"}),
        ("kl_estimator", {"kl_estimator": "k4"}),
        ("kl_to", {"kl_to": "ref"}),
        ("kl_estimator", {"kl_estimator": "full", "kl_to": "old"}),
        ("fixed_length", {"aggregation": "token_mean", "fixed_length": 8}),
        ("fixed_length", {"aggregation": "fixed_length", "fixed_length": 0}),
    ],
)
def test_shared_settings(kind, key, settings):
    refused(kind, key, settings)


def test_dr_grpo_must_be_given_its_length():
    with pytest.raises(UserError, match="fixed_length"):
        DrGRPO()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "kl_coef" in {f.name for f in fields(kind)}])
@pytest.mark.parametrize("value", [-0.1, nan, inf])
def test_kl_coef(kind, value):
    refused(kind, "kl_coef", {"kl_coef": value})


def test_own_settings_are_refused_by_the_name_of_the_key():
    for kind, key, values in (
        (EntropyBonus, "entropy_coef", (-1e-3, nan, inf)),
        (AdaptiveEntropy, "target", (0.0, -1.0, nan)),
        (AdaptiveEntropy, "step", (0.0, -1.0, nan)),
        (AdaptiveEntropy, "initial", (-1.0, nan, inf)),
        (EntropyAdvantage, "alpha", (-0.1, nan, inf)),
        (EntropyAdvantage, "kappa", (1.0, 0.5, -2.0, nan)),
        (HighEntropyMask, "fraction", (0.0, -0.1, 1.1, nan)),
        (ClipCov, "fraction", (-0.1, 1.1, nan)),
        (ClipCov, "cov_high", (1.0, 0.5, nan)),
        (KLCov, "fraction", (-0.1, 1.1, nan)),
        (KLCov, "beta", (-0.1, nan, inf)),
        *((kind, "low_entropy_quantile", (-0.1, 1.1, nan)) for kind in (SENT, HighEntropyKL)),
        *((kind, "high_cov_fraction", (-0.1, 1.1, nan)) for kind in (SENT, HighEntropyKL)),
        *((kind, "beta_low", (-0.1, nan, inf)) for kind in (SENT, HighEntropyKL)),
        *((kind, "beta_high", (-0.1, 0.01, nan, inf)) for kind in (SENT, HighEntropyKL)),
        *((kind, "release_kl_coef", (-0.1, nan, inf)) for kind in (SENT, HighEntropyKL)),
        *((kind, "covariance_scope", ("low",)) for kind in (SENT, HighEntropyKL)),
        *((kind, "variant", ("released",)) for kind in (SENT, HighEntropyKL)),
    ):
        for value in values:
            refused(kind, key, {key: value})


def test_the_low_end_of_the_band_may_not_lie_above_the_high_one():
    refused(ClipCov, "cov_high", {"cov_low": 6.0})
    with pytest.raises(UserError, match="cov_low"):
        ClipCov(cov_low=nan)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("surrogate", {"surrogate": Clipped(high=0.28)}),
        ("aggregation", {"aggregation": "fixed_length", "fixed_length": 9}),
        ("covariance_scope", {"covariance_scope": "everything"}),
    ],
)
def test_what_the_release_fixes_is_refused_and_not_overruled(key, settings):
    refused(SENT, key, {"variant": "release", **settings})


@pytest.mark.parametrize(
    "settings", [{}, {"surrogate": Unclipped()}, {"aggregation": "token_mean"}, {"covariance_scope": "low_entropy"}]
)
def test_the_release_may_be_told_what_it_is(settings):
    assert SENT(variant="release", **settings) == SENT(variant="release")


@pytest.mark.parametrize("kind", KINDS)
def test_edges_of_what_is_allowed(kind):
    kind(**base(kind))
    for key, value in {
        "fraction": 1.0,
        "kappa": 1.001,
        "low_entropy_quantile": 0.0,
        "high_cov_fraction": 1.0,
        "beta_high": 0.05,
        "beta": 0.0,
        "alpha": 0.0,
        "entropy_coef": 0.0,
        "initial": 0.0,
    }.items():
        if key in {f.name for f in fields(kind)}:
            kind(**base(kind), **{key: value})


# --- what the objective asks of the policy and the reference ---------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "kl_coef" in {f.name for f in fields(kind)}])
def test_reference_and_full_kl_are_asked_for_only_if_read(kind):
    def needs(**settings):
        objective = kind(**base(kind), **settings)
        return objective.needs_reference, objective.needs_full_kl

    assert needs() == (False, False)
    assert needs(kl_estimator="full") == (False, False)
    assert needs(kl_coef=0.1) == (True, False)
    assert needs(kl_coef=0.1, kl_to="old") == (False, False)
    assert needs(kl_coef=0.1, kl_estimator="full") == (True, True)


def test_needs_of_sent():
    assert [SENT().needs_full_kl, SENT(kl_estimator="full").needs_full_kl] == [False, True]
    assert not SENT(kl_to="old").needs_reference
    assert not SENT(kl_estimator="full", beta_low=0.0, beta_high=0.0).needs_full_kl
    assert SENT(variant="release", beta_low=0.0, beta_high=0.0).needs_reference
    assert not SENT(variant="release", release_kl_coef=0.0).needs_reference
    assert not SENT(variant="release", kl_to="old").needs_reference


# --- inert terms -----------------------------------------------------------------------------------

KEY = "model.updates_per_rollout"
CASES = {
    "grpo": (GRPO(), False),
    "grpo_kl": (GRPO(kl_coef=0.5), False),
    "dapo": (DAPO(), False),
    "gspo": (GSPO(), False),
    "cispo": (CISPO(), False),
    "bonus": (EntropyBonus(), False),
    "advantage": (EntropyAdvantage(), False),
    "mask": (HighEntropyMask(), False),
    "clip_cov": (ClipCov(), False),
    "kl_cov": (KLCov(fraction=0.3), True),
    "kl_cov_and_kl": (KLCov(fraction=0.3, kl_coef=0.5), True),
    "release": (SENT(variant="release"), True),
    "sent": (SENT(), False),
    "sent_top_only": (SENT(beta_low=0.0, high_cov_fraction=0.5), False),
    "high_entropy_kl": (HighEntropyKL(low_entropy_quantile=0.5), False),
    "sent_k1_old": (SENT(kl_estimator="k1", kl_to="old"), False),
    "grpo_k3_old": (GRPO(kl_coef=0.5, kl_to="old"), True),
    "grpo_k2_old": (GRPO(kl_coef=0.5, kl_to="old", kl_estimator="k2"), True),
    "sent_k3_old": (SENT(kl_to="old"), True),
    "release_k3_old": (SENT(variant="release", kl_to="old"), True),
}
EVERY = pytest.mark.parametrize("name", CASES)


def pulled(make, evaluate, objective, moved):
    """By penalty, how many tokens it pulls, with the policy at or off the one that sampled."""
    old = [[-1.0, -2.0, -0.4], [-1.5, -0.3, -0.9]]
    logp = [[x + 0.1 * moved * (-1) ** t for t, x in enumerate(row)] for row in old]
    ref = [[x - 0.2 for x in row] for row in old]
    entropy = [[0.1, 0.3, 0.5], [0.2, 0.4, 0.6]]
    batch = make(logp, old, ref, advantage=[1.0, -1.0], entropy=entropy, state={"entropy_coef": 0.1})
    metrics = evaluate(objective, batch).metrics
    return {
        name.removeprefix("grad_share/"): int(share.numerator)
        for name, share in metrics.items()
        if name.startswith("grad_share/") and name != "grad_share/policy"
    }


@EVERY
def test_a_term_is_reported_as_inert_exactly_when_it_pulls_no_token(make, evaluate, name):
    objective, inert = CASES[name]
    at_one, off = (pulled(make, evaluate, objective, moved) for moved in (False, True))
    assert all(off.values()), f"two updates: every term pulls, got {off}"
    assert objective.inert(2) == []
    assert (0 in at_one.values()) == inert, at_one
    messages = objective.inert(1)
    assert bool(messages) == inert
    assert all(KEY in message for message in messages)


@pytest.mark.parametrize("objective", [KLCov(fraction=0.3), SENT(variant="release", high_cov_fraction=0.3)])
def test_drift_has_no_gradient_at_one_and_has_it_off_policy(make, evaluate, objective):
    assert pulled(make, evaluate, objective, moved=False)["drift"] == 0
    assert pulled(make, evaluate, objective, moved=True)["drift"] >= 2
    (message,) = objective.inert(1)
    assert "|log r|" in message
    assert "Set model.updates_per_rollout to 2 or more." in message
    assert [objective.inert(n) for n in (2, 8)] == [[], []]


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_low": 0.0, "beta_high": 0.0},
        {"beta_low": 0.0, "high_cov_fraction": 0.0},
        {"low_entropy_quantile": 0.0},
        {"low_entropy_quantile": 0.0, "kl_estimator": "full"},
    ],
)
@pytest.mark.parametrize("updates", [1, 4])
def test_a_kl_that_reaches_no_token_is_reported_by_its_keys(make, evaluate, settings, updates):
    objective = SENT(**settings)
    assert pulled(make, evaluate, objective, moved=True) == {}
    (message,) = objective.inert(updates)
    for key in ("model.objective.init_args.beta_low", "beta_high", "high_cov_fraction", "low_entropy_quantile"):
        assert key in message


@pytest.mark.parametrize(("quantile", "inert"), [(0.0, False), (1.0, True)])
def test_high_entropy_kl_is_inert_where_its_own_set_is_empty(quantile, inert):
    assert bool(HighEntropyKL(low_entropy_quantile=quantile).inert(2)) == inert


@pytest.mark.parametrize(
    "objective",
    [
        KLCov(fraction=0.0),
        KLCov(beta=0.0),
        *(SENT(variant="release", **{key: 0.0}) for key in ("high_cov_fraction", "low_entropy_quantile")),
    ],
)
def test_a_drift_that_reaches_no_token_is_reported_whatever_the_updates(make, evaluate, objective):
    assert pulled(make, evaluate, objective, moved=True)["drift"] == 0
    assert objective.inert(4)
