"""The training step as a whole."""

from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from support import Counting, ManyVowels, TinyPolicy, train, weights

from lightning_rlvr.curriculum import Curriculum
from lightning_rlvr.models import LoRA
from lightning_rlvr.objectives import GRPO
from lightning_rlvr.training import RLVRDataModule, RLVRModule, Trainer
from lightning_rlvr.training.callbacks import StageBoundary
from lightning_rlvr.training.parallel import Parallel
from lightning_rlvr.types import Sampling, UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return weights(train(tmp_path_factory.mktemp("whole"), micro_batch_size=24, rollout_rows=24)[0])


@pytest.mark.parametrize(("micro", "rows"), [(1, 24), (4, 24), (5, 7), (24, 1)])
def test_how_the_batch_is_cut_does_not_matter(tmp_path, whole, micro, rows):
    cut = weights(train(tmp_path, micro_batch_size=micro, rollout_rows=rows)[0])
    for name, weight in whole.items():
        torch.testing.assert_close(cut[name], weight, rtol=0, atol=1e-10)


def test_three_updates_move_the_policy_and_not_the_reference(tmp_path, whole):
    module, _ = train(tmp_path)
    start = dict(TinyPolicy(dtype="float64").load().model.named_parameters())
    assert max(float((whole[name] - start[name]).detach().abs().max()) for name in start) > 1e-4
    for name, weight in module.reference.named_parameters():
        assert torch.equal(weight, start[name]), name


def test_updates_of_one_rollout_share_its_questions_out(tmp_path):
    module, trainer = train(tmp_path, updates=4, updates_per_rollout=2)
    assert trainer.global_step == 4
    assert module.rollouts_done == 2


def test_an_objective_without_kl_loads_no_reference(tmp_path):
    module, trainer = train(tmp_path, objective=GRPO(), updates=1)
    assert module.reference is None
    assert "train/kl/all" not in trainer.logged_metrics


def test_equal_seeds_give_equal_runs_and_other_seeds_others(tmp_path):
    one, same, other = (weights(train(tmp_path, updates=1, seed=seed)[0]) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_second_update_of_a_rollout_is_off_policy(tmp_path):
    _, trainer = train(tmp_path, updates=2, updates_per_rollout=2, lr=1e-2)
    assert trainer.logged_metrics["train/kl/old"] > 0


def test_the_gradient_of_a_step_is_that_of_the_formula():
    """On policy, the gradient against that of A log pi written out over the whole batch."""
    from lightning_rlvr.models.forward import response_logp
    from lightning_rlvr.training import PromptBatch

    fresh = RLVRModule(TinyPolicy(dtype="float64"), GRPO(), ManyVowels(), Sampling(10))
    fresh.configure_model()
    batch = PromptBatch(Counting(6).load(), 4)
    experience = fresh.experience(batch, fresh.sampling, "rollout 0")
    logp = response_logp(fresh.policy, experience.rollouts, 1.0).logp
    mask, lengths = experience.rollouts.mask, experience.rollouts.mask.sum(1)
    rewards = torch.tensor([v.score for v in experience.verdicts], dtype=torch.float64).view(6, 4)
    advantage = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    expected = -(advantage.view(24, 1) * logp * mask / lengths[:, None]).sum() / 24
    wanted = torch.autograd.grad(expected, list(fresh.policy.parameters()))

    stats = fresh.token_statistics(experience, 4)
    plan = fresh.objective.plan(stats)
    from lightning_rlvr.types import TokenBatch

    loss = fresh.objective.loss(
        TokenBatch(response_logp(fresh.policy, experience.rollouts, 1.0).logp, stats.logp, mask), plan
    ).loss
    got = torch.autograd.grad(loss, list(fresh.policy.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.fixture
def passes(monkeypatch):
    """How often log-probabilities were computed without gradients."""
    from lightning_rlvr.training import module

    calls = []
    compute = module.batch_logp
    monkeypatch.setattr(module, "batch_logp", lambda *a, **k: calls.append(1) or compute(*a, **k))
    return calls


@pytest.mark.parametrize(("setting", "expected"), [("auto", 1), (True, 3), (False, 0)])
def test_recorded_statistics_stand_for_recomputed_ones_where_they_agree(tmp_path, passes, setting, expected):
    wanted = weights(train(tmp_path, objective=GRPO(), recompute_logp=True, updates_per_rollout=2, updates=6)[0])
    passes.clear()
    got = weights(train(tmp_path, objective=GRPO(), recompute_logp=setting, updates_per_rollout=2, updates=6)[0])
    assert len(passes) == expected
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name], weight, rtol=0, atol=1e-10)


def test_recorded_statistics_are_not_taken_where_they_differ(tmp_path, passes, monkeypatch):
    from lightning_rlvr.training import module

    monkeypatch.setattr(module, "RECORDING_TOLERANCE", -1.0)
    train(tmp_path, objective=GRPO())
    assert len(passes) == 3


def test_rows_that_teach_nothing_are_skipped_and_counted(tmp_path, monkeypatch):
    from lightning_rlvr.training import update

    class EvenAreAlike(ManyVowels):
        def __call__(self, responses, prompts):
            pairs = zip(super().__call__(responses, prompts), prompts, strict=True)
            return [replace(verdict, score=0.5) if int(p.answer) % 2 == 0 else verdict for verdict, p in pairs]

    module, trainer = train(tmp_path, objective=GRPO(), reward=EvenAreAlike())
    share = float(trainer.logged_metrics["train/skipped_rows"])
    assert 0 < share == trainer.logged_metrics["train/tied_groups"]
    monkeypatch.setattr(update, "idle_rows", lambda objective, plan: torch.zeros(len(plan.weight), dtype=torch.bool))
    other, all_rows = train(tmp_path, objective=GRPO(), reward=EvenAreAlike())
    assert all_rows.logged_metrics["train/skipped_rows"] == 0
    for name, weight in weights(other).items():
        torch.testing.assert_close(weights(module)[name], weight, rtol=0, atol=1e-10)
    for name in ("clip_fraction", "grad_share/policy", "grad_norm", "loss"):
        a, b = (float(t.logged_metrics[f"train/{name}"]) for t in (trainer, all_rows))
        assert a == pytest.approx(b, abs=1e-9), name


def test_a_rollout_batch_that_teaches_nothing_has_a_gradient_of_zero(tmp_path, monkeypatch):
    class Same(ManyVowels):
        def _judge(self, text):
            return super()._judge("")

    found, norm = [], Parallel.norm
    monkeypatch.setattr(Parallel, "norm", lambda self: found.extend(of_policy(self)) or norm(self))

    def of_policy(parallel):
        return [p.grad is not None and not p.grad.any() for p in parallel.module.policy.parameters()]

    module, trainer = train(tmp_path, objective=GRPO(), updates=1, reward=Same())
    assert found
    assert all(found)
    assert all(p.grad is None for p in module.policy.parameters()), "the next rollout has the memory"
    assert float(trainer.logged_metrics["train/skipped_rows"]) == pytest.approx(23 / 24)  # the gradient is of one row


def test_adapters_move_and_what_lies_beneath_is_the_reference(tmp_path):
    module, trainer = train(tmp_path, policy=LoRA(TinyPolicy(dtype="float64"), rank=4), updates=2, lr=1e-2)
    start = TinyPolicy(dtype="float64").load().model.state_dict()
    reference = module.reference.state_dict()
    assert all(torch.equal(reference[name], weight) for name, weight in start.items())
    assert float(trainer.logged_metrics["train/kl/all"]) > 1e-6
    assert module.reference.model.norm.weight is module.policy.model.norm.weight


def test_a_reference_off_the_device_is_the_same_reference(tmp_path, whole):
    module, _ = train(tmp_path, offload_reference=True, micro_batch_size=24, rollout_rows=24)
    for name, weight in whole.items():
        assert torch.equal(weights(module)[name], weight), name


def test_a_reference_that_must_stay_is_not_taken_off_the_device(tmp_path):
    with pytest.raises(UserError, match=r"every micro-batch reads the reference.*model\.offload_reference"):
        train(tmp_path, objective=GRPO(kl_coef=0.1, kl_estimator="full"), offload_reference=True)
    with pytest.raises(UserError, match=r"policy with adapters.*Set model\.offload_reference"):
        train(tmp_path, policy=LoRA(TinyPolicy()), offload_reference=True)


def test_adapters_cannot_become_the_reference(tmp_path):
    """Nor can what DeepSpeed's checkpoints leave out."""
    stages = SimpleNamespace(datamodule=SimpleNamespace(curriculum=Curriculum(at_boundary="restart")))
    module = RLVRModule(LoRA(TinyPolicy()), GRPO(kl_coef=0.1), ManyVowels(), Sampling(10))
    module.configure_model()
    with pytest.raises(UserError, match=r"with adapters.*Set data\.curriculum\.at_boundary"):
        StageBoundary().on_fit_start(stages, module)
    plain = RLVRModule(TinyPolicy(), GRPO(kl_coef=0.1), ManyVowels(), Sampling(10))
    plain.configure_model()
    stages.strategy = object.__new__(DeepSpeedStrategy)  # as its making imports DeepSpeed
    with pytest.raises(UserError, match=r"with DeepSpeed.*Set data\.curriculum\.at_boundary"):
        StageBoundary().on_fit_start(stages, plain)
    stages.datamodule.curriculum = Curriculum()
    StageBoundary().on_fit_start(stages, plain)


class Short(TinyPolicy):
    """Knows as many positions as the longest of 24 questions and its response have tokens, but one."""

    sizes: ClassVar = {**TinyPolicy.sizes, "max_position_embeddings": 3 + 10 - 1}


@pytest.mark.parametrize("what", ["fit", "validate", "test", "predict", "score"])
def test_responses_beyond_the_models_positions_are_refused_before_any_is_sampled(tmp_path, monkeypatch, what):
    monkeypatch.setattr("lightning_rlvr.rollout.TransformersEngine.generate", lambda *_: pytest.fail("samples"))
    trains = what in ("fit", "score")
    module = RLVRModule(Short(), GRPO(), ManyVowels(), Sampling(9 + trains), Sampling(10 - trains), pass_at=[1])
    order = Curriculum(order="shuffled", stages=1)
    data = RLVRDataModule(Counting(24), Counting(1, 23), prompts_per_batch=6, group_size=2, curriculum=order)
    settings = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, use_distributed_sampler=False, **settings)
    more = {"output": str(tmp_path / "scores.parquet")} if what == "score" else {}
    key = "sampling" if trains else "eval_sampling"
    with pytest.raises(UserError, match=rf"at most 12 tokens.*got up to 3 and 10.*Set model\.{key}\.max_new_tokens"):
        getattr(trainer, what)(module, datamodule=data, **more)


def test_responses_up_to_the_models_last_position_are_sampled(tmp_path):
    enough = type("Enough", (Short,), {"sizes": {**Short.sizes, "max_position_embeddings": 3 + 10}})
    assert train(tmp_path, policy=enough(), objective=GRPO(), updates=1)[0].rollouts_done == 1
