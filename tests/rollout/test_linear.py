"""A decoding step's linear layers with weights that are packed once."""

import pytest
import torch
from support import TinyPolicy
from torch import nn

from lightning_rlvr.rollout import linear as module
from lightning_rlvr.rollout.linear import PreparedOnce, packs_weights
from lightning_rlvr.rollout.llama_step import LlamaStep
from lightning_rlvr.rollout.transformers_engine import TransformersEngine
from lightning_rlvr.types import Sampling

PROMPTS, SEEDS, SAMPLING = [[40, 41, 42], [7], [5, 6, 7, 8]], [1, 2, 3], Sampling(max_new_tokens=8)
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture
def used(monkeypatch):
    """Notes the layers whose weights are packed, and each product with them."""
    packed, calls, pack, compute = [], [], module.packed, module.multiplied
    monkeypatch.setattr(module, "packed", lambda weight: packed.append(weight.shape) or pack(weight))
    monkeypatch.setattr(module, "multiplied", lambda *args: calls.append(args[0].shape) or compute(*args))
    monkeypatch.setattr(LlamaStep, "supports", lambda model: False)
    return packed, calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 48), (1, 1, 48), (5, 1, 48), (2, 3, 4, 48), (300, 1, 48)])
def test_a_layer_gives_what_it_gives(shape, bias):
    layer, x = nn.Linear(48, 70, bias=bias), torch.randn(shape)
    with torch.inference_mode(), PreparedOnce(module.packed, module.multiplied) as mode:
        got = [layer(x), layer(x)]
    assert len(mode.weights) == 1
    for y in got:
        assert y.is_contiguous()
        torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-6)


def test_rows_are_of_few_numbers(monkeypatch):
    """oneDNN keeps code for each."""
    seen, ready = [], module.packed(torch.randn(70, 48))
    pad = module.pad
    monkeypatch.setattr(module, "pad", lambda x, more: seen.append(len(x) + more[-1]) or pad(x, more))
    for rows in range(1, 2 * module.ROWS + 1):
        assert module.multiplied(torch.ones(rows, 48), ready).shape == (rows, 70)
    assert set(seen) == {module.ROWS, 2 * module.ROWS}
    assert len(seen) == 2 * module.ROWS - 2


def test_rollouts_are_the_same(used, monkeypatch):
    packed, calls = used
    policy = TinyPolicy().load()
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(15)
    engine = TransformersEngine.of(policy)
    got = engine.generate(PROMPTS, SEEDS, 4, SAMPLING)
    assert len(packed) == sum(type(part) is nn.Linear for part in policy.model.modules()) < len(calls)
    calls.clear()
    monkeypatch.setattr(module, "MOST_PACKED", 0)
    expected = engine.generate(PROMPTS, SEEDS, 4, SAMPLING)
    assert not calls
    assert torch.equal(got.response_ids, expected.response_ids)
    torch.testing.assert_close(got.logp, expected.logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-5, atol=1e-5)


def test_weights_are_packed_anew_for_each_rollout(used):
    policy = TinyPolicy().load()
    engine, greedy = TransformersEngine.of(policy), Sampling(max_new_tokens=8, temperature=0.0)
    before = engine.generate(PROMPTS, SEEDS, 1, greedy)
    with torch.no_grad():
        policy.model.lm_head.weight.neg_()
    after = engine.generate(PROMPTS, SEEDS, 1, greedy)
    assert not torch.equal(before.response_ids[:, 1:], after.response_ids[:, 1:])


@pytest.mark.parametrize(("dtype", "taken"), [("float32", True), ("float64", False), ("bfloat16", False)])
def test_only_float32_is_packed(dtype, taken, used):
    assert packs_weights(TinyPolicy(dtype=dtype).load().model, "cpu") is taken


def test_weights_that_are_too_many_to_be_held_twice_are_not_packed(used, monkeypatch):
    model = TinyPolicy().load().model
    assert not packs_weights(model, "cuda")
    monkeypatch.setattr(module, "MOST_PACKED", sum(weight.nbytes for weight in model.parameters()))
    assert packs_weights(model, "cpu")
    monkeypatch.setattr(module, "MOST_PACKED", module.MOST_PACKED - 1)
    assert not packs_weights(model, "cpu")
