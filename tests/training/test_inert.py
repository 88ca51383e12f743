"""Terms that do nothing are named, once."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from lightning_rlvr.objectives import GRPO, SENT, KLCov
from lightning_rlvr.training.callbacks import InertTerms


def started(objective, updates):
    """The warnings at the start of a run."""
    module = SimpleNamespace(objective=objective, updates_per_rollout=updates)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        InertTerms().on_fit_start(SimpleNamespace(), module)
    return [str(warning.message) for warning in seen]


def after(*steps):
    """The warnings while steps with these metrics are taken."""
    callback = InertTerms()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in steps:
            metrics = {f"train/{name}": torch.tensor(value) for name, value in step.items()}
            callback.on_train_batch_end(SimpleNamespace(callback_metrics=metrics), None, {"samples": [{}]}, None, 0)
    return [str(warning.message) for warning in seen]


def test_a_drift_penalty_with_one_update_is_named_at_the_start():
    (message,) = started(KLCov(), 1)
    assert "model.updates_per_rollout" in message
    assert started(KLCov(), 2) == []


def test_a_penalty_that_reaches_no_token_is_named_at_the_start():
    (message,) = started(SENT(beta_low=0.0, beta_high=0.0), 1)
    assert "beta_low" in message


@pytest.mark.parametrize("objective", [GRPO(), SENT()])
def test_settings_that_act_are_not_named(objective):
    assert started(objective, 1) == []


def test_a_term_without_gradient_is_named_once_after_three_batches():
    idle = {"grad_share/kl": 0.0, "grad_share/policy": 0.5, "tied_groups": 0.2}
    assert after(idle, idle) == []
    (message,) = after(*[idle] * 9)
    assert message.startswith("the kl term")


def test_a_term_that_acts_again_starts_the_count_anew():
    idle, active = ({"grad_share/kl": share, "tied_groups": 0.0} for share in (0.0, 0.1))
    assert after(idle, idle, active, idle, idle) == []


def test_groups_of_equal_rewards_are_named():
    messages = after(*[{"tied_groups": 1.0}] * 3)
    assert len(messages) == 1
    assert "equal rewards" in messages[0]
    assert "data.train" in messages[0]
