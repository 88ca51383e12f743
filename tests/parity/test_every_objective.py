"""Every objective against loops written from the formulas: values, and gradients through logits, to 1e-10.

The loops run on dual numbers in plain Python, a value with its slopes in the logits, so that each formula is written
once and its gradient follows. Statistics, selections and draws are made by loops too.
"""

import functools
import math
import random
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from lightning_rlvr.objectives import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    SENT,
    AdaptiveEntropy,
    ClipCov,
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
from lightning_rlvr.ops.kl import kl_full
from lightning_rlvr.ops.logprob import entropy as entropy_op
from lightning_rlvr.types import TokenBatch, TokenStats

# --- dual numbers ----------------------------------------------------------------------------------


class Dual:
    """A number and its slopes: {leaf: derivative}."""

    def __init__(self, value, slopes=None):
        self.value, self.slopes = float(value), slopes or {}

    def chain(self, value, *factors):
        slopes = {}
        for other, factor in factors:
            for leaf, slope in other.slopes.items():
                slopes[leaf] = slopes.get(leaf, 0.0) + factor * slope
        return Dual(value, slopes)

    def __add__(self, other):
        other = dual(other)
        return self.chain(self.value + other.value, (self, 1.0), (other, 1.0))

    def __mul__(self, other):
        other = dual(other)
        return self.chain(self.value * other.value, (self, other.value), (other, self.value))

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self):
        return self * -1.0

    def __sub__(self, other):
        return self + -dual(other)

    def __truediv__(self, number):
        return self * (1.0 / number)

    def __abs__(self):
        return self if self.value > 0 else -self

    def exp(self):
        return self.chain(math.exp(self.value), (self, math.exp(self.value)))

    def log(self):
        return self.chain(math.log(self.value), (self, 1 / self.value))


def dual(x):
    return x if isinstance(x, Dual) else Dual(x)


def smaller(a, b):
    return a if a.value <= b.value else b


def clip(x, low, high):
    return x if low <= x.value <= high else Dual(min(max(x.value, low), high))


def total(terms):
    slopes, values = {}, []
    for term in map(dual, terms):
        values.append(term.value)
        for leaf, slope in term.slopes.items():
            slopes[leaf] = slopes.get(leaf, 0.0) + slope
    return Dual(math.fsum(values), slopes)


def log_softmax(logits):
    log_z = total(z.exp() for z in logits).log()
    return [z - log_z for z in logits]


def test_duals_know_their_slopes():
    x, y = Dual(1.5, {"x": 1.0}), Dual(-0.5, {"y": 1.0})
    got = (x * y - abs(y)).exp() + x.log() / 2 - clip(x, 0, 1)
    value = math.exp(1.5 * -0.5 - 0.5)
    assert got.value == pytest.approx(value + math.log(1.5) / 2 - 1)
    assert got.slopes["x"] == pytest.approx(value * -0.5 + 1 / 3)
    assert got.slopes["y"] == pytest.approx(value * (1.5 + 1))


# --- the batch -------------------------------------------------------------------------------------

ROWS, WIDTH, VOCABULARY, UPDATES = 7, 4, 4, 2
NAN = float("nan")


@functools.cache
def random_batch(seed):
    """Ragged rows (one empty) of few distinct distributions: ties in entropy and covariance; nan where masked."""
    rng = random.Random(seed)
    lengths = [0, *(rng.randint(1, WIDTH) for _ in range(ROWS - 1))]
    rng.shuffle(lengths)
    mask = [[t < length for t in range(WIDTH)] for length in lengths]
    patterns = [[rng.gauss(0, 1.5) for _ in range(VOCABULARY)] for _ in range(3)]

    def grid(draw):
        return [[draw(i, t) for t in range(WIDTH)] for i in range(ROWS)]

    old_logits = grid(lambda i, t: rng.choice(patterns))
    logits = grid(lambda i, t: [z + rng.gauss(0, 0.4) for z in old_logits[i][t]])
    ref_logits = grid(lambda i, t: [z + rng.gauss(0, 0.8) for z in old_logits[i][t]])
    ids = grid(lambda i, t: rng.randrange(2))
    b = SimpleNamespace(
        mask=mask,
        advantage=[rng.choice([0.0, -1.3, rng.gauss(0, 2), rng.gauss(0, 2)]) for _ in range(ROWS)],
        row_id=[rng.randrange(-(2**63), 2**63) for _ in range(ROWS)],
        update=[rng.randrange(UPDATES) * 3 for _ in range(ROWS)],
        tokens=[(i, t) for i in range(ROWS) for t in range(WIDTH) if mask[i][t]],
        old_entropy=grid(lambda i, t: rng.choice([0.0, 0.25, 0.6, 1.1])),
        state={"entropy_coef": 0.3},
        logits=logits,
    )

    def chosen(table, i, t):
        return log_softmax([Dual(z) for z in table[i][t]])[ids[i][t]].value

    b.old_logp = grid(lambda i, t: chosen(old_logits, i, t))
    b.ref_logp = grid(lambda i, t: chosen(ref_logits, i, t))
    leaves = grid(lambda i, t: [Dual(z, {(i, t, v): 1.0}) for v, z in enumerate(logits[i][t])])
    now = grid(lambda i, t: log_softmax(leaves[i][t]))
    ref = grid(lambda i, t: [x.value for x in log_softmax([Dual(z) for z in ref_logits[i][t]])])
    b.logp = grid(lambda i, t: now[i][t][ids[i][t]])
    b.entropy = grid(lambda i, t: -total(x.exp() * x for x in now[i][t]))
    b.full_kl = grid(lambda i, t: total(x.exp() * (x - y) for x, y in zip(now[i][t], ref[i][t], strict=True)))

    counts = torch.tensor(mask)
    b.leaf = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    logp = b.leaf.log_softmax(dim=-1)

    def where(values):
        values = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.float64)
        return values.masked_fill(~counts, NAN)

    b.stats = TokenStats(
        logp=where(b.old_logp),
        entropy=where(b.old_entropy),
        advantage=torch.tensor(b.advantage, dtype=torch.float64),
        mask=counts,
        row_id=torch.tensor(b.row_id),
        update=torch.tensor(b.update),
        state=b.state,
    )
    b.batch = TokenBatch(
        logp=where(logp.gather(-1, torch.tensor(ids)[..., None]).squeeze(-1)),
        old_logp=where(b.old_logp),
        mask=counts,
        ref_logp=where(b.ref_logp),
        entropy=where(entropy_op(logp)),
        full_kl=where(kl_full(logp, torch.tensor(ref_logits, dtype=torch.float64).log_softmax(dim=-1))),
    )
    return b


SEEDS = pytest.mark.parametrize("seed", range(3))
HOW = {"sequence_mean": {}, "token_mean": {}, "fixed_length": {"fixed_length": 9}}
AGGREGATIONS = pytest.mark.parametrize("how", HOW)


def aggregate(b, loss, how, kept=None):
    """Sum the losses of all updates, each aggregated over its own tokens."""
    steps = []
    for update in set(b.update):
        rows = [i for i in range(ROWS) if b.update[i] == update]
        tokens = {i: [(j, t) for j, t in (b.tokens if kept is None else kept) if j == i] for i in rows}
        sums = [total(loss[token] for token in tokens[i]) for i in rows]
        if how == "sequence_mean":
            means = [s / len(tokens[i]) for i, s in zip(rows, sums, strict=True) if tokens[i]]
            steps.append(total(means) / len(rows))
        elif how == "token_mean":
            steps.append(total(sums) / max(1, sum(map(len, tokens.values()))))
        else:
            steps.append(total(sums) / (len(rows) * 9))
    return total(steps)


def agrees(b, objective, expected):
    loss = objective.loss(b.batch, objective.plan(b.stats)).loss
    (gradient,) = torch.autograd.grad(loss, b.leaf, retain_graph=True)
    slopes = torch.zeros_like(gradient)
    for leaf, slope in expected.slopes.items():
        slopes[leaf] = slope
    assert loss.item() == pytest.approx(expected.value, abs=1e-10, rel=0)
    torch.testing.assert_close(gradient, slopes, rtol=0, atol=1e-10)


# --- parts of the formulas -------------------------------------------------------------------------


def ratio(b, i, t):
    return (b.logp[i][t] - b.old_logp[i][t]).exp()


def ppo(r, a, low=0.2, high=0.2):
    """-min(r A, clip(r) A)"""
    return -smaller(r * a, clip(r, 1 - low, 1 + high) * a)


def grpo(b, low=0.2, high=0.2):
    return {(i, t): ppo(ratio(b, i, t), b.advantage[i], low, high) for i, t in b.tokens}


def unclipped(b):
    return {(i, t): -(ratio(b, i, t) * b.advantage[i]) for i, t in b.tokens}


def gspo(b, low, high):
    """Every token carries the term of its response."""
    loss = {}
    for i in range(ROWS):
        mine = [t for j, t in b.tokens if j == i]
        if mine:
            s = (total(b.logp[i][t] - b.old_logp[i][t] for t in mine) / len(mine)).exp()
            loss |= {(i, t): ppo(s, b.advantage[i], low, high) for t in mine}
    return loss


def cispo(b, low, high):
    loss = {}
    for i, t in b.tokens:
        weight = min(max(ratio(b, i, t).value, 1 - low), 1 + high)
        loss[i, t] = -(b.logp[i][t] * (weight * b.advantage[i]))
    return loss


def kl(b, i, t, estimator, to="reference"):
    if estimator == "full":
        return b.full_kl[i][t]
    d = Dual({"reference": b.ref_logp, "old": b.old_logp}[to][i][t]) - b.logp[i][t]
    return {"k1": lambda: -d, "k2": lambda: d * d / 2, "k3": lambda: d.exp() - 1 - d}[estimator]()


def with_kl(b, loss, beta, estimator="k3", to="reference"):
    return {token: term + beta.get(token, 0.0) * kl(b, *token, estimator, to) for token, term in loss.items()}


def ceiling(share, count):
    return math.ceil(Fraction(str(share)) * count)


def first(b, tokens, key, count):
    """The `count` tokens of smallest key; ties go by row id, then position."""
    return sorted(tokens, key=lambda it: (key(*it), b.row_id[it[0]], it[1]))[:count]


def covariance(b, scope=None):
    scope = b.tokens if scope is None else scope
    n = max(1, len(scope))
    mean_logp = math.fsum(b.old_logp[i][t] for i, t in scope) / n
    mean_advantage = math.fsum(b.advantage[i] for i, _ in scope) / n
    return lambda i, t: (b.old_logp[i][t] - mean_logp) * (b.advantage[i] - mean_advantage)


def by_covariance(b, tokens, count, scope=None):
    cov = covariance(b, scope)
    return first(b, tokens, lambda i, t: -cov(i, t), count)


def by_entropy(b, count):
    return first(b, b.tokens, lambda i, t: b.old_entropy[i][t], count)


# --- one loss for all tokens -----------------------------------------------------------------------

SIMPLE = {
    "grpo": (GRPO, {}, grpo),
    "dr_grpo": (DrGRPO, {}, grpo),
    "dapo": (DAPO, {}, lambda b: grpo(b, 0.2, 0.28)),
    "gspo": (GSPO, {}, lambda b: gspo(b, 3e-4, 4e-4)),
    "gspo_wide": (GSPO, {"surrogate": SequenceClipped(0.1, 0.3)}, lambda b: gspo(b, 0.1, 0.3)),
    "cispo": (CISPO, {}, lambda b: cispo(b, 1.0, 0.28)),
    "cispo_low": (CISPO, {"surrogate": ClippedWeight(0.15, 0.1)}, lambda b: cispo(b, 0.15, 0.1)),
    "unclipped": (GRPO, {"surrogate": Unclipped()}, unclipped),
}


@SEEDS
@AGGREGATIONS
@pytest.mark.parametrize("name", SIMPLE)
def test_surrogates(seed, how, name):
    b = random_batch(seed)
    kind, extra, loop = SIMPLE[name]
    agrees(b, kind(aggregation=how, **HOW[how], **extra), aggregate(b, loop(b), how))


def test_each_has_the_aggregation_of_its_paper():
    assert {kind: kind().aggregation for kind in (GRPO, GSPO, DAPO, CISPO, SENT)} == {
        GRPO: "sequence_mean",
        GSPO: "sequence_mean",
        DAPO: "token_mean",
        CISPO: "token_mean",
        SENT: "sequence_mean",
    }
    assert DrGRPO(fixed_length=3).aggregation == "fixed_length"
    assert [DrGRPO(fixed_length=3).scale_by_std, GRPO().scale_by_std] == [False, True]


# --- KL --------------------------------------------------------------------------------------------

KLS = pytest.mark.parametrize(
    ("estimator", "to"),
    [*((e, to) for to in ("reference", "old") for e in ("k1", "k2", "k3")), ("full", "reference")],
)


@SEEDS
@AGGREGATIONS
@KLS
@pytest.mark.parametrize("name", ["grpo", "gspo_wide", "cispo", "unclipped"])
def test_kl_on_every_token(seed, how, name, estimator, to):
    b = random_batch(seed)
    kind, extra, loop = SIMPLE[name]
    objective = kind(aggregation=how, **HOW[how], **extra, kl_coef=0.35, kl_estimator=estimator, kl_to=to)
    loss = with_kl(b, loop(b), dict.fromkeys(b.tokens, 0.35), estimator, to)
    agrees(b, objective, aggregate(b, loss, how))


SHARES = pytest.mark.parametrize(("low_share", "high_share"), [(0.8, 0.0002), (0.6, 0.3), (0.4, 1.0), (1.0, 0.2)])


def sent_beta(b, chosen, high_share, scope, beta_low=0.05, beta_high=0.2):
    count = ceiling(high_share, len(chosen))
    high = by_covariance(b, chosen, count, chosen if scope == "low_entropy" else None)
    return {token: beta_high if token in high else beta_low for token in chosen}


@SEEDS
@AGGREGATIONS
@KLS
def test_sent_and_high_entropy_kl_in_every_estimator(seed, how, estimator, to):
    b = random_batch(seed)
    common = {"aggregation": how, **HOW[how], "kl_estimator": estimator, "kl_to": to}
    low = by_entropy(b, ceiling(0.6, len(b.tokens)))
    rest = [token for token in b.tokens if token not in low]
    for kind, chosen in ((SENT, low), (HighEntropyKL, rest)):
        objective = kind(low_entropy_quantile=0.6, high_cov_fraction=0.3, **common)
        loss = with_kl(b, grpo(b), sent_beta(b, chosen, 0.3, "all"), estimator, to)
        agrees(b, objective, aggregate(b, loss, how))


@SEEDS
@SHARES
@pytest.mark.parametrize("scope", ["all", "low_entropy"])
def test_high_entropy_kl(seed, low_share, high_share, scope):
    b = random_batch(seed)
    low = by_entropy(b, ceiling(low_share, len(b.tokens)))
    chosen = [token for token in b.tokens if token not in low]
    objective = HighEntropyKL(
        low_entropy_quantile=low_share,
        high_cov_fraction=high_share,
        covariance_scope=scope,
        beta_low=0.1,
        beta_high=0.7,
    )
    loss = with_kl(b, grpo(b), sent_beta(b, chosen, high_share, scope, 0.1, 0.7))
    agrees(b, objective, aggregate(b, loss, "sequence_mean"))


@SEEDS
@SHARES
@pytest.mark.parametrize(("estimator", "to"), [("k3", "reference"), ("full", "reference"), ("k2", "old")])
def test_release_of_sent(seed, low_share, high_share, estimator, to):
    """-r A + beta |log r| on both ends of T_low by covariance, + coef KL everywhere; mean over tokens."""
    b = random_batch(seed)
    objective = SENT(
        variant="release",
        low_entropy_quantile=low_share,
        high_cov_fraction=high_share,
        beta_low=0.3,
        beta_high=0.7,
        release_kl_coef=0.15,
        kl_estimator=estimator,
        kl_to=to,
    )
    low = by_entropy(b, ceiling(low_share, len(b.tokens)))
    count = ceiling(high_share, len(low))
    cov = covariance(b, low)
    top, bottom = by_covariance(b, low, count, low), first(b, low, cov, count)
    loss = with_kl(b, unclipped(b), dict.fromkeys(b.tokens, 0.15), estimator, to)
    for i, t in b.tokens:
        beta = 0.7 if (i, t) in top else 0.3 if (i, t) in bottom else 0.0
        loss[i, t] = loss[i, t] + beta * abs(b.logp[i][t] - b.old_logp[i][t])
    agrees(b, objective, aggregate(b, loss, "token_mean"))
    classes = objective.plan(b.stats).classes
    for name, expected in {"low": low, "high": top, "bottom": bottom}.items():
        assert {(int(i), int(t)) for i, t in classes[name].nonzero()} == set(expected), name


def test_defaults_of_the_release():
    release = SENT(variant="release")
    assert (release.beta_high, release.beta_low, release.high_cov_fraction) == (0.2, 0.05, 0.0002)
    assert (release.low_entropy_quantile, release.release_kl_coef, release.kl_estimator) == (0.8, 0.001, "k3")
    assert (release.surrogate, release.aggregation) == (Unclipped(), "token_mean")
    assert release.covariance_scope == "low_entropy"


# --- entropy ---------------------------------------------------------------------------------------


@SEEDS
@AGGREGATIONS
def test_entropy_bonus(seed, how):
    b = random_batch(seed)
    loss = {(i, t): term - 0.2 * b.entropy[i][t] for (i, t), term in grpo(b).items()}
    agrees(b, EntropyBonus(aggregation=how, **HOW[how], entropy_coef=0.2), aggregate(b, loss, how))
    loss = with_kl(b, loss, dict.fromkeys(b.tokens, 0.1), "full")
    objective = EntropyBonus(aggregation=how, **HOW[how], entropy_coef=0.2, kl_coef=0.1, kl_estimator="full")
    agrees(b, objective, aggregate(b, loss, how))


@SEEDS
@AGGREGATIONS
def test_adaptive_entropy_on_either_side_of_the_target(seed, how):
    b = random_batch(seed)
    mean = math.fsum(b.old_entropy[i][t] for i, t in b.tokens) / len(b.tokens)
    for target, coef in ((mean + 1e-6, b.state["entropy_coef"]), (mean - 1e-6, 0.0)):
        loss = {(i, t): term - coef * b.entropy[i][t] for (i, t), term in grpo(b).items()}
        agrees(b, AdaptiveEntropy(aggregation=how, **HOW[how], target=target), aggregate(b, loss, how))


@SEEDS
@AGGREGATIONS
@pytest.mark.parametrize(("alpha", "kappa"), [(0.4, 2.0), (5.0, 1.1), (0.01, 50.0)])
def test_entropy_advantage(seed, how, alpha, kappa):
    b = random_batch(seed)
    loss = {}
    for i, t in b.tokens:
        a = b.advantage[i] + min(alpha * b.old_entropy[i][t], abs(b.advantage[i]) / kappa)
        loss[i, t] = ppo(ratio(b, i, t), a)
    objective = EntropyAdvantage(aggregation=how, **HOW[how], alpha=alpha, kappa=kappa)
    agrees(b, objective, aggregate(b, loss, how))


@SEEDS
@AGGREGATIONS
@pytest.mark.parametrize("fraction", [0.2, 0.45, 1.0])
@pytest.mark.parametrize("coef", [0.0, 0.3])
def test_high_entropy_mask(seed, how, fraction, coef):
    b = random_batch(seed)
    kept = first(b, b.tokens, lambda i, t: -b.old_entropy[i][t], ceiling(fraction, len(b.tokens)))
    loss = with_kl(b, grpo(b), dict.fromkeys(b.tokens, coef))
    objective = HighEntropyMask(aggregation=how, **HOW[how], fraction=fraction, kl_coef=coef)
    agrees(b, objective, aggregate(b, loss, how, kept))


# --- covariance ------------------------------------------------------------------------------------


def lottery(row_id, position):
    """SplitMix64's finaliser in integers of any length."""
    x = ((row_id + 1) * 0x9E3779B97F4A7C15 + position * 0xD1342543DE82EF95) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return ((x ^ x >> 31) >> 11) / 2**53


@SEEDS
@AGGREGATIONS
@pytest.mark.parametrize("fraction", [2e-4, 0.15, 0.9])
@pytest.mark.parametrize("band", [(0.05, 0.9), (-9.0, 9.0), (70.0, 90.0)])
def test_clip_cov(seed, how, fraction, band):
    b = random_batch(seed)
    cov = covariance(b)
    candidates = {token for token in b.tokens if band[0] < cov(*token) < band[1]}
    count = min(ceiling(fraction, len(b.tokens)), len(candidates))
    objective = ClipCov(aggregation=how, **HOW[how], cov_low=band[0], cov_high=band[1], fraction=fraction, kl_coef=0.2)
    dropped = {(int(i), int(t)) for i, t in objective.plan(b.stats).classes["dropped"].nonzero()}
    assert dropped <= candidates
    assert len(dropped) == count
    assert dropped == set(sorted(candidates, key=lambda it: lottery(b.row_id[it[0]], it[1]))[:count])
    loss = {token: Dual(0.0) if token in dropped else term for token, term in grpo(b).items()}
    agrees(b, objective, aggregate(b, with_kl(b, loss, dict.fromkeys(b.tokens, 0.2)), how))


def test_clip_cov_bands_are_open_on_both_sides():
    """Covariances of two tokens each: exactly 1, exactly 5 and 3; only 3 is inside."""
    advantage, logp = [1.0, -1.0, 3.0, -3.0, 5.0, -5.0], [1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
    stats = TokenStats(
        logp=torch.tensor(logp, dtype=torch.float64)[:, None],
        entropy=torch.zeros(6, 1, dtype=torch.float64),
        advantage=torch.tensor(advantage, dtype=torch.float64),
        mask=torch.ones(6, 1, dtype=torch.bool),
        row_id=torch.arange(6),
        update=torch.zeros(6, dtype=torch.long),
    )
    assert (
        ClipCov(fraction=1.0).plan(stats).classes["dropped"].flatten().tolist()
        == [False, False, True, True] + [False] * 2
    )


@SEEDS
@AGGREGATIONS
@pytest.mark.parametrize("fraction", [0.002, 0.3, 1.0])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_kl_cov(seed, how, fraction, beta):
    b = random_batch(seed)
    held = by_covariance(b, b.tokens, ceiling(fraction, len(b.tokens)))
    loss = unclipped(b)
    for i, t in held:
        loss[i, t] = loss[i, t] + beta * abs(b.logp[i][t] - b.old_logp[i][t])
    objective = KLCov(aggregation=how, **HOW[how], fraction=fraction, beta=beta)
    agrees(b, objective, aggregate(b, loss, how))


@SEEDS
def test_beta_of_kl_cov_keeps_its_float64_digits(seed):
    b = random_batch(seed)
    held = by_covariance(b, b.tokens, ceiling(0.5, len(b.tokens)))
    weight = KLCov(fraction=0.5, beta=0.1).plan(b.stats).drift_weight
    assert [weight[token].item() for token in held] == [0.1] * len(held)


def test_paper_values_of_the_columns():
    assert (EntropyBonus().entropy_coef, EntropyAdvantage().alpha, EntropyAdvantage().kappa) == (0.001, 0.4, 2.0)
    assert HighEntropyMask().fraction == 0.2
    assert (ClipCov().cov_low, ClipCov().cov_high, ClipCov().fraction) == (1.0, 5.0, 2e-4)
    assert (KLCov().fraction, KLCov().beta, KLCov().surrogate) == (0.002, 1.0, Unclipped())
    assert all(kind().kl_coef == 0 for kind in (GRPO, DAPO, GSPO, CISPO, EntropyBonus, ClipCov, KLCov, HighEntropyMask))
