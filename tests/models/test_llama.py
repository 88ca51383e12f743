"""Layers of the Llama family in few calls, against their own forward and backward passes."""

import pytest
import torch
from packed import LLAMA3_ANGLES, batch, built, distance, gradients, unlike_a_fresh_one
from support import TinyPolicy, exact
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rlvr.models import LoRA, flat, forward, lean, llama
from lightning_rlvr.models.forward import packs, response_logp, response_loss
from lightning_rlvr.preflight.trace import LiveBytes

pytestmark = pytest.mark.usefixtures("lean_however_small")
MODELS = {
    "llama": ("Llama", {}),
    "llama, gelu": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama, scaled angles": ("Llama", {"rope_parameters": LLAMA3_ANGLES}),
    "mistral, a head of its own width": ("Mistral", {"head_dim": 16, "sliding_window": None}),
    "qwen2, biases": ("Qwen2", {}),
    "qwen3, norms of heads": ("Qwen3", {}),
    "qwen3, tied, every head its own keys": ("Qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
}


def made(name, **settings):
    return unlike_a_fresh_one(built(name, **{"tie_word_embeddings": False} | settings))


def loss_of(model):
    return response_loss(model, batch(), 0.8, lambda values, rows: (values.logp.cumsum(1) * values.entropy).sum(), True)


@pytest.fixture
def runs(monkeypatch):
    """Counts passes in few calls."""
    counted, before = [], llama.run

    def run(*args):
        counted.append(args)
        return before(*args)

    monkeypatch.setattr(llama, "run", run)
    return counted


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_the_models_own_layers(name, dtype, bound, runs, monkeypatch):
    monkeypatch.setattr(flat, "CPU_PADDING", 3)  # several calls of attention
    kind, settings = MODELS[name]
    model = exact(made(kind, **settings).to(dtype))
    assert packs(model)
    runs.clear()
    got, values = gradients(model, loss_of(model)), response_logp(model, batch(), 0.8).logp
    assert len(runs) == 2
    monkeypatch.setattr(llama, "runs", lambda decoder: False)
    wanted, own = gradients(model, loss_of(model)), response_logp(model, batch(), 0.8).logp
    assert len(runs) == 2
    assert distance(got, wanted) < bound
    assert (values - own).abs().max() < bound * own.abs().max()


def test_what_is_not_trained_has_no_gradient_and_changes_none():
    model = exact(made("Qwen3", attention_bias=False).double())
    everything = gradients(model, loss_of(model))
    for trained in ("embed_tokens", "k_norm", "v_proj", "o_proj", "up_proj", "0.post_attention_layernorm"):
        for name, weight in model.named_parameters():
            weight.requires_grad_(trained in name)
        wanted = {name: everything[name] for name, weight in model.named_parameters() if weight.requires_grad}
        assert wanted
        assert distance(gradients(model, loss_of(model)), wanted) < 1e-11


def test_attentions_dropout_is_that_of_training(runs, monkeypatch):
    model = made("Llama", attention_dropout=0.5)
    packs(model)
    runs.clear()
    results = []
    for few in (True, False):
        if not few:
            assert len(runs) == 2
            monkeypatch.setattr(llama, "runs", lambda decoder: False)
        for training in (True, False):
            model.train(training)
            torch.manual_seed(0)
            results.append(response_logp(model, batch(), 1.0).logp)
    for mine, own in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(results[0], results[1], atol=1e-2)


def hooked(model, register):
    getattr(model.model.layers[1].mlp.down_proj, register)(lambda *args: None)
    return model


def replaced(model, name, part):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, part)
    return model


class Halved(nn.Linear):
    """A layer that is more than linear."""

    def forward(self, x):
        return super().forward(x) / 2


OTHERS = {
    "biases after attention": lambda: made("Llama", attention_bias=True),
    "biases of the MLP": lambda: made("Llama", mlp_bias=True),
    "another architecture": lambda: built("Olmo2"),
    "half precision": lambda: made("Llama").bfloat16(),
    "norms in float32": lambda: made("Llama").double(),
    "mixed dtypes": lambda: replaced(made("Llama"), "model.layers.0.mlp.up_proj", nn.Linear(32, 48, False).double()),
    "another layer": lambda: replaced(made("Llama"), "model.layers.0.mlp.up_proj", Halved(32, 48, bias=False)),
    "an activation that learns": lambda: replaced(made("Llama"), "model.layers.1.mlp.act_fn", nn.PReLU()),
    "a hook": lambda: hooked(made("Llama"), "register_forward_hook"),
    "a hook before": lambda: hooked(made("Llama"), "register_forward_pre_hook"),
    "a hook of the gradient": lambda: hooked(made("Llama"), "register_full_backward_hook"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_run_themselves(name):
    assert llama.runs(made("Llama").model)
    assert not llama.runs(OTHERS[name]().get_decoder())


def test_layers_with_adapters_run_themselves():
    pytest.importorskip("peft")
    assert not llama.runs(LoRA(TinyPolicy(), rank=2, targets=["up_proj"]).load().model.get_decoder())


def test_a_forward_of_ones_own_is_called(runs):
    model, called = made("Llama"), []
    packs(model)
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: called.append(x) or forward(x)
    runs.clear()
    loss_of(model).backward()
    assert called
    assert not runs


def test_under_autocast_layers_run_themselves():
    decoder = made("Llama").model
    with torch.autocast("cpu", torch.bfloat16):
        assert not llama.runs(decoder)


class Calls(TorchDispatchMode):
    """Counts what is dispatched."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_it_takes_fewer_calls_and_keeps_less(name, monkeypatch):
    calls, kept = {}, {}
    for few in (True, False):
        if not few:
            monkeypatch.setattr(llama, "runs", lambda decoder: False)
        of = {}
        for layers in (2, 4):
            model = made(name, num_hidden_layers=layers)
            packs(model)
            loss_of(model).backward()
            with Calls() as dispatched:
                loss_of(model).backward()
            with LiveBytes() as live:
                loss = loss_of(model)
                of[layers] = dispatched.count, live.now
            del loss
        calls[few], kept[few] = (b - a for a, b in zip(of[2], of[4], strict=True))
    assert lean.LEAST == 0  # both ways are lean
    assert calls[True] < 0.75 * calls[False]
    assert kept[True] < 0.9 * kept[False]


def test_layers_that_have_come_to_compute_otherwise_run_themselves(monkeypatch):
    monkeypatch.setattr(llama, "_scale", lambda x, epsilon: torch.ones(len(x), 1))
    model = made("Llama")
    assert packs(model)
    assert model not in forward._FLAT
