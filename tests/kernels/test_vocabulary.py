"""The head with kernels between its products, run by Triton's interpreter, against the head without."""

import pytest
import torch

from lightning_rlvr.ops import vocabulary
from lightning_rlvr.ops.linear_logprob import linear_logprob, linear_logprob_loss

pytest.importorskip("triton", reason="needs Triton: pip install triton")
LENGTHS = [10, 0, 20, 7]
V = 5000  # more than a block, and no multiple of it


def of(one_pass, temperature, biased, with_entropy, infinite=False):
    """Values and gradients; the buffer holds fewer tokens than the longest row has."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias, pulls = (
        torch.randn(*shape, generator=generator) for shape in ((37, 24), (V, 24), (V,), (2, 37))
    )
    target = torch.randint(V, (37,), generator=generator)
    if infinite:
        bias[target[0]] = -torch.inf
        target[0] = target[1]
    inputs = [x.requires_grad_() for x in (hidden, weight / 3, *([bias] if biased else []))]
    starts = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]

    def loss_of(logp, entropy, rows):
        tokens = slice(starts[rows.start], starts[rows.stop])
        loss = (logp.exp() * pulls[0, tokens]).sum() + logp.mean().square()
        return loss if entropy is None else loss + (entropy.square() * pulls[1, tokens]).sum()

    given = {"temperature": temperature, "bias": bias if biased else None, "with_entropy": with_entropy}
    given["chunk_bytes"] = 12 * V * 4
    if one_pass:
        loss, values = linear_logprob_loss(*inputs[:2], target, torch.tensor(LENGTHS), loss_of, **given)
    else:
        values = linear_logprob(*inputs[:2], target, **given)
        loss = (values.logp * pulls[0]).sum() + (0 if values.entropy is None else (values.entropy * pulls[1]).sum())
    return [x.detach() for x in values if x is not None], torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", [(False, True), (True, True), (True, False), (True, True, True)], ids=str)
def test_values_and_gradients_are_the_same(one_pass, temperature, kind, monkeypatch):
    (wanted, of_wanted), (got, of_got) = (
        monkeypatch.setattr(vocabulary, "available", lambda dtype, device, there=there: there)
        or of(one_pass, temperature, *kind)
        for there in (False, True)
    )
    for one, other in zip((*got, *of_got), (*wanted, *of_wanted), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
