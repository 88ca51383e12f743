"""Drawing with sums from a kernel, run by Triton's interpreter, against drawing without."""

import pytest
import torch

from lightning_rlvr.rollout import sampling
from lightning_rlvr.rollout.sampling import draw
from lightning_rlvr.types import Sampling

pytest.importorskip("triton", reason="needs Triton: pip install triton")


@pytest.fixture
def both(monkeypatch):
    """Draws by torch and by the kernel."""

    def of(*args):
        drawn = []
        for there in (False, True):
            monkeypatch.setattr(sampling, "available", lambda dtype, device, there=there: there)
            drawn.append(draw(*args))
        return drawn

    return of


@pytest.mark.parametrize("vocabulary", [1, 7, 256, 300, 5000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_drawn_is_the_same(vocabulary, temperature, dtype, both):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (3 * torch.randn(40, vocabulary, generator=generator) + 5).to(dtype)
    logits[::3, : vocabulary // 2] = -torch.inf
    uniform = torch.rand(40, generator=generator, dtype=torch.float64)
    wanted, got = both(logits, uniform, Sampling(1, temperature=temperature))
    assert torch.equal(got.token, wanted.token)
    torch.testing.assert_close(got.logp, wanted.logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy, wanted.entropy, rtol=1e-5, atol=1e-5)
    assert got.finite.all()
    assert wanted.finite.all()


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's
@pytest.mark.parametrize("vocabulary", [5, 600])
def test_rows_that_are_not_finite_are_told(vocabulary, both):
    logits = torch.zeros(5, vocabulary)
    logits[1, 3], logits[2, vocabulary - 1], logits[3] = torch.nan, torch.inf, -torch.inf
    for drawn in both(logits, torch.full((5,), 0.999, dtype=torch.float64), Sampling(1)):
        assert drawn.finite.tolist() == [True, False, False, False, True]
        assert ((drawn.token >= 0) & (drawn.token < vocabulary)).all()
