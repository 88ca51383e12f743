import math

import pytest
import torch

from lightning_rlvr.ops.logprob import entropy, log_softmax, token_logp


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        log_softmax(torch.zeros(2, 3), temperature)


@pytest.mark.parametrize(
    ("given", "got"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_half_precision_is_raised_and_double_is_kept(given, got):
    assert log_softmax(torch.zeros(2, 3, dtype=given)).dtype == got


def test_half_precision_is_raised_before_dividing_by_temperature():
    logits = torch.tensor([60000.0, 0.0], dtype=torch.float16)
    assert log_softmax(logits, 0.5).tolist() == [0.0, -120000.0]


def test_large_logits_do_not_overflow():
    assert log_softmax(torch.tensor([1e4, 1e4]), 0.1).tolist() == pytest.approx([-math.log(2)] * 2)


def test_uniform_and_certain_distributions():
    assert entropy(log_softmax(torch.zeros(7, dtype=torch.float64))).item() == pytest.approx(math.log(7), abs=1e-14)
    assert entropy(torch.tensor([0.0, -math.inf, -math.inf])).item() == 0.0


def test_impossible_tokens_neither_count_nor_break_the_gradient():
    logits = torch.tensor([0.5, -math.inf, 1.5, -math.inf], dtype=torch.float64, requires_grad=True)
    short = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    value, expected = entropy(log_softmax(logits)), entropy(log_softmax(short))
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-15)
    value.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad[[0, 2]], short.grad, rtol=0, atol=1e-15)
    assert logits.grad[[1, 3]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck_from_the_logits(temperature):
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 3, 1], [2, 2, 0]])
    assert torch.autograd.gradcheck(lambda x: token_logp(log_softmax(x, temperature), ids), logits)
    assert torch.autograd.gradcheck(lambda x: entropy(log_softmax(x, temperature)), logits)


def test_low_temperature_sharpens():
    logits = torch.tensor([1.0, 2.0, 0.0])
    assert entropy(log_softmax(logits, 0.5)) < entropy(log_softmax(logits)) < entropy(log_softmax(logits, 2.0))
