"""A soft penalty on length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_rlvr.types import Prompt, Response, Reward, Status, UserError, Verdict


@dataclass(frozen=True)
class SoftOverlong(Reward):
    """Score 0 up to max_tokens - buffer tokens, then falling in a straight line to -1 at max_tokens.

    A part of a WeightedSum, after the verifier. A truncated response scores -1 whatever its length.

    Args:
        max_tokens: the length that is punished in full; usually model.sampling.max_new_tokens.
        buffer: the tokens before it over which the penalty grows.

    Source: DAPO, arXiv 2503.14476, soft overlong punishment.
    """

    max_tokens: int
    buffer: int

    def __post_init__(self) -> None:
        if not 0 < self.buffer <= self.max_tokens:
            raise UserError(
                f"buffer must lie in (0, max_tokens], got {self.buffer} and {self.max_tokens}: the penalty grows over "
                "the last `buffer` tokens. Set buffer of the reward's init_args."
            )

    def __call__(self, responses: Sequence[Response], prompts: Sequence[Prompt]) -> list[Verdict]:
        """Score the length of each response; the prompts are not looked at."""
        return [self._judge(response) for response in responses]

    def _judge(self, response: Response) -> Verdict:
        over = response.tokens - (self.max_tokens - self.buffer)
        score = -1.0 if response.truncated else -min(1.0, max(0.0, over / self.buffer))
        return Verdict(score, Status.CORRECT if score == 0 else Status.WRONG)
