"""Lean layers against the layers' own forward and backward passes."""

import gc
import weakref

import pytest
import torch
from packed import batch, built, distance, gpt2, gradients
from support import TinyPolicy

from lightning_rlvr.models import LoRA, finish_model, lean
from lightning_rlvr.models.forward import response_logp
from lightning_rlvr.models.lean import find_lean, gated_mlp, lean_layers, rms_norm
from lightning_rlvr.models.packing import run_backbone
from lightning_rlvr.preflight.trace import LiveBytes

pytestmark = pytest.mark.usefixtures("lean_however_small")
BLOCK = {"mlp": gated_mlp, "input_layernorm": rms_norm, "post_attention_layernorm": rms_norm}
MLP = {"mlp": gated_mlp}
NORMS = {"self_attn.q_norm": rms_norm, "self_attn.k_norm": rms_norm}


def llama():
    return built("Llama", tie_word_embeddings=False)


@pytest.mark.parametrize(
    ("made", "of_layer", "outside"),
    [
        (llama, BLOCK, {"norm": rms_norm}),
        (lambda: built("Qwen3"), BLOCK | NORMS, {"norm": rms_norm}),
        (lambda: built("Gemma2"), MLP, {}),  # its norms scale by 1 + w
        (lambda: built("Olmo2"), MLP, {}),  # its norms round after the scale
        (lambda: built("Cohere"), MLP, {}),  # its norms take the mean away
        (gpt2, {}, {}),
    ],
    ids=["llama", "qwen3", "gemma2", "olmo2", "cohere", "gpt2"],
)
def test_what_is_lean_is_found(made, of_layer, outside):
    wanted = {f"layers.{i}.{name}": kind for i in range(2) for name, kind in of_layer.items()}
    assert find_lean(made().get_decoder()) == wanted | outside


def both(module, forward, x, autocast=None):
    """Output, and gradients of input and weights, of a module's own way and of the lean one."""
    pull = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    results = []
    for way in (module, lambda x: forward(module, x)):
        start = x.clone().requires_grad_()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            y = way(start)
        results.append((y.detach(), torch.autograd.grad(y, [start, *module.parameters()], pull.to(y.dtype))))
    return results


def inputs(*shape):
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "relu2"])
def test_a_gated_mlp_is_its_own_to_the_bit(dtype, autocast, act):
    module = built("Llama", hidden_act=act).model.layers[0].mlp.to(dtype)
    (y, wanted), (y_lean, got) = both(module, gated_mlp, inputs(2, 5, 32).to(dtype), autocast)
    assert torch.equal(y_lean, y)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("shape", [(2, 5, 32), (2, 3, 4, 32), (1, 1, 32), (7, 32)])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_norm_has_the_gradient_of_its_definition(shape, autocast):
    module = llama().model.norm
    torch.nn.init.normal_(module.weight)
    x = inputs(*shape)
    (y, own), (y_lean, got) = both(module, rms_norm, x, autocast)
    assert torch.equal(y_lean, y)
    start, weight = x.double().requires_grad_(), module.weight.detach().double().requires_grad_()
    exact = weight * start / (start.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
    pull = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    wanted = torch.autograd.grad(exact, [start, weight], pull)
    for a, b, c in zip(got, own, wanted, strict=True):
        assert (a - c).norm() < 1e-6 * c.norm()
        assert (a - b).norm() < 1e-6 * c.norm()


def test_a_narrow_norm_is_as_near_to_its_definition_as_its_own():
    module, x = llama().model.norm, inputs(40, 32)
    torch.nn.init.normal_(module.weight)
    weight = module.weight.detach().bfloat16()
    module.weight.data.copy_(weight)
    _, wanted = both(module, rms_norm, x.bfloat16().float())[0]
    (y, own), (y_lean, got) = both(module.bfloat16(), rms_norm, x.bfloat16())
    assert torch.equal(y_lean, y)
    for a, b, c in zip(got, own, wanted, strict=True):
        assert a.dtype == b.dtype
        assert (a - c).norm() <= 1.05 * (b - c).norm() < 0.02 * c.norm()


def test_a_wide_norm_is_its_own_to_the_bit():
    (y, wanted), (y_lean, got) = both(llama().double().model.norm, rms_norm, inputs(5, 32).double())
    assert torch.equal(y_lean, y)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def activations(backbone):
    ids = torch.arange(2, 62).view(3, 20)
    with LiveBytes() as live:
        states = run_backbone(backbone, ids, torch.ones_like(ids).bool())
        kept = live.now
    assert states.requires_grad
    return kept


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.68), (torch.bfloat16, 0.6)])
def test_less_is_kept(dtype, share, monkeypatch):
    backbone = built("Llama", intermediate_size=128).to(dtype).get_decoder()
    kept = activations(backbone)
    monkeypatch.setattr("lightning_rlvr.models.lean.find_lean", lambda backbone: {})
    assert kept < share * activations(backbone)


def test_what_is_kept_goes_with_the_backward_pass():
    backbone = llama().get_decoder()
    ids = torch.arange(2, 22)[None]
    gc.disable()  # nothing may wait for it
    try:
        with LiveBytes() as live:
            run_backbone(backbone, ids, torch.ones_like(ids).bool()).sum().backward()
            gradients = sum(p.nbytes for p in backbone.parameters())
            assert live.now < gradients + 10_000
    finally:
        gc.enable()


@pytest.mark.parametrize("targets", ["all-linear", ["down_proj"], ["q_proj"]])
def test_adapters_have_their_own_gradients(targets, monkeypatch):
    pytest.importorskip("peft")
    model = LoRA(TinyPolicy(), rank=4, targets=targets).load().model
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    got = gradients(model, response_logp(model, batch(), 1.0).logp.sum())
    monkeypatch.setattr("lightning_rlvr.models.lean.find_lean", lambda backbone: {})
    wanted = gradients(model, response_logp(model, batch(), 1.0).logp.sum())
    assert distance(got, wanted) < 1e-5


def patched(backbone):
    return {name for name, part in backbone.named_modules() if "forward" in vars(part)}


def test_layers_are_lean_within_a_pass_only(monkeypatch):
    backbone = llama().get_decoder()
    with lean_layers(backbone):
        assert patched(backbone) == set(find_lean(backbone))
    with pytest.raises(KeyError), lean_layers(backbone):
        raise KeyError
    assert not patched(backbone)
    with torch.no_grad(), lean_layers(backbone):
        assert not patched(backbone)
    monkeypatch.setattr(lean, "available", lambda dtype, device: True)
    with torch.no_grad(), lean_layers(backbone):
        assert patched(backbone) == set(find_lean(backbone)), "kernels are faster without gradients too"


@pytest.mark.parametrize("missing", [0, 1])
def test_small_inputs_are_left_to_the_layers(missing, monkeypatch):
    backbone, ids = llama().get_decoder(), torch.arange(2, 22)[None]
    find_lean(backbone)
    taken, apply = [], lean._RMSNorm.apply
    monkeypatch.setattr(lean._RMSNorm, "apply", lambda *args: taken.append(1) or apply(*args))
    monkeypatch.setattr(lean, "LEAST", 32 * ids.numel() + missing)
    run_backbone(backbone, ids, torch.ones_like(ids).bool()).sum().backward()
    assert len(taken) == (0 if missing else 5)


def test_recomputed_layers_keep_nothing_of_their_own():
    model = finish_model(llama())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with lean_layers(model.get_decoder()):
        assert not patched(model)


def test_a_forward_that_others_have_set_stays():
    model = llama()
    find_lean(model.model)
    mine = model.model.norm.forward = lambda x: x
    with lean_layers(model.model):
        assert model.model.norm.forward is mine
        assert patched(model.model) == set(find_lean(model.model))
    assert patched(model.model) == {"norm"}
    assert model.model.norm.forward is mine


def test_layers_of_another_kind_keep_their_own_way():
    model = llama()

    class Doubled(type(model.model.norm)):
        def forward(self, x):
            return 2 * super().forward(x)

    class Swapped(type(model.model.layers[0].mlp)):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    model.model.norm.__class__ = Doubled
    model.model.layers[0].mlp.__class__ = Swapped
    assert {"norm", "layers.0.mlp"}.isdisjoint(find_lean(model.model))
    assert "layers.1.mlp" in find_lean(model.model)


def test_looking_draws_no_random_numbers():
    backbone, before = llama().get_decoder(), torch.get_rng_state()
    assert find_lean(backbone)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_found_does_not_hold_the_model():
    backbone = llama().get_decoder()
    find_lean(backbone)
    gone = weakref.ref(backbone)
    del backbone
    gc.collect()
    assert gone() is None
