"""Groups that teach nothing are replaced, up to a cap, and counted."""

import pytest
import torch

from lightning_rlvr.training.dynamic_sampling import GroupBuffer
from lightning_rlvr.training.experience import Experience
from lightning_rlvr.types import Prompt, Response, Rollouts, Status, UserError, Verdict


def batch(*groups, start=0, width=3):
    """Groups of two responses with the given rewards, each of a question of its own."""
    rewards = [reward for group in groups for reward in group]
    n = len(rewards)
    values = torch.arange(n * width, dtype=torch.float32).view(n, width)
    rollouts = Rollouts(
        prompt_ids=torch.ones(n, width, dtype=torch.long),
        prompt_mask=torch.ones(n, width, dtype=torch.bool),
        response_ids=torch.arange(n * width).view(n, width),
        mask=torch.ones(n, width, dtype=torch.bool),
        logp=-values,
        entropy=values,
        truncated=torch.zeros(n, dtype=torch.bool),
    )
    prompts = [Prompt(f"q{start + i // 2}", "?", "!") for i in range(n)]
    verdicts = [Verdict(float(reward), Status.WRONG) for reward in rewards]
    return Experience(prompts, rollouts, [Response("x")] * n, verdicts, [10 * start + i for i in range(n)])


def uids(experience):
    return [prompt.uid for prompt in experience.prompts]


def test_a_batch_without_tied_groups_passes_at_once():
    buffer = GroupBuffer(3)
    full = buffer.add(batch((0, 1), (1, 0)), 2)
    assert uids(full) == ["q0", "q0", "q1", "q1"]
    assert buffer.used == 1


def test_tied_groups_are_replaced_by_later_ones():
    buffer = GroupBuffer(3)
    assert buffer.add(batch((0, 1), (1, 1)), 2) is None
    full = buffer.add(batch((0, 0), (0.5, 1), start=2, width=5), 2)
    assert uids(full) == ["q0", "q0", "q3", "q3"]
    assert [verdict.score for verdict in full.verdicts] == [0, 1, 0.5, 1]
    assert full.ids == [0, 1, 22, 23]
    assert full.rollouts.mask.tolist()[0] == [True] * 3 + [False] * 2
    assert full.rollouts.prompt_mask.tolist()[0] == [False] * 2 + [True] * 3
    assert buffer.used == 2


def test_at_the_cap_tied_groups_fill_what_is_left():
    buffer = GroupBuffer(2)
    assert buffer.add(batch((0, 0), (1, 1)), 2) is None
    full = buffer.add(batch((0, 1), (1, 1), start=2), 2)
    assert uids(full) == ["q2", "q2", "q0", "q0"]
    assert buffer.add(batch((1, 1), (0, 0), start=4), 2) is None, "the buffer starts anew"


def test_a_negative_cap_is_refused(tiny_policy, many_vowels):
    from lightning_rlvr.objectives import DAPO
    from lightning_rlvr.training import RLVRModule
    from lightning_rlvr.types import Sampling

    with pytest.raises(UserError, match=r"model\.dynamic_sampling"):
        RLVRModule(tiny_policy, DAPO(), many_vowels, Sampling(4), dynamic_sampling=-1)
