"""Verdicts that can be learned from."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_rlvr.types import Prompt, Response, Reward, UserError, Verdict


def verdicts_of(reward: Reward, responses: Sequence[Response], prompts: Sequence[Prompt]) -> list[Verdict]:
    """Return the reward's verdict on each response.

    Raises: UserError with the question's uid if a score is not a finite number: one of them would make the advantages
        of its whole group nan, and with them the policy.
    """
    verdicts = reward(responses, prompts)
    for verdict, prompt in zip(verdicts, prompts, strict=True):
        if not _finite(verdict.score):
            raise UserError(
                f"a reward must be a finite number, got {verdict.score!r} from {type(reward).__name__} for a response "
                f"to question {prompt.uid!r}: the advantages of its group would be nan. Set model.reward (in evaluate: "
                "reward of the benchmark)."
            )
    return verdicts


def _finite(score: object) -> bool:
    try:
        return math.isfinite(score)  # type: ignore[arg-type]
    except (TypeError, OverflowError):
        return False
