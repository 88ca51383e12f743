import pytest

from lightning_rlvr.rewards import SoftOverlong
from lightning_rlvr.types import Prompt, Response, Status, UserError

PROMPT = Prompt("q", "?", "!")


@pytest.mark.parametrize(
    ("tokens", "truncated", "score"),
    [
        (0, False, 0),
        (80, False, 0),
        (85, False, -0.25),
        (90, False, -0.5),
        (100, False, -1),
        (130, False, -1),
        (5, True, -1),
    ],
)
def test_the_penalty_grows_over_the_buffer(tokens, truncated, score):
    (verdict,) = SoftOverlong(max_tokens=100, buffer=20)([Response("x", truncated, tokens)], [PROMPT])
    assert verdict.score == pytest.approx(score)
    assert (verdict.status is Status.CORRECT) == (score == 0)


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_a_buffer_outside_the_length_is_refused(buffer):
    with pytest.raises(UserError, match="buffer"):
        SoftOverlong(max_tokens=100, buffer=buffer)
