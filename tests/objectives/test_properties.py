"""What must hold for every objective, on batches full of ties."""

import itertools
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
    ClippedWeight,
    DrGRPO,
    EntropyAdvantage,
    EntropyBonus,
    HighEntropyKL,
    HighEntropyMask,
    KLCov,
    SequenceClipped,
    Unclipped,
)

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
    "sent_full": SENT(**SENT_SETTINGS, kl_estimator="full", surrogate=Clipped(high=0.28)),
    "sent_old": SENT(**SENT_SETTINGS, kl_to="old"),
    "sent_release": SENT(**SENT_SETTINGS, variant="release", release_kl_coef=0.5),
    "high_entropy_kl": HighEntropyKL(**SENT_SETTINGS, kl_estimator="full"),
    "dr_grpo": DrGRPO(fixed_length=6, kl_coef=0.5, kl_to="old", kl_estimator="k2"),
    "dapo": DAPO(),
    "gspo": GSPO(surrogate=SequenceClipped(low=0.2, high=0.28), kl_coef=0.25),
    "gspo_narrow": GSPO(),
    "cispo": CISPO(),
    "cispo_kl": CISPO(surrogate=ClippedWeight(low=0.4, high=0.3), kl_coef=0.5, aggregation="sequence_mean"),
    "entropy_bonus": EntropyBonus(entropy_coef=0.4, kl_coef=0.1, kl_estimator="full"),
    "adaptive_acts": AdaptiveEntropy(target=2.0),
    "adaptive": AdaptiveEntropy(target=0.7, aggregation="token_mean"),
    "entropy_advantage": EntropyAdvantage(alpha=0.5, kappa=1.5),
    "high_entropy_mask": HighEntropyMask(fraction=0.4, kl_coef=0.5),
    "high_entropy_mask_tokens": HighEntropyMask(fraction=0.3, aggregation="token_mean"),
    "clip_cov": ClipCov(cov_low=0.01, cov_high=0.5, fraction=0.2, kl_coef=0.5),
    "kl_cov": KLCov(fraction=0.3, beta=0.5, aggregation="token_mean"),
}
EVERY = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
TOKEN_VALUES = ("logp", "old_logp", "ref_logp", "entropy", "full_kl")
FAST = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])


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
    for source, expected in whole.gradients.items():
        gradient = torch.zeros_like(expected)
        for piece, part in zip(pieces, parts, strict=True):
            gradient[piece] = part.gradients[source]
        close(gradient, expected)
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
    for source, gradient in before.gradients.items():
        close(after.gradients[source], torch.nn.functional.pad(gradient, (0, columns)))
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
    spoilt = SimpleNamespace(stats=stats, tokens=spoil(batch.tokens, *TOKEN_VALUES))
    clean, got = evaluate(objective, batch), evaluate(objective, spoilt)
    same_plan(got.plan, clean.plan)
    assert torch.equal(got.loss, clean.loss)
    for source, gradient in clean.gradients.items():
        assert torch.equal(got.gradients[source], gradient), source
        assert (got.gradients[source][hole] == 0).all(), source
    for name, ratio in clean.metrics.items():
        assert torch.equal(got.metrics[name].numerator, ratio.numerator), name


@EVERY
@FAST
@given(data=st.data())
def test_uncounted_positions_of_a_plan_hold_zero_and_false(batches, objective, data):
    stats = data.draw(batches).stats
    plan = objective.plan(stats)
    weights = (plan.advantage, plan.weight, plan.kl_weight, plan.drift_weight, plan.entropy_weight)
    for tensor in (*weights, plan.policy_mask, *plan.classes.values()):
        assert tensor is None or not tensor[~stats.mask].any()


@EVERY
@FAST
@given(data=st.data())
def test_denominators_count_over_one_update_only(batches, rows, objective, data):
    stats = data.draw(batches).stats
    plan = objective.plan(stats)
    kept = replace(stats, mask=plan.policy_mask)
    for update in stats.update.unique():
        mine = stats.update == update
        alone = GRPO(aggregation=objective.aggregation, fixed_length=objective.fixed_length).plan(rows(kept, mine))
        assert torch.equal(plan.weight[mine], alone.weight)
    if not isinstance(objective, HighEntropyMask):
        assert torch.equal(plan.policy_mask, stats.mask)


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
    tokens, plan = batch.tokens, got.plan
    kept = plan.classes.get("kept", tokens.mask) & tokens.mask
    dropped = plan.classes.get("dropped", torch.zeros_like(tokens.mask))
    a = batch.stats.token_advantage().masked_fill(dropped, 0.0)
    clipped, cut = clipped_by_definition(objective.surrogate, tokens, a)
    target = tokens.ref_logp if objective.kl_to == "reference" else tokens.old_logp
    pulled = kept & (plan.kl_weight != 0)
    if objective.kl_estimator in ("k2", "k3"):  # at their minimum where the policies agree
        pulled &= tokens.logp != target
    expected = {"clip_fraction": clipped & kept, "grad_share/policy": (a != 0) & ~cut & kept}
    if objective.uses_kl:
        expected["grad_share/kl"] = pulled
    if plan.drift_weight is not None:
        expected["grad_share/drift"] = (plan.drift_weight != 0) & (tokens.logp != tokens.old_logp)
    if plan.entropy_weight is not None:
        expected["grad_share/entropy"] = plan.entropy_weight != 0
    count = int(tokens.mask.sum())
    for name, chosen in expected.items():
        ratio = got.metrics[name]
        assert (int(ratio.numerator), int(ratio.denominator)) == (int(chosen.sum()), count), name
    shares = {name for name in got.metrics if name.startswith("grad_share/")}
    assert shares == {name for name in expected if name.startswith("grad_share/")}


def clipped_by_definition(surrogate, tokens, a):
    """Which tokens count as clipped, and which of them have lost their gradient."""
    none = torch.zeros_like(tokens.mask)
    log_ratio = torch.where(tokens.mask, tokens.logp - tokens.old_logp, 0.0)
    if isinstance(surrogate, Unclipped):
        return none, none
    if isinstance(surrogate, ClippedWeight):
        ratio = log_ratio.exp()
        return (ratio > 1 + surrogate.high) | (ratio < 1 - surrogate.low), none
    if isinstance(surrogate, SequenceClipped):
        log_ratio = (log_ratio.sum(dim=1) / tokens.mask.sum(dim=1).clamp(min=1))[:, None].expand(a.shape)
    ratio = log_ratio.exp()
    clipped = ((a > 0) & (ratio > 1 + surrogate.high)) | ((a < 0) & (ratio < 1 - surrogate.low))
    return clipped, clipped


@EVERY
@FAST
@given(data=st.data())
def test_kl_is_logged_for_each_class_of_the_plan_and_only_with_a_kl(batches, evaluate, objective, data):
    batch = data.draw(batches)
    got = evaluate(objective, batch)
    logged = {name.removeprefix("kl/") for name in got.metrics if name.startswith("kl/")}
    assert logged == ({"old", "all", *got.plan.classes} if objective.uses_kl else {"old"})
    for name, chosen in got.plan.classes.items():
        assert not (chosen & ~batch.stats.mask).any()
        if objective.uses_kl:
            assert int(got.metrics[f"kl/{name}"].denominator) == int(chosen.sum())


@EVERY
@FAST
@given(data=st.data())
def test_loss_reads_only_what_the_objective_says_it_needs(batches, evaluate, objective, data):
    batch = data.draw(batches)
    unread = {"entropy": objective.needs_entropy, "full_kl": objective.needs_full_kl}
    unread["ref_logp"] = objective.needs_reference
    bare = replace(batch.tokens, **{name: None for name, needed in unread.items() if not needed})
    full, got = evaluate(objective, batch), evaluate(objective, SimpleNamespace(stats=batch.stats, tokens=bare))
    assert torch.equal(got.loss, full.loss)
    assert torch.equal(got.gradient, full.gradient)
    for name, needed in unread.items():
        if needed:
            with pytest.raises(ValueError, match=name):
                evaluate(objective, SimpleNamespace(stats=batch.stats, tokens=replace(batch.tokens, **{name: None})))


def test_every_public_objective_is_tested_here():
    import lightning_rlvr.objectives as room

    public = {getattr(room, name) for name in room.__all__}
    objectives = {x for x in public if issubclass(x, GRPO | SENT)}
    assert objectives == {type(objective) for objective in OBJECTIVES.values()}
