"""A decoding step's linear layers with the weight on the left."""

import pytest
import torch
from support import TinyPolicy
from torch import nn

from lightning_rlvr.rollout import linear as module
from lightning_rlvr.rollout.linear import from_memory
from lightning_rlvr.rollout.transformers_engine import TransformersEngine
from lightning_rlvr.types import Sampling

PROMPTS, SEEDS, SAMPLING = [[40, 41, 42], [7], [5, 6, 7, 8]], [1, 2, 3], Sampling(max_new_tokens=8)


@pytest.fixture
def used(monkeypatch):
    """Lets any model be large enough, and counts the layers that are computed so."""
    calls, compute = [], module._linear
    monkeypatch.setattr(module, "CACHED_BYTES", 0)
    monkeypatch.setattr(module, "_linear", lambda *args: calls.append(args[0].shape) or compute(*args))
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 6), (5, 1, 6), (2, 3, 4, 6)])
def test_a_layer_gives_what_it_gives(shape, bias, used):
    layer, x = nn.Linear(6, 7, bias=bias), torch.randn(shape)
    with torch.no_grad(), module._WeightsFirst():
        got = layer(x)
    assert len(used) == 1
    assert got.is_contiguous()
    torch.testing.assert_close(got, layer(x))


def test_rollouts_are_the_same(used, monkeypatch):
    policy = TinyPolicy().load()
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(15)
    engine = TransformersEngine.of(policy)
    got = engine.generate(PROMPTS, SEEDS, 4, SAMPLING)
    assert used
    used.clear()
    monkeypatch.setattr(module, "CACHED_BYTES", 2**40)
    expected = engine.generate(PROMPTS, SEEDS, 4, SAMPLING)
    assert not used
    assert torch.equal(got.response_ids, expected.response_ids)
    torch.testing.assert_close(got.logp, expected.logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-5, atol=1e-5)


def test_more_rows_are_left_to_the_layers(used):
    policy = TinyPolicy().load()
    TransformersEngine.of(policy).generate([[40]], [1], 2 * module.ROWS, Sampling(max_new_tokens=2))
    assert not used


@pytest.mark.parametrize(("dtype", "taken"), [("float32", True), ("float64", False), ("bfloat16", False)])
def test_only_float32_is_worth_it(dtype, taken, used):
    assert from_memory(TinyPolicy(dtype=dtype).load().model) is taken
