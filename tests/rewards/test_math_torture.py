r"""Model output is untrusted input: what is made to hang, kill or deceive the verifier costs only itself."""

import time

import pytest
from torture import TORTURE

from lightning_rlvr.rewards import MathAnswer
from lightning_rlvr.types import Prompt, Response, Status

LIMIT_S = 0.4
GOOD = [  # with a number of its own each is one that no cache has seen
    (r"\boxed{2\sqrt{2} + %d - %d}", True),
    (r"\boxed{\frac{4}{\sqrt{2}} + %d - %d}", True),
    (r"\boxed{\sqrt{7} + %d - %d}", False),
    (r"It is $\sqrt{8} + %d - %d$.", True),
    (r"\boxed{3\sqrt{2} + %d - %d}", False),
]


@pytest.fixture(scope="module")
def judged():
    """Every adversarial response beside good ones, in one batch: their verdicts, and the seconds that all took."""
    reward = MathAnswer(workers=2, timeout_s=LIMIT_S, memory_mb=512)
    reward.equivalent([("x", "y")])  # start before the clock runs
    texts = [text for i, (_, bad) in enumerate(TORTURE) for text in (bad, GOOD[i % len(GOOD)][0] % (i, i))]
    start = time.monotonic()
    verdicts = reward([Response(text) for text in texts], [Prompt("u", "", r"\sqrt{8}")] * len(texts))
    seconds = time.monotonic() - start
    yield reward, verdicts, seconds
    reward.close()


def test_there_are_many():
    assert len(TORTURE) >= 60
    assert len({text for _, text in TORTURE}) == len(TORTURE)


def test_none_is_right_and_each_has_a_status(judged):
    _, verdicts, _ = judged
    found = dict(zip((what for what, _ in TORTURE), verdicts[::2], strict=True))
    assert {what: v for what, v in found.items() if v.score != 0.0 or v.status is Status.CORRECT} == {}
    assert any(verdict.status is Status.TIMEOUT for verdict in found.values())
    assert all(verdict.answer is None or len(verdict.answer) <= 2_000 for verdict in found.values())


def test_the_good_ones_beside_them_are_judged_right(judged):
    _, verdicts, _ = judged
    expected = [GOOD[i % len(GOOD)][1] for i in range(len(TORTURE))]
    assert [verdict.correct for verdict in verdicts[1::2]] == expected


def test_none_takes_longer_than_its_limit(judged):
    _, verdicts, seconds = judged
    slow = sum(verdict.status in (Status.TIMEOUT, Status.ERROR) for verdict in verdicts)
    # Two workers, each item at most a first slice and its limit; the rest is generous to a loaded machine.
    assert seconds < (slow / 2 + 1) * (LIMIT_S + 0.5) + 30


def test_the_pool_is_well_afterwards(judged):
    reward, _, _ = judged
    assert len(reward._pool.pids()) == 2
    assert reward([Response(r"\boxed{\sqrt{32}/2}")], [Prompt("u", "", r"\sqrt{8}")])[0].correct


def test_hostile_pairs_are_not_the_same(judged):
    reward, _, _ = judged
    hostile = [text[7:-1] for _, text in TORTURE if text.startswith(r"\boxed{") and len(text) < 1_000][::6]
    assert not any(reward.equivalent([(text, r"\sqrt{8}") for text in hostile]))
    assert reward.equivalent([(r"\sqrt{8}", r"2\sqrt{2}")]) == [True]
