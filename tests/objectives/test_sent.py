import math

import pytest

from lightning_rlvr.objectives import SENT
from lightning_rlvr.types import UserError


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("low_entropy_quantile", {"low_entropy_quantile": -0.1}),
        ("low_entropy_quantile", {"low_entropy_quantile": 1.1}),
        ("low_entropy_quantile", {"low_entropy_quantile": math.nan}),
        ("high_cov_fraction", {"high_cov_fraction": 2.0}),
        ("beta_low", {"beta_low": -0.1}),
        ("beta_high", {"beta_low": 0.3, "beta_high": 0.2}),
        ("beta_high", {"beta_high": math.nan}),
        ("fixed_length", {"fixed_length": 3}),
    ],
)
def test_bad_settings_are_refused_by_the_name_of_the_key(key, settings):
    with pytest.raises(UserError, match=rf"^{key} must be .*, got .*Set model\.objective\.init_args\.{key}\."):
        SENT(**settings)


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({}, True),
        ({"beta_low": 0.0}, True),
        ({"beta_low": 0.0, "beta_high": 0.0}, False),
        ({"low_entropy_quantile": 0.0}, False),
        ({"high_cov_fraction": 0.0}, True),
    ],
)
def test_reference_is_needed_only_if_a_token_can_get_a_kl_weight(settings, needed):
    assert SENT(**settings).needs_reference is needed


def four_tokens(make, **values):
    """Entropies 0.1 < 0.2 < 0.3 < 0.9; means -2 and 0 of logp and advantage; covariances 1, -1, 1, -1."""
    return make(
        [[-1.0, -3.0], [-3.0, -1.0]],
        advantage=[1.0, -1.0],
        entropy=[[0.1, 0.2], [0.3, 0.9]],
        ref_logp=[[-1.5, -2.5], [-3.5, -1.5]],
        **values,
    )


def test_plan_by_hand(make):
    plan = SENT(low_entropy_quantile=0.75, high_cov_fraction=0.3, beta_low=0.25, beta_high=0.5).plan(
        four_tokens(make).stats
    )
    # T_low holds 3 tokens; ceil(0.3 * 3) = 1 of them is T_high: the first of two with covariance 1
    assert plan.classes["low"].tolist() == [[True, True], [True, False]]
    assert plan.classes["high"].tolist() == [[True, False], [False, False]]
    assert plan.kl_weight.tolist() == [[0.5, 0.25], [0.25, 0.0]]
    assert plan.weight.tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert plan.policy_mask.tolist() == [[True, True], [True, True]]


def test_row_id_settles_ties_and_not_the_place(make):
    stats = four_tokens(make).stats
    stats.row_id.copy_(stats.row_id.flip(0))
    plan = SENT(low_entropy_quantile=0.75, high_cov_fraction=0.3).plan(stats)
    assert plan.classes["high"].tolist() == [[False, False], [True, False]]


def test_the_scope_of_the_means_changes_the_choice(make):
    # over all tokens: means -4 and 0.5 put the first row on top; over T_low: means -1.5 and 0 tie by sign
    batch = make(
        [[-1.0, -2.0, -9.0], [-1.0, -2.0, -9.0]],
        advantage=[2.0, -1.0],
        entropy=[[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]],
    )
    chosen = [
        SENT(low_entropy_quantile=0.6, high_cov_fraction=0.5, covariance_scope=scope).plan(batch.stats).classes["high"]
        for scope in ("all", "low_entropy")
    ]
    assert chosen[0].tolist() == [[True, True, False], [False, False, False]]
    assert chosen[1].tolist() == [[True, False, False], [False, True, False]]


def test_nan_among_counted_statistics_is_refused(make):
    batch = make([[-1.0, -1.0]], entropy=[[0.1, math.nan]])
    with pytest.raises(ValueError, match="nan"):
        SENT().plan(batch.stats)


def test_kl_is_logged_for_each_class(make, evaluate):
    objective = SENT(low_entropy_quantile=0.75, high_cov_fraction=0.3, beta_low=0.25, beta_high=0.5)
    metrics = evaluate(objective, four_tokens(make)).metrics
    k3 = [math.exp(d) - 1 - d for d in (-0.5, 0.5)]
    expected = {"all": (3 * k3[0] + k3[1], 4), "low": (2 * k3[0] + k3[1], 3), "high": (k3[0], 1)}
    for name, (value, count) in expected.items():
        assert metrics[f"kl/{name}"].numerator.item() == pytest.approx(value, abs=1e-14)
        assert int(metrics[f"kl/{name}"].denominator) == count
    assert [int(x) for x in metrics["grad_share/kl"]] == [3, 4]


def test_gradient_of_the_penalty_by_hand(make, evaluate):
    objective = SENT(low_entropy_quantile=0.75, high_cov_fraction=0.3, beta_low=0.25, beta_high=0.5, kl_estimator="k2")
    got = evaluate(objective, four_tokens(make))
    # weight 1/4 on every token; policy -A; k2 pulls by -d = (0.5, -0.5; 0.5)
    expected = [[-1 + 0.5 * 0.5, -1 - 0.25 * 0.5], [1 + 0.25 * 0.5, 1.0]]
    assert got.gradient.tolist() == [[pytest.approx(x / 4, abs=1e-15) for x in row] for row in expected]


def test_inert_kl_is_reported_as_inert(make, evaluate):
    got = evaluate(SENT(), make([[-1.0, -2.0]], advantage=[1.0]))
    assert [int(x) for x in got.metrics["grad_share/kl"]] == [0, 2]
    assert [int(x) for x in got.metrics["grad_share/policy"]] == [2, 2]


def test_a_batch_without_counted_tokens_gives_zero(make, evaluate):
    got = evaluate(SENT(), make([[math.nan, -1.0]], mask=[[False, False]]))
    assert got.loss.item() == 0.0
    assert got.gradient.tolist() == [[0.0, 0.0]]


def test_a_far_reference_leaves_tokens_outside_the_low_entropy_set_alone(make, evaluate):
    # KL_t of the second token overflows to inf, but its weight is 0: 0 * inf must not become nan
    batch = make([[-1.0, -801.0]], ref_logp=[[-1.5, -1.0]], entropy=[[0.1, 0.9]], advantage=[1.0])
    got = evaluate(SENT(low_entropy_quantile=0.5), batch)
    assert got.loss.isfinite()
    assert got.gradient.isfinite().all()
