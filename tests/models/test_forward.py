from dataclasses import replace

import pytest
import torch
from support import TinyPolicy

from lightning_rlvr.models.forward import response_logp
from lightning_rlvr.types import Rollouts

LENGTHS = [(3, 4), (1, 1), (6, 2), (2, 5)]  # tokens of prompt and response of each row


@pytest.fixture(scope="module")
def model():
    model = TinyPolicy(0, "float64").load().model
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    return model


@pytest.fixture(scope="module")
def reference():
    model = TinyPolicy(1, "float64").load().model
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    return model


def rollouts(prompt_width=6, width=5, filler=0, seed=0):
    """Rows of random tokens; padding holds `filler`."""
    g = torch.Generator().manual_seed(seed)
    n = len(LENGTHS)
    prompt_ids, response_ids = torch.full((n, prompt_width), filler), torch.full((n, width), filler)
    for i, (p, t) in enumerate(LENGTHS):
        prompt_ids[i, prompt_width - p :] = torch.randint(3, 98, (p,), generator=g)
        response_ids[i, :t] = torch.randint(3, 98, (t,), generator=g)
    p, t = torch.tensor(LENGTHS).T[:, :, None]
    mask = torch.arange(width) < t
    return Rollouts(
        prompt_ids=prompt_ids,
        prompt_mask=torch.arange(prompt_width) >= prompt_width - p,
        response_ids=response_ids,
        mask=mask,
        logp=torch.zeros(mask.shape),
        entropy=torch.zeros(mask.shape),
        truncated=torch.zeros(n, dtype=torch.bool),
    )


def plain(model, batch, temperature):
    """Each row by itself, without padding, one token at a time: log-probability, entropy, whole distribution."""
    out = []
    for i in range(len(batch.mask)):
        prompt, response = batch.prompt_ids[i, batch.prompt_mask[i]], batch.response_ids[i, batch.mask[i]]
        logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0] / temperature
        logp, entropy, whole = [], [], []
        for t, token in enumerate(response.tolist()):
            row = logits[len(prompt) - 1 + t]
            p = row.exp() / row.exp().sum()
            logp.append(p[token].log())
            entropy.append(-(p * p.log()).sum())
            whole.append(p)
        out.append((torch.stack(logp), torch.stack(entropy), torch.stack(whole)))
    return out


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_equals_each_row_alone(model, temperature):
    batch = rollouts()
    got = response_logp(model, batch, temperature, with_entropy=True)
    assert got.logp.shape == got.entropy.shape == batch.mask.shape
    for i, (logp, entropy, _) in enumerate(plain(model, batch, temperature)):
        torch.testing.assert_close(got.logp[i, batch.mask[i]], logp, rtol=0, atol=1e-10)
        torch.testing.assert_close(got.entropy[i, batch.mask[i]], entropy, rtol=0, atol=1e-10)
    assert not got.logp[~batch.mask].any()
    assert not got.entropy[~batch.mask].any()
    assert got.full_kl is None


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_full_kl_equals_a_plain_sum_over_the_vocabulary(model, reference, temperature):
    batch = rollouts(8, 7)
    got = response_logp(model, batch, temperature, reference=reference).full_kl
    for i, ((_, _, p), (_, _, q)) in enumerate(
        zip(plain(model, batch, temperature), plain(reference, batch, temperature), strict=True)
    ):
        torch.testing.assert_close(got[i, batch.mask[i]], (p * (p / q).log()).sum(dim=1), rtol=0, atol=1e-10)
    assert not got[~batch.mask].any()
    assert got.shape == batch.mask.shape
    assert float(got[batch.mask].detach().min()) > 0.1
    own = response_logp(model, batch, temperature, reference=model).full_kl
    assert not own.any()


def test_the_reference_gets_no_gradient(model, reference):
    got = response_logp(model, rollouts(), 1.0, with_entropy=True, reference=reference)
    assert gradients(model, sum(value.sum() for value in got))
    assert all(p.grad is None for p in reference.parameters())


def test_without_gradients_nothing_carries_one(model, reference):
    with torch.no_grad():
        got = response_logp(model, rollouts(), 1.0, with_entropy=True, reference=reference)
    assert not any(value.requires_grad for value in got)


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (5, 2)])
def test_columns_of_padding_change_nothing(model, reference, left, right):
    narrow, wide = rollouts(), rollouts(6 + left, 5 + right)
    a = response_logp(model, narrow, 1.0, with_entropy=True, reference=reference)
    b = response_logp(model, wide, 1.0, with_entropy=True, reference=reference)
    for x, y in zip(a, b, strict=True):
        assert y.shape == wide.mask.shape
        assert torch.equal(y[:, :5], x)
        assert not y[:, 5:].any()


def test_what_stands_in_the_padding_does_not_matter(model, reference):
    a, b = (response_logp(model, rollouts(7, 8, filler), 1.0, True, reference) for filler in (0, 77))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_rows_do_not_see_each_other(model):
    batch = rollouts()
    whole = response_logp(model, batch, 1.0).logp
    for i in range(len(LENGTHS)):
        alone = response_logp(model, batch.rows(slice(i, i + 1)), 1.0).logp
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("value", ["logp", "entropy", "full_kl"])
def test_gradient_is_that_of_the_counted_tokens(model, reference, value):
    batch = rollouts(8, 7, filler=50)
    weight = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = response_logp(model, batch, 0.7, with_entropy=True, reference=reference)
    got = gradients(model, (getattr(values, value) * weight).sum())
    with torch.no_grad():
        q = [q for _, _, q in plain(reference, batch, 0.7)]
    rows = [
        {"logp": logp, "entropy": entropy, "full_kl": (p * (p / q[i]).log()).sum(dim=1)}[value]
        for i, (logp, entropy, p) in enumerate(plain(model, batch, 0.7))
    ]
    expected = gradients(model, sum((row * weight[i, : len(row)]).sum() for i, row in enumerate(rows)))
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-10)
    assert any(gradient.abs().max() > 0.1 for gradient in expected.values())


def test_padding_gets_no_gradient(model):
    batch = rollouts(8, 7, filler=2)  # token 2 stands nowhere but in the padding
    got = gradients(model, response_logp(model, batch, 1.0).logp.sum())["model.embed_tokens.weight"]
    assert not got[2].any()
    real = torch.cat([batch.prompt_ids[batch.prompt_mask], batch.response_ids[:, :-1][batch.mask[:, 1:]]]).unique()
    assert (got[real].abs().sum(dim=1) > 0).all()
    assert sorted(got.abs().sum(dim=1).nonzero().flatten().tolist()) == real.tolist()


def test_uncounted_tokens_get_no_gradient(model, reference):
    batch = rollouts()
    values = response_logp(model, batch, 1.0, with_entropy=True, reference=reference)
    got = gradients(model, sum((value * ~batch.mask).sum() for value in values))
    assert not any(gradient.any() for gradient in got.values())


def test_nothing_is_made_unasked_and_asking_changes_nothing(model, reference):
    less = response_logp(model, rollouts(), 1.0)
    assert less.entropy is None
    assert less.full_kl is None
    more = response_logp(model, rollouts(), 1.0, with_entropy=True)
    assert torch.equal(less.logp, more.logp)
    a, b = gradients(model, less.logp.sum()), gradients(model, more.logp.sum())
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = response_logp(model, rollouts(), 1.0, with_entropy=True, reference=reference)
    c = gradients(model, other.logp.sum())
    torch.testing.assert_close(other[:2], more[:2], rtol=0, atol=1e-10)
    assert all(torch.allclose(a[name], c[name], rtol=0, atol=1e-10) for name in a)


def test_a_batch_in_which_no_token_counts(model):
    batch = rollouts()
    got = response_logp(model, replace(batch, mask=torch.zeros_like(batch.mask)), 1.0, with_entropy=True)
    assert got.logp.shape == got.entropy.shape == batch.mask.shape
    assert not got.logp.any()
    assert not got.entropy.any()


def test_greedy_has_no_distribution(model):
    with pytest.raises(ValueError, match="temperature must be positive"):
        response_logp(model, rollouts(), 0.0)


@pytest.mark.parametrize("plain", [False, True])
def test_columns_of_padding_are_not_computed(model, reference, plain):
    shapes = []
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    response_logp(model, rollouts(20, 30), 1.0, reference=reference if plain else None)
    handle.remove()
    tokens = sum(prompt + response - 1 for prompt, response in LENGTHS)  # the last token predicts none
    assert shapes == [(4, 6 + 5) if plain else (1, tokens)]
