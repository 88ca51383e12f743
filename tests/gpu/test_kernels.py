"""What runs otherwise on a GPU than on a CPU: the kernel and graphs of decoding steps, the head's products."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from attention import attended, problem
from packed import batch, built, gradients, unlike_a_fresh_one

from lightning_rlvr.models.forward import response_logp, response_loss
from lightning_rlvr.ops.linear_logprob import linear_logprob, linear_logprob_loss
from lightning_rlvr.rollout import TransformersEngine, decode_attention, graphs
from lightning_rlvr.rollout.llama_gpu import LlamaGpuStep
from lightning_rlvr.types import Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
PROMPTS = [[40 + i % 7, 5, 9, 2 + i][: 1 + i % 4] for i in range(40)]
SEEDS, SAMPLING, ENDS = list(range(40)), Sampling(max_new_tokens=48), [1, 2, 3]


def model_of(device, dtype=torch.float32):
    """A small model whose logits matter, with the same weights on every device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)
    return model.to(device, dtype)


def generate(model, max_rows=256):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without CUDA graphs")
        return TransformersEngine(model, ENDS, 0, max_rows).generate(PROMPTS, SEEDS, 4, SAMPLING)


@pytest.mark.parametrize("max_rows", [256, 24])
def test_graphs_sample_what_a_cpu_does(max_rows, monkeypatch):
    """Rows leave, others join in their places, and prompts need more room."""
    replayed, run = [], graphs.Graphs.run
    monkeypatch.setattr(graphs.Graphs, "run", lambda self, *args: replayed.append(args[0]) or run(self, *args))
    got, expected = (generate(model_of(device), max_rows) for device in ("cuda", "cpu"))
    assert len(replayed) > 3 * len(set(replayed)) > 12, "a graph serves many steps"
    same = (got.response_ids.cpu() == expected.response_ids).all(dim=1)
    assert float(same.float().mean()) > 0.95, "rounding may turn a token"
    for name in ("logp", "entropy"):
        torch.testing.assert_close(getattr(got, name).cpu()[same], getattr(expected, name)[same], rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_a_step_in_few_kernels_says_what_the_model_does(name, dtype, monkeypatch):
    """Also after another step of the model's own, which it is compared with."""
    stepped, call = [], LlamaGpuStep.__call__
    monkeypatch.setattr(LlamaGpuStep, "__call__", lambda *args: stepped.append(1) or call(*args))
    settings = {"sliding_window": None} if name == "Mistral" else {}
    model = unlike_a_fresh_one(built(name, **settings)).to(
        "cuda", torch.bfloat16 if dtype == "bfloat16" else torch.float32
    )
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == "autocast", cache_enabled=False):
        got, again = generate(model), generate(model)
        assert len(stepped) > 4, "once by itself, then in graphs of several sizes"
        assert torch.equal(got.response_ids, again.response_ids)
        monkeypatch.setattr(LlamaGpuStep, "supports", lambda model: False)
        expected = generate(model)
    if dtype != "float32":  # a token that turns by rounding turns all that follow
        first = (got.logp - expected.logp)[:, :2][(got.response_ids == expected.response_ids)[:, :2]]
        assert float(first.abs().mean()) < 0.1
        return
    same = (got.response_ids == expected.response_ids).all(dim=1)
    assert float(same.float().mean()) > 0.95
    torch.testing.assert_close(got.logp[same], expected.logp[same], rtol=0, atol=1e-3)
    torch.testing.assert_close(got.entropy[same], expected.entropy[same], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("heads", "of_keys", "width"), [(4, 2, 64), (12, 2, 128), (6, 6, 80), (9, 3, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 200])
def test_the_kernel_attends_to_what_a_row_sees(heads, of_keys, width, dtype, rows):
    query, layer, seen = problem(rows, heads, of_keys, width, 5, 150, 300, 420, "cuda", dtype)
    got = decode_attention.attend(query, layer, seen, 0.1)
    assert not got[rows - 1].any()
    expected = attended(query.double(), layer, seen, 0.1)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    error, size = (x[:-1].flatten(1).norm(dim=1) for x in (got - expected, expected))
    assert (error < tolerance * size).all()


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [(torch.float32, False, 1e-4), (torch.bfloat16, False, 0.1), (torch.float32, True, 0.1)],
    ids=["float32", "bfloat16", "autocast"],
)
def test_the_training_pass_meets_what_was_sampled(dtype, autocast, tolerance):
    model = model_of("cuda", dtype)
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if autocast else nullcontext():
        got = generate(model, 64)
        with torch.no_grad():
            values = response_logp(model, got, 1.0, with_entropy=True)
    assert float((got.logp - values.logp)[got.mask].abs().mean()) < tolerance
    assert float((got.entropy - values.entropy)[got.mask].abs().mean()) < tolerance


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [(torch.float32, False, 1e-4), (torch.bfloat16, False, 0.1), (torch.float32, True, 0.1)],
    ids=["float32", "bfloat16", "autocast"],
)
@pytest.mark.usefixtures("lean_however_small")
def test_an_update_has_the_gradient_of_a_cpu_in_float64(dtype, autocast, tolerance):
    """Prompts once, lean layers, the head in one pass, each pass's gradients at once."""

    def of(device, dtype):
        model, rollouts = built("Llama").to(device, dtype), batch().to(device)
        loss = response_loss(model, rollouts, 0.7, lambda v, rows: (v.logp + v.entropy).sum(), True)
        return {name: gradient.cpu().double() for name, gradient in gradients(model, loss).items()}

    wanted = of("cpu", torch.float64)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False):
        got = of("cuda", dtype)
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() < tolerance * gradient.norm(), name


def test_graphs_see_weights_that_an_update_has_changed():
    model = model_of("cuda")
    before = generate(model, 256)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    after = generate(model, 256)
    assert not torch.equal(before.response_ids[:, :5], after.response_ids[:, :5])
    with torch.no_grad():
        gap = response_logp(model, after, 1.0).logp - after.logp
    assert float(gap[after.mask].abs().max()) < 1e-3


@pytest.mark.parametrize("factors", ["float64", "float32", "bfloat16", "autocast"])
def test_the_head_agrees_with_a_cpu_in_float64(factors):
    tolerance = {"float64": 1e-12, "float32": 1e-5}.get(factors, 2e-2)
    dtype = torch.float32 if factors == "autocast" else getattr(torch, factors)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(700, 96, generator=generator, dtype=torch.float64)
    weight = torch.randn(1000, 96, generator=generator, dtype=torch.float64) / 5
    target = torch.randint(1000, (700,), generator=generator)
    pull = torch.randn(2, 700, generator=generator, dtype=torch.float64)

    def values(one_pass, device, dtype):
        inputs = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
        at, g = target.to(device), pull.to(device)
        if one_pass:
            loss, found = linear_logprob_loss(
                *inputs,
                at,
                torch.full((70,), 10),
                lambda logp, entropy, rows: (
                    logp * g[0, rows.start * 10 : rows.stop * 10] + entropy * g[1, rows.start * 10 : rows.stop * 10]
                ).sum(),
                0.8,
                chunk_bytes=2**20,
            )
        else:
            found = linear_logprob(*inputs, at, 0.8, chunk_bytes=2**20)
            loss = (found.logp * g[0] + found.entropy * g[1]).sum()
        return [x.detach().cpu().double() for x in (*found, *torch.autograd.grad(loss, inputs))]

    for one_pass in (True, False):
        expected = values(one_pass, "cpu", torch.float64)
        with torch.autocast("cuda", torch.bfloat16) if factors == "autocast" else nullcontext():
            got = values(one_pass, "cuda", dtype)
        for a, b in zip(got, expected, strict=True):
            assert float((a - b).norm() / b.norm()) < tolerance
