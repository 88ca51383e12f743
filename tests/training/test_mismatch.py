"""A sampler that is not the trainer: its word is checked on the first rollout batch and corrected in all."""

import math
from dataclasses import replace

import pytest
import torch
from support import TinyPolicy, train, weights

from lightning_rlvr.objectives import GRPO
from lightning_rlvr.rollout import VLLM, TransformersEngine
from lightning_rlvr.training import RLVRModule, module, update
from lightning_rlvr.training.mismatch import corrected
from lightning_rlvr.types import Rollouts, Sampling, TokenPlan, TokenStats, UserError


@pytest.fixture
def shift(monkeypatch):
    """vLLM played by our own engine, which tells no entropy and log-probabilities that are off by `shift["nats"]`."""
    told = {"nats": 0.0, "made": 0}

    class Sampler(TransformersEngine):
        def __init__(self, policy, settings, max_rows):
            told["made"] += 1
            super().__init__(policy.model, policy.eos_ids, policy.tokenizer.pad_token_id, max_rows)

        def generate(self, *args):
            rollouts = super().generate(*args)
            logp = (rollouts.logp + told["nats"]).masked_fill(~rollouts.mask, 0.0)
            return replace(rollouts, logp=logp, entropy=rollouts.entropy.masked_fill(rollouts.mask, torch.nan))

    monkeypatch.setattr(module, "VLLMEngine", Sampler)
    return told


def test_a_sampler_that_agrees_changes_nothing(tmp_path, shift):
    plain = weights(train(tmp_path, recompute_logp=True)[0])
    trained, trainer = train(tmp_path, vllm=VLLM())
    for name, weight in weights(trained).items():
        torch.testing.assert_close(weight, plain[name], rtol=0, atol=1e-10)
    assert shift["made"] == 1
    assert trainer.logged_metrics["train/sampler/importance"] == pytest.approx(1)
    assert trainer.logged_metrics["train/sampler/gap"] == pytest.approx(0, abs=1e-10)
    assert math.isfinite(trainer.logged_metrics["train/entropy"])


@pytest.mark.parametrize(("probability", "weight", "cut"), [(0.8, 1.25, 0.0), (0.4, 2.0, 1.0), (1.25, 0.8, 0.0)])
def test_the_gradient_is_weighted_by_the_truncated_ratio(tmp_path, shift, probability, weight, cut):
    plain = train(tmp_path, objective=GRPO(), updates=1)[1].logged_metrics["train/grad_norm"]
    shift["nats"] = math.log(probability)
    logged = train(tmp_path, objective=GRPO(), updates=1, vllm=VLLM(tolerance=2.0))[1].logged_metrics
    assert logged["train/grad_norm"] == pytest.approx(weight * float(plain), rel=1e-6)
    assert logged["train/sampler/gap"] == pytest.approx(abs(math.log(probability)), rel=1e-6)
    assert logged["train/sampler/kl"] == pytest.approx(math.log(probability), rel=1e-6)
    assert logged["train/sampler/truncated"] == cut


def test_without_a_bound_nothing_is_weighted(tmp_path, shift):
    plain = train(tmp_path, objective=GRPO(), updates=1)[1].logged_metrics["train/grad_norm"]
    shift["nats"] = math.log(0.5)
    logged = train(tmp_path, objective=GRPO(), updates=1, vllm=VLLM(tolerance=2.0, max_importance=None))[1]
    assert logged.logged_metrics["train/grad_norm"] == pytest.approx(float(plain), rel=1e-6)
    assert "train/sampler/importance" not in logged.logged_metrics


def test_terms_beside_the_policy_gradient_are_not_weighted():
    mask, ones = torch.tensor([[True, True, False]]), torch.ones(1, 3)
    none = torch.zeros(1, dtype=torch.long)
    rollouts = Rollouts(none[None], mask[:, :1], mask.long(), mask, -3 * ones * mask, 0 * ones, mask[:, 0])
    stats = TokenStats(-ones * mask, ones, ones[:, 0], mask, none, none)
    plan = TokenPlan(0.5 * ones * mask, ones * mask, 0.1 * ones * mask, mask, 0.2 * ones, 0.3 * ones)
    got, metrics = corrected(rollouts, stats, plan, most=2.0)
    assert got.advantage.tolist() == [[1.0, 1.0, 0.0]]
    for name in ("weight", "kl_weight", "policy_mask", "drift_weight", "entropy_weight"):
        assert getattr(got, name) is getattr(plan, name), name
    assert metrics["sampler/truncated"].numerator == 2


def test_a_sampler_of_another_policy_ends_the_run_and_names_tokens(tmp_path, shift):
    shift["nats"] = -0.5
    with pytest.raises(UserError, match=r"0\.5 away.*token \d+ of response \d+, '.*': .* sampled, .* trained"):
        train(tmp_path, vllm=VLLM())


def test_what_a_sampler_does_not_tell_is_no_cause_of_a_loss_that_is_nan(tmp_path, shift, monkeypatch):
    compute = update.response_loss
    monkeypatch.setattr(update, "response_loss", lambda *args, **kwargs: compute(*args, **kwargs) * float("nan"))
    with pytest.raises(UserError, match="first the term train/"), pytest.warns(UserWarning, match="left out"):
        train(tmp_path, vllm=VLLM(), max_skipped_updates=1)


def test_recorded_values_cannot_stand_for_those_of_training():
    with pytest.raises(UserError, match=r"recompute_logp must be auto or true with model\.vllm, got false"):
        RLVRModule(TinyPolicy(), GRPO(), None, Sampling(4), vllm=VLLM(), recompute_logp=False)
