"""Losses, gradients, rewards and logits that are not finite; entropy alarms."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from support import ManyVowels, TinyPolicy, train, weights

from lightning_rlvr.objectives import GRPO, AdaptiveEntropy
from lightning_rlvr.rewards import verdicts_of
from lightning_rlvr.training.callbacks import EntropyAlarm
from lightning_rlvr.training.replay import load_replay
from lightning_rlvr.types import Prompt, Response, Sampling, Status, UserError, Verdict


@pytest.fixture
def poisoned(tmp_path, monkeypatch):
    """Train with one micro-batch an update; the loss is nan in the updates listed, counted from 0."""
    from lightning_rlvr.training import update

    def run(*spoilt, updates=3, **settings):
        compute, calls = update.response_loss, []

        def of(*args, **kwargs):
            calls.append(1)
            return compute(*args, **kwargs) * (float("nan") if len(calls) - 1 in spoilt else 1.0)

        with monkeypatch.context() as patch:
            patch.setattr(update, "response_loss", of)
            return train(tmp_path, GRPO(), updates=updates, micro_batch_size=48, reward=Rising(), **settings)

    return run


class Rising(ManyVowels):
    """No two responses of a group are worth the same, so that no row is idle."""

    def __call__(self, responses, prompts):
        return [Verdict(float(i % 4), Status.WRONG) for i in range(len(responses))]


def test_an_update_that_is_not_finite_is_left_out_counted_and_kept(tmp_path, poisoned):
    start = dict(TinyPolicy(dtype="float64").load().model.named_parameters())
    with pytest.warns(UserWarning, match="update 1 in a row left out, in rollout batch 1"):
        module, trainer = poisoned(0, updates=1)  # one optimizer step, of the second rollout batch
    assert module.rollouts_done == 2
    assert trainer.global_step == 1
    assert module.skipped_in_a_row == 0
    assert trainer.logged_metrics["train/skipped_updates"] == 0
    kept = load_replay(tmp_path / "failed" / "000001")
    for name, weight in kept.policy.named_parameters():  # nothing had moved it
        assert torch.equal(weight, start[name]), name
    assert kept.score.tolist() == [0.0, 1.0, 2.0, 3.0] * 6


def test_the_updates_after_it_are_those_of_a_run_that_never_had_the_batch(poisoned):
    with pytest.warns(UserWarning, match="left out"):
        module, _ = poisoned(0, updates=2)
    without, _ = poisoned(updates=2, rollouts_done=1)
    for name, weight in weights(without).items():
        assert torch.equal(weights(module)[name], weight), name


def test_a_run_of_such_updates_ends_with_the_reason(tmp_path, poisoned):
    with (
        pytest.raises(UserError, match=r"2 updates in a row .* first the term train/loss .*max_skipped_updates"),
        pytest.warns(UserWarning, match="left out"),
    ):
        poisoned(1, 2, 3, updates=9, max_skipped_updates=2)
    assert sorted(path.name for path in (tmp_path / "failed").iterdir()) == ["000002", "000003"]


def test_what_was_not_finite_first_is_named(tmp_path, monkeypatch):
    from lightning_rlvr.training import module

    class Huge(Rising):
        def __call__(self, responses, prompts):
            return [Verdict(v.score * 1e39, v.status) for v in super().__call__(responses, prompts)]

    compute = module.batch_logp

    def spoiled(field):
        def of(*args, **kwargs):
            values = compute(*args, **kwargs)
            getattr(values, field)[0, 0] = float("inf")
            return values

        return of

    def said(**settings):
        with pytest.raises(UserError) as error:
            train(tmp_path, max_skipped_updates=1, **settings)
        return str(error.value)

    assert "advantages" in said(reward=Huge(), objective=GRPO(), dtype="float32")
    monkeypatch.setattr(module, "batch_logp", spoiled("entropy"))
    adaptive = said(objective=AdaptiveEntropy(target=0.5), recompute_logp=True)
    assert "the entropies of the training pass (1 of" in adaptive
    monkeypatch.setattr(module, "batch_logp", spoiled("logp"))
    assert "logp) of the training pass" in said(recompute_logp=True)
    assert "the reference's log-prob" in said(recompute_logp=False)


def test_an_overflow_in_the_gradient_names_the_parameter(tmp_path, monkeypatch):
    from lightning_rlvr.training import update

    backward = update._backward

    def overflow(module, *args):
        loss = backward(module, *args)
        module.policy.model.layers[1].mlp.up_proj.weight.grad[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(update, "_backward", overflow)
    named = r"the gradient of model\.layers\.1\.mlp\.up_proj\.weight, though the loss is finite \(1 of"
    with pytest.raises(UserError, match=named), pytest.warns(UserWarning, match="left out"):
        train(tmp_path, max_skipped_updates=1)


def test_a_batch_that_cannot_be_kept_does_not_end_the_run(tmp_path, poisoned):
    (tmp_path / "failed").write_text("in the way")
    with pytest.warns(UserWarning, match="could not be kept"):
        _, trainer = poisoned(0, updates=1)
    assert trainer.global_step == 1


def test_only_the_first_batches_of_a_run_are_kept(tmp_path, poisoned):
    with pytest.warns(UserWarning, match="left out"):
        poisoned(0, 2, 4, 6, updates=4)
    assert sorted(p.name for p in (tmp_path / "failed").iterdir()) == ["000001", "000003", "000005"]


@pytest.mark.parametrize("score", [float("nan"), float("inf"), None, 10**400])
def test_a_reward_that_is_no_finite_number_names_the_question(score):
    def reward(responses, prompts):
        return [Verdict(1.0, Status.CORRECT), SimpleNamespace(score=score)]

    prompts = [Prompt("first", "1=", "1"), Prompt("second", "2=", "2")]
    with pytest.raises(UserError, match=r"finite number.*'second'.*model\.reward"):
        verdicts_of(reward, [Response("1"), Response("2")], prompts)


@pytest.mark.parametrize("sampling", [Sampling(3), Sampling(3, temperature=0.0), Sampling(3, top_p=0.5)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_end_sampling_with_one_error(tmp_path, value, sampling):
    from lightning_rlvr.rollout import TransformersEngine

    policy = TinyPolicy().load()
    with torch.no_grad():
        policy.model.lm_head.weight.fill_(value)
    with pytest.raises(UserError, match=r"logits must be finite.*trainer\.precision"):
        TransformersEngine.of(policy).generate([[5, 6]], [1], 2, sampling)


def alarms(entropies, **settings):
    """What is said at each step, and whether the run was to stop."""
    alarm, trainer, said = EntropyAlarm(**settings), SimpleNamespace(should_stop=False), []
    for entropy in entropies:
        trainer.callback_metrics = {"train/entropy": torch.tensor(entropy)}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            alarm.on_train_batch_end(trainer, None, {"samples": [1]}, None, 0)
        said.append("".join(str(w.message) for w in caught))
    return said, trainer.should_stop


def test_entropy_that_leaves_the_band_is_said_once_for_each_time():
    said, stopped = alarms([0.5, 0.04, 0.04, 0.04, 0.5, 0.04, 0.04], collapse=0.05, patience=2)
    assert [bool(text) for text in said] == [False, False, True, False, False, False, True]
    assert "below 0.05 nats" in said[2]
    assert "entropy_alarm.collapse" in said[2]
    assert not stopped


def test_entropy_above_the_band_can_end_the_run():
    said, stopped = alarms([1.0, 7.0], explosion=6.0, action="stop", patience=1)
    assert "above 6.0 nats" in said[1]
    assert "ends after this step" in said[1]
    assert stopped
    assert alarms([0.001, 99.0], collapse=0.0, explosion=None, action="stop", patience=1) == (["", ""], False)


@pytest.mark.parametrize("settings", [{"collapse": -1.0}, {"collapse": 3.0, "explosion": 2.0}, {"patience": 0}])
def test_a_band_that_is_none(settings):
    with pytest.raises(UserError, match="entropy_alarm"):
        EntropyAlarm(**settings)
