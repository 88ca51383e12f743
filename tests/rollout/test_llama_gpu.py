"""A GPU's decoding step in few kernels, run by Triton's interpreter: what the model itself says, and for which models.

That a GPU can run it is in tests/gpu.
"""

import pytest
import torch
from attention import attended
from decoding import FAMILY, PROMPTS, SEEDS, SHARED, build, generate, hooked
from packed import LLAMA3_ANGLES, unlike_a_fresh_one

from lightning_rlvr.models.llama import rotated, signed
from lightning_rlvr.rollout import decode_attention, llama_gpu
from lightning_rlvr.rollout import shared_prefix as shared
from lightning_rlvr.rollout.llama_gpu import LlamaGpuStep
from lightning_rlvr.rollout.llama_step import LlamaStep
from lightning_rlvr.types import Sampling

pytest.importorskip("triton", reason="needs Triton: pip install triton")
VARIANTS = {
    "untied": {"tie_word_embeddings": False},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "llama3 angles": {"rope_parameters": LLAMA3_ANGLES},
}


def made(name="llama", dtype=torch.float32, **settings):
    return unlike_a_fresh_one(build(name, "shared", dtype, **settings))


@pytest.fixture
def steps(monkeypatch):
    """As on a GPU, with a loop for its attention; counts the steps in few kernels."""
    counted = []
    call = LlamaGpuStep.__call__
    monkeypatch.setattr(LlamaGpuStep, "__call__", lambda *args: counted.append(1) or call(*args))
    monkeypatch.setattr(LlamaStep, "supports", lambda model: False)
    for module in (shared, llama_gpu):
        monkeypatch.setattr(module, "available", lambda dtype, device: dtype != torch.float64)
    monkeypatch.setattr(decode_attention, "attend", attended)
    return counted


def short(model, **kwargs):
    return generate(model, 2, Sampling(max_new_tokens=5), PROMPTS[:3], SEEDS[:3], **kwargs)


def assert_same_as_the_models(model, steps, monkeypatch, **kwargs):
    got = short(model, **kwargs)
    assert len(steps) > 3
    monkeypatch.setattr(LlamaGpuStep, "supports", lambda model: False)
    expected = short(model, **kwargs)
    assert torch.equal(got.response_ids, expected.response_ids)
    torch.testing.assert_close(got.logp, expected.logp, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("name", FAMILY)
def test_each_of_the_family(name, merged, steps, monkeypatch):
    if not merged:
        monkeypatch.setattr(llama_gpu, "MOST_MERGED", 0)
    assert_same_as_the_models(made(name), steps, monkeypatch, max_rows=4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, steps, monkeypatch):
    assert_same_as_the_models(made(**VARIANTS[variant]), steps, monkeypatch)


def test_what_is_sampled_is_near_the_model_in_bfloat16(steps):
    from lightning_rlvr.models.forward import response_logp

    model = made(dtype=torch.bfloat16)
    got = short(model)
    assert len(steps) > 3
    with torch.no_grad():
        gap = (response_logp(model, got, 1.0).logp - got.logp)[got.mask]
    assert float(gap.abs().mean()) < 0.1


def test_a_model_that_says_something_else_is_believed(steps, monkeypatch):
    from lightning_rlvr.kernels import layers

    model = made()
    monkeypatch.setattr(layers, "gated", lambda gate, up: gate * up)
    got = short(model)
    assert len(steps) == 1
    monkeypatch.setattr(LlamaGpuStep, "supports", lambda model: False)
    assert torch.equal(got.response_ids, short(model).response_ids)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("sizes", [(3, 4, 2, 8, 10), (2, 6, 1, 24, 5)], ids=str)
def test_heads_are_turned_and_stored(sizes, norms):
    from lightning_rlvr.kernels import decoding

    rows, of_queries, of_keys, width, columns = sizes
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(rows, of_queries + 2 * of_keys, width, generator=generator)
    own = tuple(torch.zeros(rows + 1, of_keys, columns, width) for _ in range(2))
    cos, sin = torch.randn(2, 20, width, generator=generator)
    position, column = torch.randint(20, (rows,), generator=generator), torch.tensor([columns - 2])
    weights = torch.randn(2, width, generator=generator)
    given = [(weight, 0.1 + i) if norms else (None, 0.0) for i, weight in enumerate(weights)]
    got = decoding.turn_and_store(heads, own, (cos, sin), position, column, given)
    split = heads.split([of_queries, of_keys, of_keys], dim=1)
    if norms:
        normed = (torch.nn.functional.rms_norm(part, (width,), *of) for part, of in zip(split[:2], given, strict=True))
        split = (*normed, split[2])
    angles = cos[position][:, None], signed(sin[position])[:, None]
    torch.testing.assert_close(got, rotated(split[0], *angles))
    torch.testing.assert_close(own[0][:rows, :, columns - 2], rotated(split[1], *angles))
    assert torch.equal(own[1][:rows, :, columns - 2], split[2])
    for stored in own:
        stored[:rows, :, columns - 2] = 0
        assert not stored.any(), "nothing else is written"


CHANGES = {
    "hook": hooked,
    "float64": lambda model: model.double(),
    "one weight": lambda model: model.model.norm.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_as_its_class_says_is_left_to_the_model(change, steps):
    model = made()
    assert LlamaGpuStep.supports(model)
    CHANGES[change](model)
    assert not LlamaGpuStep.supports(model)


def test_other_families_and_gates_are_left_to_the_model(steps):
    assert {name for name in SHARED if LlamaGpuStep.supports(made(name))} == set(FAMILY)
    assert not LlamaGpuStep.supports(made(hidden_act="gelu"))


def test_there_is_none_on_a_cpu():
    assert not LlamaGpuStep.supports(made())
