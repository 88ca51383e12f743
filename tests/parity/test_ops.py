"""ops against plain loops written from the formulas, in float64 to 1e-10; gradients against finite differences."""

import math
import random
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch

from lightning_rlvr.ops.advantages import group_advantages
from lightning_rlvr.ops.covariance import token_covariance
from lightning_rlvr.ops.kl import KL_ESTIMATORS
from lightning_rlvr.ops.logprob import entropy, log_softmax, token_logp
from lightning_rlvr.ops.reduce import token_weights
from lightning_rlvr.ops.semantic_entropy import semantic_entropy

SEEDS = pytest.mark.parametrize("seed", range(4))
TEMPERATURES = pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def agree(got, expected, tolerance=1e-10):
    torch.testing.assert_close(got, tensor(expected), rtol=0, atol=tolerance)


def finite_difference(f, x, i, step=1e-5):
    """Fourth-order central difference of f at x in its i-th argument."""

    def at(k):
        moved = list(x)
        moved[i] += k * step
        return f(moved)

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


@SEEDS
@pytest.mark.parametrize("scale", [True, False])
def test_group_advantages(seed, scale):
    rng = random.Random(seed)
    rewards = [[rng.choice([0.0, 1.0, 0.1, rng.random()]) for _ in range(5)] for _ in range(6)]
    expected = []
    for group in rewards:
        mean = math.fsum(group) / len(group)
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / (len(group) - 1))
        expected.append([(r - mean) / (std + 1e-6) if scale else r - mean for r in group])
    agree(group_advantages(tensor(rewards), scale_by_std=scale), expected)


def log_softmax_by_loop(logits, temperature):
    scaled = [z / temperature for z in logits]
    top = max(scaled)
    log_z = top + math.log(math.fsum(math.exp(z - top) for z in scaled))
    return [z - log_z for z in scaled]


def entropy_by_loop(logits, temperature):
    return -math.fsum(math.exp(x) * x for x in log_softmax_by_loop(logits, temperature))


def random_logits(seed, rows=6, vocabulary=9):
    rng = random.Random(seed)
    return [[rng.gauss(0, 3) for _ in range(vocabulary)] for _ in range(rows)]


@SEEDS
@TEMPERATURES
def test_entropy_and_its_gradient(seed, temperature):
    logits = random_logits(seed)
    x = tensor(logits).requires_grad_()
    got = entropy(log_softmax(x, temperature))
    agree(got.detach(), [entropy_by_loop(row, temperature) for row in logits])
    (gradient,) = torch.autograd.grad(got.sum(), x)
    expected = []
    for row in logits:  # dH / dz_v = -p_v (log p_v + H) / temperature
        logp, h = log_softmax_by_loop(row, temperature), entropy_by_loop(row, temperature)
        expected.append([-math.exp(lp) * (lp + h) / temperature for lp in logp])
    agree(gradient, expected)
    numeric = finite_difference(lambda row: entropy_by_loop(row, temperature), logits[0], 2)
    assert gradient[0, 2].item() == pytest.approx(numeric, abs=1e-8)


@SEEDS
@TEMPERATURES
def test_token_logp_and_its_gradient(seed, temperature):
    logits = random_logits(seed)
    ids = [random.Random(seed).randrange(9) for _ in logits]
    x = tensor(logits).requires_grad_()
    got = token_logp(log_softmax(x, temperature), torch.tensor(ids))
    by_loop = [log_softmax_by_loop(row, temperature) for row in logits]
    agree(got.detach(), [logp[k] for logp, k in zip(by_loop, ids, strict=True)])
    (gradient,) = torch.autograd.grad(got.sum(), x)
    expected = [  # d log p_k / dz_v = ([v = k] - p_v) / temperature
        [((v == k) - math.exp(lp)) / temperature for v, lp in enumerate(logp)]
        for logp, k in zip(by_loop, ids, strict=True)
    ]
    agree(gradient, expected)


@pytest.mark.parametrize("inner", [False, True])
def test_covariance_over_all_tokens_or_over_a_subset(batch, inner):
    logp = [batch.old_logp[i][t] for i, t in batch.tokens]
    advantage = [batch.advantage[i] for i, _ in batch.tokens]
    chosen = [k for k in range(len(logp)) if k % 3 != 1]
    scope = chosen if inner else range(len(logp))
    mean_logp = math.fsum(logp[k] for k in scope) / len(scope)
    mean_advantage = math.fsum(advantage[k] for k in scope) / len(scope)
    expected = [(logp[k] - mean_logp) * (advantage[k] - mean_advantage) for k in chosen]
    logp, advantage = tensor(logp), tensor(advantage)
    within = torch.isin(torch.arange(len(logp)), torch.tensor(chosen)) if inner else None
    agree(token_covariance(logp, advantage, within)[chosen], expected)


KL_BY_FORMULA = {
    "k1": (lambda d: -d, lambda d: 1.0),  # value, derivative in logp: d = ref_logp - logp
    "k2": (lambda d: d * d / 2, lambda d: -d),
    "k3": (lambda d: math.exp(d) - 1 - d, lambda d: 1 - math.exp(d)),
}


@pytest.mark.parametrize("name", KL_BY_FORMULA)
def test_kl_estimators_and_their_gradients(name):
    differences = [-3.0, -1.1, -1e-3, 0.0, 1e-3, 0.4, 2.5]
    value, slope = KL_BY_FORMULA[name]
    logp = torch.linspace(-4, -0.1, len(differences), dtype=torch.float64).requires_grad_()
    got = KL_ESTIMATORS[name](logp, logp.detach() + tensor(differences))
    agree(got.detach(), [value(d) for d in differences])
    (gradient,) = torch.autograd.grad(got.sum(), logp)
    agree(gradient, [slope(d) for d in differences])
    numeric = [-finite_difference(lambda x: value(x[0]), [d], 0) for d in differences]
    agree(gradient, numeric, tolerance=1e-8)


@pytest.mark.parametrize("how", ["sequence_mean", "token_mean", "fixed_length"])
def test_aggregation_over_several_updates(batch, how):
    rng = random.Random(0)
    loss = [[rng.gauss(0, 1) if counts else 0.0 for counts in row] for row in batch.mask]
    length = 11 if how == "fixed_length" else None
    weights = token_weights(torch.tensor(batch.mask), torch.tensor(batch.update), how, length)
    got = (weights * tensor(loss)).sum(dim=1)
    for update in sorted(set(batch.update)):
        rows = [i for i, u in enumerate(batch.update) if u == update]
        sums = [math.fsum(loss[i]) for i in rows]
        lengths = [sum(batch.mask[i]) for i in rows]
        if how == "sequence_mean":
            expected = sum(s / n for s, n in zip(sums, lengths, strict=True) if n) / len(rows)
        elif how == "token_mean":
            expected = sum(sums) / sum(lengths) if sum(lengths) else 0.0
        else:
            expected = sum(sums) / (len(rows) * length)
        assert got[rows].sum().item() == pytest.approx(expected, abs=1e-12)


def entropy_of_shares(*shares):
    return -math.fsum(float(p) * math.log(p) for p in shares)


def semantic_entropy_by_loop(labels, logp, lengths, estimator):
    """Sum the masses in 60-digit decimals, where exp(-3000) is a number like any other."""
    with localcontext() as context:
        context.prec = 60
        context.Emin = -999999
        mass = {}
        for label, lp, n in zip(labels, logp, lengths, strict=True):
            exponent = {"discrete": Decimal(0), "likelihood": Decimal(lp), "rao_blackwell": Decimal(lp) / n}[estimator]
            mass[label] = mass.get(label, Decimal(0)) + exponent.exp()
        total = sum(mass.values())
        return float(-sum(m / total * (m / total).ln() for m in mass.values()))


@SEEDS
@pytest.mark.parametrize("estimator", ["discrete", "rao_blackwell", "likelihood"])
@pytest.mark.parametrize("base", [-3.0, -800.0, -2000.0])
def test_semantic_entropy(seed, estimator, base):
    rng = random.Random(seed)
    labels = [rng.randrange(4) for _ in range(8)]
    lengths = [rng.randint(1, 900) for _ in labels]
    logp = [base + rng.uniform(-2, 2) for _ in labels]
    got = semantic_entropy(torch.tensor(labels), tensor(logp), torch.tensor(lengths), estimator)
    assert got == pytest.approx(semantic_entropy_by_loop(labels, logp, lengths, estimator), abs=1e-12)


def test_discrete_semantic_entropy_in_closed_form():
    got = semantic_entropy(torch.tensor([0, 1, 1, 2, 2, 2, 2, 2]))
    assert got == pytest.approx(entropy_of_shares(Fraction(1, 8), Fraction(2, 8), Fraction(5, 8)), abs=1e-12)


@pytest.mark.parametrize("base", [0.0, -2000.0, -100000.0])
def test_likelihood_semantic_entropy_in_closed_form(base):
    # ln 2 is cut to a multiple of 2^-20 so that base + ln 2 is exact
    two = round(math.log(2) * 2**20) / 2**20
    logp = tensor([base, base + two, base, base])
    got = semantic_entropy(torch.tensor([0, 1, 0, 2]), logp, estimator="likelihood")
    total = 3 + math.exp(two)
    assert got == pytest.approx(entropy_of_shares(2 / total, math.exp(two) / total, 1 / total), abs=1e-12)


def test_rao_blackwell_semantic_entropy_in_closed_form():
    # per token -2000/1000 = -2, -2000/500 = -4, -2000/2000 = -1
    got = semantic_entropy(
        torch.tensor([0, 1, 0]), tensor([-2000.0] * 3), torch.tensor([1000, 500, 2000]), "rao_blackwell"
    )
    masses = [math.exp(-2) + math.exp(-1), math.exp(-4)]
    assert got == pytest.approx(entropy_of_shares(*(m / sum(masses) for m in masses)), abs=1e-12)


def test_rao_blackwell_survives_one_token_of_log_probability_minus_two_thousand():
    got = semantic_entropy(torch.tensor([0, 1]), tensor([-2000.0, -2001.0]), torch.tensor([1, 1]), "rao_blackwell")
    masses = [1.0, math.exp(-1)]
    assert got == pytest.approx(entropy_of_shares(*(m / sum(masses) for m in masses)), abs=1e-12)


def test_a_negligible_cluster_adds_nothing():
    got = semantic_entropy(torch.tensor([0, 1, 2]), tensor([0.0, 0.0, -2000.0]), estimator="likelihood")
    assert got == pytest.approx(math.log(2), abs=1e-12)
