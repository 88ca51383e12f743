"""Decoding steps in few calls: what the model itself says, for which models, and with weights as they are."""

import pytest
import torch
from decoding import FAMILY, SHARED, build, generate, hooked
from packed import LLAMA3_ANGLES, unlike_a_fresh_one
from torch import nn

from lightning_rlvr.models.lean import lean_layers
from lightning_rlvr.rollout import linear, llama_step
from lightning_rlvr.rollout import shared_prefix as shared
from lightning_rlvr.rollout.llama_step import LlamaStep
from lightning_rlvr.types import Sampling

VARIANTS = {
    "untied": {"tie_word_embeddings": False},
    "biased": {"attention_bias": True},
    "scaled angles": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}},
    "llama3 angles": {"rope_parameters": LLAMA3_ANGLES},
    "gelu": {"hidden_act": "gelu"},
}
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def made(name, **settings):
    return unlike_a_fresh_one(build(name, "shared", torch.float32, **settings))


@pytest.fixture
def steps(monkeypatch):
    """Counts the steps in few calls, and those of the model itself."""
    counted = {"few": 0, "model": 0}

    def watch(kind, name, what):
        before = getattr(kind, name)

        def call(*args):
            counted[what] += 1
            return before(*args)

        monkeypatch.setattr(kind, name, call)

    watch(LlamaStep, "__call__", "few")
    watch(shared.SharedPrefixDecoder, "_pass", "model")
    return counted


def assert_same_as_the_models(model, monkeypatch, **kwargs):
    got = generate(model, **kwargs)
    monkeypatch.setattr(LlamaStep, "supports", lambda model: False)
    expected = generate(model, **kwargs)
    assert torch.equal(got.response_ids, expected.response_ids)
    torch.testing.assert_close(got.logp, expected.logp, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-5, atol=2e-5)
    assert len(set(got.mask.sum(dim=1).tolist())) > 3  # otherwise little was tested


@pytest.mark.parametrize("max_rows", [256, 7])
@pytest.mark.parametrize("name", FAMILY)
def test_each_of_the_family(name, max_rows, steps, monkeypatch):
    assert_same_as_the_models(made(name), monkeypatch, max_rows=max_rows)
    assert steps["few"] > 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, steps, monkeypatch):
    assert_same_as_the_models(made("llama", **VARIANTS[variant]), monkeypatch)
    assert steps["few"] > 1


def test_the_model_is_asked_once_and_that_changes_nothing(steps):
    model = made("llama")
    first, second = generate(model), generate(model)
    assert steps["model"] == 1
    assert steps["few"] > 20
    assert torch.equal(first.logp, second.logp)
    assert torch.equal(first.entropy, second.entropy)


def test_a_model_that_says_something_else_is_believed(steps, monkeypatch):
    expected = generate(made("llama"))
    alone = steps["few"]
    monkeypatch.setattr(llama_step, "_normalized", lambda x, epsilon: x)
    got = generate(made("llama"))
    assert torch.equal(got.response_ids, expected.response_ids)
    assert steps["few"] == alone + 1
    torch.testing.assert_close(got.logp, expected.logp, rtol=1e-5, atol=2e-5)


def test_weights_are_those_of_the_rollout(steps):
    model, greedy = made("llama"), Sampling(max_new_tokens=12, temperature=0.0)
    before = generate(model, sampling=greedy)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.neg_()
        model.model.layers[1].input_layernorm.weight.mul_(-2)
    after = generate(model, sampling=greedy)
    assert not torch.equal(before.response_ids, after.response_ids)
    fresh = made("llama")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(after.response_ids, generate(fresh, sampling=greedy).response_ids)
    assert steps["model"] == 2


def replaced(model):
    model.model.layers[0].mlp.up_proj = nn.Sequential(model.model.layers[0].mlp.up_proj)


def with_adapters(model):
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def patched(model):
    model.model.norm.forward = model.model.norm.forward


CHANGES = {
    "hook": hooked,
    "other layer": replaced,
    "adapters": with_adapters,
    "patched": patched,
    "float64": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    "one weight": lambda model: model.model.norm.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_as_its_class_says_is_left_to_the_model(change):
    model = made("llama")
    assert LlamaStep.supports(model)
    CHANGES[change](model)
    assert not LlamaStep.supports(model)


def test_other_families_are_left_to_the_model():
    assert {name for name in SHARED if LlamaStep.supports(made(name))} == set(FAMILY)


def test_angles_that_follow_the_length_are_left_to_the_model():
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    assert not LlamaStep.supports(made("llama", rope_parameters=dynamic))


def test_where_weights_are_not_packed(monkeypatch):
    model = made("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert not LlamaStep.supports(model)
    monkeypatch.setattr(linear, "MOST_PACKED", 0)
    assert not LlamaStep.supports(model)


def test_layers_of_a_pass_with_gradients_are_not_in_the_way():
    model = made("llama")
    with lean_layers(model.model):
        assert not LlamaStep.supports(model)
    assert LlamaStep.supports(model)
