"""A sum of rewards, the first of which says what is correct."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_rlvr.types import Prompt, Response, Reward, UserError, Verdict


@dataclass
class Part:
    """A reward and its weight in the sum; a weight of 0 only logs it."""

    reward: Reward
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise UserError(
                f"weight must be finite, got {self.weight}: it multiplies the score of a part of the reward. "
                "Set reward.init_args.parts.<name>.weight."
            )


class WeightedSum(Reward):
    r"""Score the sum of weight * score over named parts.

    The first part is the verifier: status, answer, correctness and equivalence are its own. The unweighted
    score of every part is in `Verdict.parts` under its name. Raises UserError if there are no parts.

    ```yaml
    reward:
      class_path: lightning_rlvr.rewards.WeightedSum
      init_args:
        parts:
          answer:
            reward: {class_path: lightning_rlvr.rewards.MathAnswer, init_args: {timeout_s: 5.0}}
          format:
            weight: 0.1
            reward:
              class_path: lightning_rlvr.rewards.FormatMatch
              init_args: {pattern: '.*\\boxed\{.*\}.*'}
    ```
    """

    def __init__(self, parts: dict[str, Part]) -> None:
        if not parts:
            raise UserError(
                "parts must name at least one reward, got none: the first is the verifier. Set reward.init_args.parts."
            )
        self.parts = dict(parts)
        self.verifier = next(iter(self.parts.values())).reward

    def __repr__(self) -> str:
        return f"WeightedSum(parts={self.parts!r})"

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError if a prompt cannot be judged by one of the parts."""
        for part in self.parts.values():
            part.reward.check(prompts)

    def unjudgeable(self, prompts: Sequence[Prompt]) -> list[int]:
        """Return the places of the prompts that one of the parts cannot judge."""
        return sorted({place for part in self.parts.values() for place in part.reward.unjudgeable(prompts)})

    def __call__(self, responses: Sequence[Response], prompts: Sequence[Prompt]) -> list[Verdict]:
        """Judge responses[i] as an answer to prompts[i] by every part."""
        judged = {name: part.reward(responses, prompts) for name, part in self.parts.items()}
        sums = []
        for row in zip(*judged.values(), strict=True):
            scores = {name: verdict.score for name, verdict in zip(judged, row, strict=True)}
            total = sum(self.parts[name].weight * score for name, score in scores.items())
            sums.append(replace(row[0], score=total, parts=scores))
        return sums

    def equivalent(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Say for each pair whether the verifier takes them for the same."""
        return self.verifier.equivalent(pairs)

    def close(self) -> None:
        """Close every part."""
        for part in self.parts.values():
            part.reward.close()
