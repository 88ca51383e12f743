"""What verdicts are kept by: the same in every process, and another where verdicts may be others."""

import pytest
from support import Nameless

from lightning_rlvr.rewards import (
    ChainAnswer,
    CodeTests,
    ExactMatch,
    FormatMatch,
    MathAnswer,
    Part,
    ReasoningGymScore,
    SoftOverlong,
    WeightedSum,
)
from lightning_rlvr.rewards.identity import questions_digest, shown
from lightning_rlvr.types import Prompt, UserError


def test_every_reward_is_shown_with_its_settings():
    rewards = [
        ChainAnswer(),
        CodeTests(),
        ExactMatch(),
        FormatMatch(".*"),
        MathAnswer(),
        ReasoningGymScore(),
        SoftOverlong(20, 10),
    ]
    together = WeightedSum({str(i): Part(reward) for i, reward in enumerate(rewards)})
    for reward in [*rewards, together]:
        assert shown(reward, "model.reward") == repr(reward)


@pytest.mark.parametrize("inner", [Nameless(), lambda text: text, Nameless().check])
def test_an_address_at_any_depth_is_refused(inner):
    for reward in (inner, WeightedSum({"a": Part(ExactMatch()), "b": Part(inner)})):
        with pytest.raises(UserError, match=r"__repr__.* 0x.*model\.reward"):
            shown(reward, "model.reward")


def test_a_digest_is_of_all_that_a_verifier_reads():
    asked = Prompt("u", "1=", "1", {"tests": ["assert f(1) == 1"]})
    others = [
        Prompt("v", "1=", "1", {"tests": ["assert f(1) == 1"]}),
        Prompt("u", "2=", "1", {"tests": ["assert f(1) == 1"]}),
        Prompt("u", "1=", "2", {"tests": ["assert f(1) == 1"]}),
        Prompt("u", "1=", "1", {"tests": ["assert f(1) == 2"]}),
        Prompt("u", "1=", "1"),
    ]
    assert len({questions_digest([prompt]) for prompt in [asked, *others]}) == 6
    assert questions_digest([asked, others[0]]) != questions_digest([others[0], asked])


def test_a_picture_of_a_question_has_another_address_in_each_process():
    pictures = [object(), object()]
    first, again = (questions_digest([Prompt("u", "1=", "1", {"image": picture})]) for picture in pictures)
    assert first == again
