"""Objectives that read entropy: the state of the adaptive bonus, and plans by hand."""

from dataclasses import replace

import pytest
import torch

from lightning_rlvr.objectives import GRPO, AdaptiveEntropy, EntropyAdvantage, EntropyBonus, HighEntropyMask

ENTROPY = [[0.2, 0.4], [0.6, 99.0]]
MASK = [[True, True], [True, False]]  # mean entropy 0.4


def stats_of(make, coef=None):
    state = None if coef is None else {"entropy_coef": coef}
    return make([[-1.0, -2.0], [-0.5, -0.1]], advantage=[1.0, -1.0], entropy=ENTROPY, mask=MASK, state=state).stats


def test_others_carry_no_state(make):
    assert GRPO().initial_state() == {}
    assert EntropyBonus().initial_state() == {}
    assert GRPO().next_state({"other": 1.0}, stats_of(make)) == {"other": 1.0}


@pytest.mark.parametrize(
    ("target", "before", "after"),
    [
        (0.5, 0.1, 0.125),  # entropy short: up
        (0.3, 0.1, 0.075),  # more than enough: down
        (0.3, 0.01, 0.0),  # never below 0
        (0.3, 0.0, 0.0),
        (0.5, 0.0, 0.025),
    ],
)
def test_the_coefficient_moves_by_one_step_towards_the_target(make, target, before, after):
    objective = AdaptiveEntropy(target=target, step=0.025)
    assert objective.next_state({"entropy_coef": before}, stats_of(make))["entropy_coef"] == pytest.approx(
        after, abs=1e-15
    )


def test_entropy_at_the_target_lowers_the_coefficient_and_leaves_the_bonus_on(make):
    stats = make([[-1.0, -2.0]], entropy=[[0.25, 0.75]], state={"entropy_coef": 0.1}).stats
    objective = AdaptiveEntropy(target=0.5, step=0.025)
    assert objective.next_state(stats.state, stats)["entropy_coef"] == pytest.approx(0.075, abs=1e-15)
    assert objective.plan(stats).entropy_weight.max() == 0.1


def test_next_state_leaves_the_old_state_alone_and_reads_no_other(make):
    state, stats = {"entropy_coef": 0.1}, stats_of(make, coef=7.0)
    AdaptiveEntropy(target=0.5, step=0.025).next_state(state, stats)
    assert state == {"entropy_coef": 0.1}
    assert stats.state == {"entropy_coef": 7.0}


def test_a_run_climbs_while_short_and_falls_when_not(make):
    objective = AdaptiveEntropy(target=0.5, step=0.25, initial=0.5)
    short = stats_of(make)
    plenty = replace(short, entropy=short.entropy + 1.0)
    state, path = objective.initial_state(), []
    for stats in (short, short, plenty, plenty, plenty, plenty, plenty, short):
        state = objective.next_state(state, stats)
        path.append(state["entropy_coef"])
    assert path == [0.75, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.25]


@pytest.mark.parametrize(("target", "weight"), [(0.5, 0.7), (0.3, 0.0)])
def test_the_plan_uses_the_state_and_acts_below_the_target_only(make, evaluate, target, weight):
    stats = stats_of(make, coef=0.7)
    objective = AdaptiveEntropy(target=target, initial=0.1)
    assert objective.plan(stats).entropy_weight.tolist() == [[weight, weight], [weight, 0.0]]


@pytest.mark.parametrize(("target", "acting"), [(0.5, 3), (0.3, 0)])
def test_grad_share_says_when_the_adaptive_bonus_is_off(make, evaluate, target, acting):
    batch = make([[-1.0, -2.0], [-0.5, -0.1]], entropy=ENTROPY, mask=MASK, state={"entropy_coef": 0.5})
    got = evaluate(AdaptiveEntropy(target=target), batch)
    assert [int(x) for x in got.metrics["grad_share/entropy"]] == [acting, 3]
    row = [-0.5 / 4, -0.5 / 4], [-0.5 / 2, 0.0]
    assert got.gradients["entropy"].tolist() == (list(row) if acting else [[0.0, 0.0], [0.0, 0.0]])


def test_a_batch_without_tokens_moves_the_coefficient_down_and_plans_nothing(make):
    stats = replace(stats_of(make, coef=0.1), mask=stats_of(make).mask & False)
    objective = AdaptiveEntropy(target=0.5, step=0.025)
    assert 0 <= objective.next_state(stats.state, stats)["entropy_coef"] <= 0.1
    assert not objective.plan(stats).entropy_weight.any()


def test_the_mean_is_summed_in_canonical_order(make, rows):
    """At a target equal to the mean, one rounding decides whether the bonus acts: no order of rows may change it."""
    g = torch.Generator().manual_seed(0)
    entropy = torch.rand(40, 3, generator=g, dtype=torch.float64) * torch.logspace(-6, 1, 40)[:, None].double()
    stats = make(entropy.neg().tolist(), entropy=entropy.tolist(), state={"entropy_coef": 0.5}).stats
    objective = AdaptiveEntropy(target=float(entropy.flatten().mean()))
    orders = [torch.randperm(40, generator=g) for _ in range(20)]
    assert any(float(entropy[order].flatten().mean()) > objective.target for order in orders)
    for order in orders:
        assert objective.plan(rows(stats, order)).entropy_weight.all()


def test_needs(make):
    assert AdaptiveEntropy().needs_entropy
    assert EntropyBonus().needs_entropy
    assert not EntropyBonus(entropy_coef=0.0).needs_entropy
    assert EntropyBonus(entropy_coef=0.0).plan(stats_of(make)).entropy_weight is None
    assert not any(kind().needs_entropy for kind in (GRPO, EntropyAdvantage, HighEntropyMask))


def test_entropy_bonus_by_hand(make, evaluate):
    batch = make([[-1.0, -2.0], [-0.5, -0.1]], entropy=ENTROPY, mask=MASK)
    got = evaluate(EntropyBonus(entropy_coef=0.5), batch)
    assert got.loss.item() == pytest.approx(-0.5 * (0.3 + 0.6) / 2, abs=1e-15)
    assert got.gradients["entropy"].tolist() == [[-0.125, -0.125], [-0.25, 0.0]]
    assert [int(x) for x in got.metrics["grad_share/entropy"]] == [3, 3]


def test_entropy_advantage_by_hand(make):
    plan = EntropyAdvantage(alpha=0.5, kappa=4.0).plan(stats_of(make))
    # |A| / kappa = 0.25 bounds 0.3 in the second row
    assert plan.advantage.tolist() == [[pytest.approx(1.1), pytest.approx(1.2)], [pytest.approx(-0.75), 0.0]]


@pytest.mark.parametrize("advantage", [[1e-9, -1e-9], [0.0, 0.0], [3.0, -2.0]])
def test_entropy_advantage_never_turns_a_sign(make, advantage):
    stats = make([[-1.0, -2.0]] * 2, advantage=advantage, entropy=[[50.0, 0.0]] * 2).stats
    plan = EntropyAdvantage(alpha=9.0, kappa=1.01).plan(stats)
    assert (plan.advantage.sign() == stats.token_advantage().sign()).all()
    assert (plan.advantage >= stats.token_advantage()).all()


def test_mask_keeps_the_highest_entropies_and_counts_only_them(make):
    plan = HighEntropyMask(fraction=0.5).plan(stats_of(make))
    assert plan.policy_mask.tolist() == [[False, True], [True, False]]
    assert plan.classes["kept"].tolist() == plan.policy_mask.tolist()
    assert plan.weight.tolist() == [[0.0, 0.5], [0.5, 0.0]]


@pytest.mark.parametrize(
    ("objective", "old_logp", "ref_logp"),
    [
        (HighEntropyMask(fraction=0.5), [[-1.0, -801.0]], None),  # A < 0, r = inf: not clipped
        (HighEntropyMask(fraction=0.5, kl_coef=0.1), [[-1.0, -1.0]], [[-1.0, 800.0]]),  # exp(d) = inf
    ],
    ids=["ratio", "kl"],
)
def test_tokens_that_are_masked_out_cannot_spoil_the_gradient(make, evaluate, objective, old_logp, ref_logp):
    batch = make([[-1.0, -1.0]], old_logp, ref_logp, advantage=[-1.0], entropy=[[0.9, 0.1]])
    got = evaluate(objective, batch)
    assert got.loss.isfinite()
    assert got.gradient.isfinite().all()
