import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rlvr.ops.linear_logprob import HeadValues, linear_logprob, linear_logprob_loss
from lightning_rlvr.ops.logprob import entropy, log_softmax, token_logp

K, H, V = 11, 5, 7
ROW = V * 8  # bytes of the logits of one float64 token
CHUNKS = [1, ROW, 2 * ROW, 3 * ROW + 1, 5 * ROW, K * ROW, 1000 * ROW, None]


def problem(k=K, h=H, v=V, dtype=torch.float64, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()
        for shape in ((k, h), (v, h), (v,))
    )
    return hidden, weight, bias, torch.randint(v, (k,), generator=generator)


def plain(hidden, weight, target, temperature=1.0, bias=None):
    """The same with all logits at once."""
    logp = log_softmax(torch.nn.functional.linear(hidden, weight, bias), temperature)
    return HeadValues(token_logp(logp, target), entropy(logp))


def coupled(weights, entropy_weights, lengths, couple=True):
    """A loss of packed rows: token terms, and where `couple` one of each row's mean log-probability as in GSPO."""
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]

    def loss_of(logp, entropy, rows):
        tokens = slice(starts[rows.start], starts[rows.stop])
        assert len(logp) == tokens.stop - tokens.start
        loss = (logp.exp() * weights[tokens]).sum()
        if entropy is not None:
            loss = loss + (entropy.square() * entropy_weights[tokens]).sum()
        if couple:
            for row in logp.split(lengths[rows]):
                loss = loss + (row.mean() if len(row) else row.sum()).exp().square()
        return loss

    return loss_of


def gradients(loss, inputs):
    return torch.autograd.grad(loss, [x for x in inputs if x is not None and x.requires_grad])


def close(got, expected, tolerance=1e-10):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_recomputed_head_is_the_plain_one(chunk_bytes, temperature, with_bias):
    hidden, weight, bias, target = problem()
    inputs = (hidden, weight, bias if with_bias else None)
    got = linear_logprob(hidden, weight, target, temperature, inputs[2], chunk_bytes=chunk_bytes)
    expected = plain(hidden, weight, target, temperature, inputs[2])
    close(got, expected)
    pull = torch.randn(2, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    close(
        gradients(got.logp @ pull[0] + got.entropy @ pull[1], inputs),
        gradients(expected.logp @ pull[0] + expected.entropy @ pull[1], inputs),
    )


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_loss_in_one_pass_is_the_plain_one(chunk_bytes, temperature, with_bias, with_entropy):
    hidden, weight, bias, target = problem()
    inputs, lengths = (hidden, weight, bias if with_bias else None), [2, 0, 4, 1, 1, 3]
    loss_of = coupled(*torch.randn(2, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64), lengths)
    loss, values = linear_logprob_loss(
        hidden, weight, target, torch.tensor(lengths), loss_of, temperature, inputs[2], with_entropy, chunk_bytes
    )
    expected = plain(hidden, weight, target, temperature, inputs[2])
    expected_loss = loss_of(expected.logp, expected.entropy if with_entropy else None, slice(0, len(lengths)))
    close([loss, values.logp], [expected_loss, expected.logp])
    if with_entropy:
        close([values.entropy], [expected.entropy])
    else:
        assert values.entropy is None
    assert not any(x.requires_grad for x in values if x is not None)
    close(gradients(3 * loss, inputs), gradients(3 * expected_loss, inputs))


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 6), max_size=6),
    chunk=st.integers(1, 8),
    temperature=st.floats(0.3, 3.0),
    couple=st.booleans(),
    seed=st.integers(0, 5),
)
def test_any_rows_in_any_chunk(lengths, chunk, temperature, couple, seed):
    k = sum(lengths)
    hidden, weight, bias, target = problem(k, seed=seed, scale=3.0)
    inputs = (hidden, weight, bias)
    weights = torch.randn(2, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss_of = coupled(*weights, lengths, couple)
    loss, _ = linear_logprob_loss(
        hidden, weight, target, torch.tensor(lengths).long(), loss_of, temperature, bias, chunk_bytes=chunk * ROW
    )
    expected = loss_of(*plain(hidden, weight, target, temperature, bias), slice(0, len(lengths)))
    close([loss], [expected])
    if lengths:
        close(gradients(loss, inputs), gradients(expected, inputs))


def test_gradcheck():
    hidden, weight, bias, target = problem(4, 3, 5)

    def both(hidden, weight, bias):
        return tuple(linear_logprob(hidden, weight, target, 0.8, bias, chunk_bytes=3 * 5 * 8))

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda *x: both(*x)[0], (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda *x: both(*x)[1], (hidden, weight, bias))


@pytest.mark.parametrize("needing", ["hidden", "weight", "bias"])
def test_frozen_inputs_get_no_gradient(needing):
    hidden, weight, bias, target = problem()
    inputs = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, x in inputs.items():
        x.requires_grad_(name == needing)
    loss_of, lengths = coupled(torch.ones(K), torch.ones(K), [K]), torch.tensor([K])
    values = plain(hidden, weight, target, bias=bias)
    (expected,) = gradients(loss_of(*values, slice(0, 1)), inputs.values())
    for loss in (
        linear_logprob_loss(hidden, weight, target, lengths, loss_of, bias=bias)[0],
        loss_of(*linear_logprob(hidden, weight, target, bias=bias), slice(0, 1)),
    ):
        loss.backward()
        close([inputs[needing].grad], [expected])
        inputs[needing].grad = None
        assert all(x.grad is None for x in inputs.values())


def test_tied_weight_gets_the_gradients_of_both_its_uses():
    hidden, weight, _, target = problem(h=H)
    ids = torch.tensor([1, 4, 2, 0, 6, 5, 3, 3, 1, 2, 0])
    loss_of = coupled(torch.ones(K), torch.ones(K), [4, 7])
    inputs = [weight[ids] + hidden.detach() for _ in range(2)]
    loss, _ = linear_logprob_loss(inputs[0], weight, target, torch.tensor([4, 7]), loss_of, chunk_bytes=3 * ROW)
    expected = loss_of(*plain(inputs[1], weight, target), slice(0, 2))
    close(gradients(loss, [weight]), gradients(expected, [weight]))


def test_values_alone_where_no_gradient_is_wanted():
    hidden, weight, _, target = problem()
    asked = []

    def loss_of(logp, entropy, rows):
        asked.append(logp.requires_grad)
        return logp.sum() + entropy.sum()

    with torch.no_grad():
        loss, values = linear_logprob_loss(hidden, weight, target, torch.tensor([K]), loss_of)
        recomputed = linear_logprob(hidden, weight, target)
    expected = plain(hidden, weight, target)
    close([loss, *values], [expected.logp.sum() + expected.entropy.sum(), *expected])
    close(recomputed, expected)
    detached, _ = linear_logprob_loss(hidden.detach(), weight.detach(), target, torch.tensor([K]), loss_of)
    assert asked == [False, False]
    assert not any(x.requires_grad for x in (loss, detached, *recomputed))


def test_a_loss_without_gradient_gives_zeros():
    hidden, weight, _, target = problem()
    loss, _ = linear_logprob_loss(
        hidden, weight, target, torch.tensor([K]), lambda logp, entropy, rows: logp.detach().sum()
    )
    assert all(not x.any() for x in gradients(loss, [hidden, weight]))


def test_only_one_of_the_values_may_matter():
    hidden, weight, _, target = problem()
    for name in HeadValues._fields:
        values, expected = linear_logprob(hidden, weight, target), plain(hidden, weight, target)
        close(
            gradients(getattr(values, name).sum(), [hidden, weight]),
            gradients(getattr(expected, name).sum(), [hidden, weight]),
        )
    loss, _ = linear_logprob_loss(hidden, weight, target, torch.tensor([K]), lambda logp, entropy, rows: entropy.sum())
    again = plain(hidden, weight, target).entropy.sum()
    close(gradients(loss, [hidden, weight]), gradients(again, [hidden, weight]))


def test_gradient_is_handed_over_once():
    hidden, weight, _, target = problem()
    loss, _ = linear_logprob_loss(hidden, weight, target, torch.tensor([K]), lambda logp, entropy, rows: logp.sum())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_lengths_must_add_up():
    hidden, weight, _, target = problem()
    with pytest.raises(ValueError, match="add up to the 11 tokens given, got 10"):
        linear_logprob_loss(hidden, weight, target, torch.tensor([4, 6]), lambda logp, entropy, rows: logp.sum())


def test_temperature_must_be_positive():
    hidden, weight, _, target = problem()
    with pytest.raises(ValueError, match="temperature"):
        linear_logprob(hidden, weight, target, 0.0)


def test_layout_does_not_matter():
    hidden, weight, _, target = problem()
    wide_hidden = torch.stack([hidden, -hidden], dim=-1)[..., 0]
    tall_weight = weight.t().contiguous().t()
    strided_target = torch.stack([target, target], dim=-1)[:, 0]
    got = linear_logprob(wide_hidden, tall_weight, strided_target, 0.7)
    expected = plain(hidden, weight, target, 0.7)
    close(got, expected)
    close(
        gradients(got.logp.sum() + got.entropy.sum(), [hidden, weight]),
        gradients(expected.logp.sum() + expected.entropy.sum(), [hidden, weight]),
    )


def test_large_logits_and_impossible_tokens_are_stable():
    hidden, weight, _, target = problem(dtype=torch.float32, scale=100.0)
    bias = torch.zeros(V).masked_fill(torch.arange(V) == (target[0] + 1) % V, -torch.inf)
    target = torch.where(bias[target] == 0, target, target[0])
    values = linear_logprob(hidden, weight, target, 0.1, bias)
    expected = plain(hidden, weight, target, 0.1, bias)
    close(values, expected, 1e-5)
    pulled = gradients(values.logp.sum() + values.entropy.sum(), [hidden, weight])
    assert all(x.isfinite().all() for x in (*values, *pulled))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_adds_in_float32_and_rounds_once(dtype, autocast):
    hidden, weight, bias, target = problem(40, 33, 50, torch.float32 if autocast else dtype)
    inputs, lengths = (hidden, weight, bias), [30, 10]
    loss_of = coupled(torch.ones(40), torch.ones(40), lengths)
    with torch.autocast("cpu", dtype, enabled=autocast):
        loss, values = linear_logprob_loss(
            hidden, weight, target, torch.tensor(lengths), loss_of, bias=bias, chunk_bytes=50 * 4 * 7
        )
        recomputed = linear_logprob(hidden, weight, target, bias=bias, chunk_bytes=50 * 4 * 7)
    assert values.logp.dtype == values.entropy.dtype == loss.dtype == torch.float32
    exact = [x.detach().to(dtype).double().requires_grad_() for x in (hidden, weight)]
    exact.append(bias.detach().double().requires_grad_())
    expected = plain(*exact[:2], target, bias=exact[2])
    for got in (values, recomputed):
        close([x.double() for x in got], expected, 1e-5)
    truth = gradients(loss_of(*expected, slice(0, 2)), exact)
    for got in (loss, loss_of(*recomputed, slice(0, 2))):
        for x, pulled, true in zip(inputs, gradients(got, inputs), truth, strict=True):
            assert pulled.dtype == x.dtype
            spacing = 1e-5 if autocast else torch.finfo(dtype).eps
            torch.testing.assert_close(pulled.double(), true, rtol=spacing, atol=1e-5)


class Largest(TorchDispatchMode):
    """Keeps the largest number of elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("lengths", [[50] * 4, [200]])
def test_no_tensor_outgrows_the_buffer_or_the_inputs(lengths):
    k, h, v, chunk = 200, 4, 64, 16
    hidden, weight, _, target = problem(k, h, v, torch.float32)
    loss_of = coupled(torch.ones(k), torch.ones(k), lengths)
    with Largest() as seen:
        loss, _ = linear_logprob_loss(hidden, weight, target, torch.tensor(lengths), loss_of, chunk_bytes=chunk * v * 4)
        loss.backward()
        values = linear_logprob(hidden, weight, target, chunk_bytes=chunk * v * 4)
        (values.logp.sum() + values.entropy.sum()).backward()
    assert 0 < seen.numel <= max(chunk * v, k * h, v * h)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-4)])
def test_accelerator_agrees_with_cpu(dtype, tolerance):
    def both(device):
        hidden, weight, bias, target = (x.detach().to(device) for x in problem(300, 64, 1000, dtype))
        inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
        loss_of = coupled(torch.ones(300, device=device), torch.ones(300, device=device), [100, 200])
        loss, values = linear_logprob_loss(
            hidden, weight, target, torch.tensor([100, 200]), loss_of, 0.9, bias, chunk_bytes=64 * 4000
        )
        return [x.cpu().float() for x in (loss, *values, *gradients(loss, inputs))]

    for got, expected in zip(both("cuda"), both("cpu"), strict=True):
        assert (got - expected).norm() <= tolerance * expected.norm()
