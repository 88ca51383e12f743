import inspect
import math

import pytest
import torch

from lightning_rlvr.ops.kl import KL_ESTIMATORS, kl_full, kl_k1, kl_k2, kl_k3

ALL = pytest.mark.parametrize("kl", [kl_k1, kl_k2, kl_k3])


def pair(seed=0, shape=(3, 4)):
    generator = torch.Generator().manual_seed(seed)
    return (-4 * torch.rand(2, *shape, generator=generator, dtype=torch.float64)).unbind()


@ALL
def test_equal_policies_have_zero_kl(kl):
    logp, _ = pair()
    assert not kl(logp, logp).any()


@ALL
def test_gradcheck_in_both_arguments(kl):
    assert torch.autograd.gradcheck(kl, [x.requires_grad_() for x in pair()])


@pytest.mark.parametrize("kl", [kl_k2, kl_k3])
def test_k2_and_k3_are_never_negative(kl):
    logp, ref_logp = pair(shape=(50, 50))
    assert (kl(logp, ref_logp) >= 0).all()


def test_k3_keeps_its_digits_near_zero_in_float32():
    d = 1e-4
    got = kl_k3(torch.tensor([0.0]), torch.tensor([d]))
    assert float(got) == pytest.approx(d * d / 2, rel=2e-2)


def test_k1_and_k3_are_unbiased_and_k2_nearly():
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]], dtype=torch.float64)
    exact = float((p * (p / q).log()).sum())
    assert float((p * kl_k1(p.log(), q.log())).sum()) == pytest.approx(exact, rel=1e-12)
    assert float((p * kl_k3(p.log(), q.log())).sum()) == pytest.approx(exact, rel=1e-12)
    assert float((p * kl_k2(p.log(), q.log())).sum()) == pytest.approx(exact, rel=0.1)


def exact_reverse_kl_gradient(logits, q):
    logp = logits.log_softmax(-1)
    return torch.autograd.grad((logp.exp() * (logp - q.log())).sum(), logits)[0]


def expected_gradient(kl, logits, q):
    logp = logits.log_softmax(-1)
    return torch.autograd.grad((logp.detach().exp() * kl(logp, q.log())).sum(), logits)[0]


def test_on_policy_only_k2_has_the_gradient_of_the_reverse_kl():
    logits = torch.tensor([0.3, -0.4, 1.0], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    exact = exact_reverse_kl_gradient(logits, q)
    torch.testing.assert_close(expected_gradient(kl_k2, logits, q), exact, rtol=1e-12, atol=1e-14)
    assert expected_gradient(kl_k1, logits, q).abs().max() < 1e-14
    assert (expected_gradient(kl_k3, logits, q) - exact).abs().max() > 1e-2


@ALL
def test_shapes_must_match(kl):
    bare = inspect.unwrap(kl)  # as users run it: without the shape checks of pytest
    with pytest.raises(ValueError, match=r"shapes differ.*\(2, 3\).*\(1, 3\)"):
        bare(torch.zeros(2, 3), torch.zeros(1, 3))


def test_names_lead_to_their_estimators():
    assert {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3} == KL_ESTIMATORS


def distributions(seed=0, shape=(3, 4), vocabulary=6):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, *shape, vocabulary, generator=generator, dtype=torch.float64) * 2
    return logits.log_softmax(dim=-1).unbind()


def test_full_kl_is_the_sum_over_the_vocabulary():
    p, q = distributions()
    got = kl_full(p, q)
    assert got.shape == (3, 4)
    for i in range(3):
        for t in range(4):
            terms = [math.exp(a) * (a - b) for a, b in zip(p[i, t].tolist(), q[i, t].tolist(), strict=True)]
            assert got[i, t].item() == pytest.approx(math.fsum(terms), abs=1e-12)


def test_full_kl_is_what_the_estimators_estimate():
    p, q = distributions()
    for kl in (kl_k1, kl_k3):
        torch.testing.assert_close((p.exp() * kl(p, q)).sum(dim=-1), kl_full(p, q), rtol=0, atol=1e-12)


def test_full_kl_is_zero_for_equals_positive_else_and_not_symmetric():
    p, q = distributions()
    assert not kl_full(p, p).any()
    assert (kl_full(p, q) > 0).all()
    assert not torch.allclose(kl_full(p, q), kl_full(q, p))


def test_full_kl_has_the_gradient_of_the_reverse_kl_in_the_logits():
    """dKL / dz_v = p_v (log p_v - log q_v - KL)."""
    _, q = distributions()
    logits = distributions(seed=1)[0].requires_grad_()
    logp = logits.log_softmax(dim=-1)
    kl = kl_full(logp, q)
    (gradient,) = torch.autograd.grad(kl.sum(), logits)
    expected = (logp.exp() * (logp - q - kl[..., None])).detach()
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda z: kl_full(z.log_softmax(dim=-1), q), logits)


@pytest.mark.parametrize("ref", [-3.0, -math.inf])
def test_a_token_of_probability_zero_adds_nothing_and_has_no_gradient(ref):
    logits = torch.tensor([0.3, -1.0, -math.inf], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64).log()
    q = torch.where(q.isinf(), ref, q)
    got = kl_full(logits.log_softmax(dim=-1), q)
    p = logits.detach()[:2].log_softmax(dim=-1)
    assert got.item() == pytest.approx(float((p.exp() * (p - q[:2])).sum()), abs=1e-12)
    (gradient,) = torch.autograd.grad(got, logits)
    assert gradient.isfinite().all()
    assert gradient[2] == 0


def test_full_kl_is_infinite_where_the_reference_rules_a_token_out():
    p, q = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64).log()
    assert kl_full(p, q) == math.inf
    assert kl_full(q, p).item() == pytest.approx(math.log(2))


def test_full_kl_wants_equal_shapes():
    with pytest.raises(ValueError, match=r"shapes differ.*\(2, 3\).*\(1, 3\)"):
        inspect.unwrap(kl_full)(torch.zeros(2, 3), torch.zeros(1, 3))
