"""Kernels of a layer, run by Triton's interpreter, against torch."""

import pytest
import torch
from torch.nn.functional import rms_norm, silu

from lightning_rlvr import kernels
from lightning_rlvr.models import lean
from lightning_rlvr.models.lean import gated_mlp

pytest.importorskip("triton", reason="needs Triton: pip install triton")
SIZES = [(1, 16), (5, 24), (7, 100)]
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got, wanted, dtype):
    tolerance = DTYPES[dtype]
    torch.testing.assert_close(got.float(), wanted.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "there"), [("float32", True), ("bfloat16", True), ("float64", False)])
def test_where_there_are_kernels(dtype, there, monkeypatch):
    monkeypatch.setattr(kernels, "_run", lambda dtype, device: True)
    assert kernels.available(getattr(torch, dtype), torch.device("cuda")) is there
    assert not kernels.available(getattr(torch, dtype), torch.device("cpu"))


def test_where_triton_cannot_run_them_torch_does_and_that_is_said_once(monkeypatch, recwarn):
    from lightning_rlvr.kernels import layers

    def fail(gate, up):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    kernels._run.cache_clear()
    cpu = torch.device("cpu")
    assert kernels._run(torch.float32, cpu)
    monkeypatch.setattr(layers, "gated", fail)
    with pytest.warns(UserWarning, match=r"bfloat16 on cpu, so torch.*slower: Failed to find C compiler\. It needs"):
        assert not kernels._run(torch.bfloat16, cpu)
    assert not kernels._run(torch.bfloat16, cpu)
    assert kernels._run(torch.float32, cpu), "found out once"
    assert not [w for w in recwarn if "compiler" in str(w.message)]
    kernels._run.cache_clear()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("adds", [True, False])
def test_a_sum_and_its_norm(size, dtype, out, adds):
    from lightning_rlvr.kernels import layers

    x, y, weight = normal(*size, dtype=dtype), normal(*size, seed=1, dtype=out), normal(size[1], seed=2, dtype=dtype)
    total = x + y if adds else x.clone()
    got = layers.add_norm(x, y if adds else None, weight, 0.1, out)
    assert got.dtype == out
    close(x, total, dtype)
    close(got, rms_norm(total.float(), size[1:], weight.float(), 0.1), torch.bfloat16 if out != dtype else dtype)


@pytest.mark.parametrize("size", [*SIZES, (700, 8)])  # more rows than programs
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_and_its_gradient(size, dtype, monkeypatch):
    from lightning_rlvr.kernels import layers

    monkeypatch.setattr(layers, "PROGRAMS", 50)
    x, weight, pull = normal(*size, dtype=dtype), normal(size[1], seed=1, dtype=dtype), normal(*size, seed=2)
    leaves = x.float().requires_grad_(), weight.float().requires_grad_()
    wanted = rms_norm(leaves[0], size[1:], leaves[1], 0.1)
    y, scale = layers.norm(x, weight, 0.1)
    close(y, wanted.detach(), dtype)
    torch.testing.assert_close(scale, (x.float().square().mean(1) + 0.1).rsqrt())
    of_x, of_weight = torch.autograd.grad(wanted, leaves, pull)
    got_x, got_weight = layers.norm_pull(pull.to(dtype), x, weight, scale, True)
    close(got_x, of_x, dtype)
    assert (got_weight - of_weight).norm() < DTYPES[dtype] * of_weight.norm()
    assert layers.norm_pull(pull.to(dtype), x, weight, scale, False)[1] is None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_and_its_gradient(size, dtype, monkeypatch):
    from lightning_rlvr.kernels import layers

    monkeypatch.setattr(layers, "GATED", 32)
    side_by_side, pull = 3 * normal(size[0], 2 * size[1], dtype=dtype), normal(*size, seed=1, dtype=dtype)
    gate, up = side_by_side.chunk(2, dim=1)
    leaves = gate.float().requires_grad_(), up.float().requires_grad_()
    wanted = silu(leaves[0]) * leaves[1]
    close(layers.gated(gate, up), wanted.detach(), dtype)
    of_both = torch.autograd.grad(wanted, leaves, pull.float())
    got = layers.gated_pull(pull, gate.contiguous(), up.contiguous())
    for one, other in zip(got, of_both, strict=True):
        close(one, other, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lean_layers_take_them(dtype, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm

    config = LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2)
    mlp, norm = LlamaMLP(config).to(dtype), LlamaRMSNorm(24).to(dtype)
    start, pull = normal(2, 3, 24, dtype=dtype), normal(2, 3, 24, seed=1, dtype=dtype)
    results = []
    for there in (False, True):
        monkeypatch.setattr(lean, "available", lambda dtype, device, there=there: there)
        x = start.clone().requires_grad_()
        y = lean.rms_norm(norm, x) + gated_mlp(mlp, x)
        leaves = [x, *norm.parameters(), *mlp.parameters()]
        results.append((y.detach(), torch.autograd.grad(y, leaves, pull)))
    (wanted, of_wanted), (got, of_got) = results
    close(got, wanted, dtype)
    for one, other in zip(of_got, of_wanted, strict=True):
        assert (one - other).norm() < DTYPES[dtype] * other.norm()


def test_other_gates_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(lean, "available", lambda dtype, device: True)
    gate, up = normal(2, 8), normal(2, 8, seed=1)
    torch.testing.assert_close(lean.gated(torch.nn.GELU(), gate, up), torch.nn.functional.gelu(gate) * up)
