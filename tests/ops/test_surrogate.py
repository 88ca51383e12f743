import math

import pytest
import torch

from lightning_rlvr.ops.surrogate import clipped_surrogate

# (ratio, advantage, clipped): the clip cuts only where it makes the gain smaller
CASES = [
    (1.0, 1.0, False),
    (1.0, -1.0, False),
    (1.19, 1.0, False),
    (1.31, 1.0, True),
    (1.31, -1.0, False),
    (0.79, 1.0, False),
    (0.79, -1.0, True),
    (0.81, -1.0, False),
    (1.31, 0.0, False),
    (0.5, 0.0, False),
]


def surrogate(ratio, advantage):
    logp = torch.tensor([[math.log(ratio) - 1.5]], dtype=torch.float64, requires_grad=True)
    old_logp, a = torch.full_like(logp, -1.5).detach(), torch.tensor([[advantage]], dtype=torch.float64)
    return logp, clipped_surrogate(logp - old_logp, a, 0.2, 0.3)


@pytest.mark.parametrize(("ratio", "advantage", "clipped"), CASES)
def test_clipping_by_cases(ratio, advantage, clipped):
    logp, got = surrogate(ratio, advantage)
    got.loss.sum().backward()
    bounded = min(max(ratio, 0.8), 1.3)
    assert got.clipped.item() is clipped
    assert got.loss.item() == pytest.approx(-(bounded if clipped else ratio) * advantage, abs=1e-12)
    assert logp.grad.item() == pytest.approx(0.0 if clipped else -ratio * advantage, abs=1e-12)


def test_gradcheck_away_from_the_kinks():
    ratio = torch.tensor([[0.5, 0.9, 1.1, 2.0], [0.6, 0.95, 1.2, 1.7]], dtype=torch.float64)
    advantage = torch.tensor([[1.0, -1.0, 0.5, 2.0], [-1.0, 0.3, -0.2, -2.0]], dtype=torch.float64)
    old_logp = torch.linspace(-3, -1, 8, dtype=torch.float64).view(2, 4)
    logp = (old_logp + ratio.log()).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clipped_surrogate(x - old_logp, advantage, 0.2, 0.3).loss, logp)


def test_clipped_flags_carry_no_gradient():
    _, got = surrogate(2.0, 1.0)
    assert got.clipped.dtype == torch.bool
    assert not got.clipped.requires_grad
