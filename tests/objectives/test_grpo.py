import math
from dataclasses import replace

import pytest
import torch

from lightning_rlvr.objectives import GRPO
from lightning_rlvr.types import UserError


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("kl_coef", {"kl_coef": -0.1}),
        ("kl_coef", {"kl_coef": math.nan}),
        ("fixed_length", {"aggregation": "fixed_length"}),
        ("fixed_length", {"fixed_length": 10}),
        ("fixed_length", {"aggregation": "fixed_length", "fixed_length": 0}),
        ("fixed_length", {"aggregation": "fixed_length", "fixed_length": -4}),
    ],
)
def test_bad_settings_are_refused_by_the_name_of_the_key(key, settings):
    with pytest.raises(UserError, match=rf"^{key} must be .*, got .*Set model\.objective\.init_args\.{key}\."):
        GRPO(**settings)


def test_defaults_ask_for_no_reference():
    assert not GRPO().needs_reference
    assert GRPO(kl_coef=1e-3).needs_reference


def test_a_kl_penalty_without_reference_is_refused(make, evaluate):
    batch = make([[-1.0]])
    object.__setattr__(batch.tokens, "ref_logp", None)
    with pytest.raises(ValueError, match="ref_logp"):
        evaluate(GRPO(kl_coef=0.1), batch)


def test_no_kl_metrics_without_kl(make, evaluate):
    got = evaluate(GRPO(), make([[-1.0]], advantage=[1.0]))
    assert set(got.metrics) == {"clip_fraction", "kl/old", "grad_share/policy"}
    assert got.plan.classes == {}


def test_loss_by_hand(make, evaluate):
    # two rows of 2 and 1 tokens; first update of a rollout: r = 1, the loss is -mean A, the gradient -A / (2 |o|)
    batch = make([[-1.0, -2.0], [-0.5, math.nan]], advantage=[1.0, -3.0], mask=[[True, True], [True, False]])
    got = evaluate(GRPO(), batch)
    assert got.loss.item() == pytest.approx(1.0, abs=1e-15)
    assert got.gradient.tolist() == [[-0.25, -0.25], [1.5, 0.0]]


def test_inert_kl_is_reported_as_inert(make, evaluate):
    got = evaluate(GRPO(kl_coef=0.5), make([[-1.0, -2.0]]))
    assert [int(x) for x in got.metrics["grad_share/kl"]] == [0, 2]
    assert not got.gradient.any()


def test_moved_policy_gives_the_share_of_tokens_with_a_kl_pull(make, evaluate):
    batch = make([[-1.0, -2.0, -3.0]], ref_logp=[[-1.5, -2.0, -2.0]], mask=[[True, True, True]])
    got = evaluate(GRPO(kl_coef=0.5), batch)
    assert [int(x) for x in got.metrics["grad_share/kl"]] == [2, 3]


def test_tied_rewards_leave_no_policy_gradient_and_say_so(make, evaluate):
    got = evaluate(GRPO(), make([[-1.0, -2.0]], old_logp=[[-1.5, -1.0]], advantage=[0.0]))
    assert [int(x) for x in got.metrics["grad_share/policy"]] == [0, 2]
    assert [int(x) for x in got.metrics["clip_fraction"]] == [0, 2]


def test_clip_fraction_by_hand(make, evaluate):
    up, down = math.log(1.5), math.log(0.5)
    batch = make(
        [[-1 + up, -1 + down, -1.0], [-1 + up, -1 + down, -1 + down]],
        old_logp=[[-1.0] * 3, [-1.0] * 3],
        advantage=[1.0, -1.0],
        mask=[[True] * 3, [True, True, False]],
    )
    got = evaluate(GRPO(), batch)
    assert [int(x) for x in got.metrics["clip_fraction"]] == [2, 5]  # up with A > 0, down with A < 0
    assert [int(x) for x in got.metrics["grad_share/policy"]] == [3, 5]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_is_logged_as_k3_whatever_gives_the_gradient(make, evaluate, estimator):
    batch = make([[-1.0, -2.0]], ref_logp=[[-1.5, -1.6]])
    numerator, denominator = evaluate(GRPO(kl_coef=0.5, kl_estimator=estimator), batch).metrics["kl/all"]
    expected = sum(math.exp(d) - 1 - d for d in (-0.5, 0.4))
    assert numerator.item() == pytest.approx(expected, abs=1e-14)
    assert int(denominator) == 2
    assert not numerator.requires_grad


def test_kl_to_the_sampling_policy_is_estimated_on_its_own_samples(make, evaluate):
    # KL(old || new) with samples of old: d = logp - old_logp
    batch = make([[-1.0, -2.0]], old_logp=[[-1.3, -1.9]])
    numerator, denominator = evaluate(GRPO(), batch).metrics["kl/old"]
    assert numerator.item() == pytest.approx(sum(math.exp(d) - 1 - d for d in (0.3, -0.1)), abs=1e-14)
    assert int(denominator) == 2


def test_a_batch_without_counted_tokens_gives_zero(make, evaluate):
    got = evaluate(GRPO(kl_coef=0.5), make([[math.nan, -1.0]], mask=[[False, False]]))
    assert got.loss.item() == 0.0
    assert got.gradient.tolist() == [[0.0, 0.0]]


def test_the_plan_keeps_the_width_of_the_statistics(make):
    stats = make([[-1.0]]).stats
    half = replace(stats, logp=stats.logp.float(), entropy=stats.entropy.float(), advantage=stats.advantage.float())
    assert {x.dtype for x in (GRPO().plan(half).weight, GRPO().plan(half).kl_weight)} == {torch.float32}
    assert {x.dtype for x in (GRPO().plan(stats).weight, GRPO().plan(stats).kl_weight)} == {torch.float64}


@pytest.mark.parametrize("advantage", [0.0, 1.0])
def test_an_overflowing_ratio_that_is_clipped_has_gradient_zero_and_not_nan(make, evaluate, advantage):
    got = evaluate(GRPO(), make([[-1.0, -1.0]], old_logp=[[-801.0, -1.0]], advantage=[advantage]))
    assert got.gradient.tolist() == [[0.0, -advantage / 2]]
