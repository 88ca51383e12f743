"""The curriculum: from stored scores to the order in which questions are trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from torch.utils.data import Sampler

from lightning_rlvr.ops.semantic_entropy import Estimator
from lightning_rlvr.types import UserError

Order = Literal["ascending", "descending", "shuffled", "pass_rate"]


@dataclass(frozen=True)
class Curriculum:
    """In which order questions are trained on.

    Args:
        order: by semantic entropy `ascending` (SENT: agreed first, disputed last) or `descending`, by
            `pass_rate` (often solved first), or `shuffled` (no scores are needed).
        stages: how many parts of (nearly) equal size the sorted questions are cut into.
        epochs: passes over the questions of a stage before the next begins.
        estimator: which estimate of semantic entropy orders them.

    Source: arXiv 2512.04359; its release uses 2 stages.
    """

    order: Order = "ascending"
    stages: int = 2
    epochs: int = 1
    estimator: Estimator = "discrete"

    def __post_init__(self) -> None:
        for key in ("stages", "epochs"):
            if getattr(self, key) < 1:
                raise UserError(f"{key} must be at least 1, got {getattr(self, key)}. Set data.curriculum.{key}.")

    @property
    def needs_scores(self) -> bool:
        """Whether the order is read from scores."""
        return self.order != "shuffled"

    def check(self, size: int) -> None:
        """Raise UserError if `size` questions are too few for the stages."""
        if size < self.stages:
            raise UserError(
                f"stages must be at most the number of questions ({size}), got {self.stages}: a stage would be empty. "
                "Set data.curriculum.stages."
            )

    def cut(self, size: int, scores: pd.DataFrame | None, seed: int) -> list[np.ndarray]:
        """Return the stages: arrays of question indices in sorted order, ties in a seeded random order."""
        self.check(size)
        tie = np.random.default_rng([seed, 0]).permutation(size)
        if self.order == "shuffled":
            return np.array_split(tie, self.stages)
        if scores is None or len(scores) != size:
            raise ValueError(
                f"ordering {size} questions needs {size} scores, got {None if scores is None else len(scores)}"
            )
        if self.order == "pass_rate":
            key = -scores["pass_rate"].to_numpy()
        else:
            key = scores[f"semantic_entropy_{self.estimator}"].to_numpy()
            key = -key if self.order == "descending" else key
        if np.isnan(key).any():
            raise ValueError(f"{np.isnan(key).sum()} questions have a nan score: they have no place in the order")
        # Estimates that are equal in exact arithmetic may differ by a rounding: 1e-9 nats is not a difference.
        return np.array_split(np.lexsort((tie, key.round(9))), self.stages)


class CurriculumSampler(Sampler[list[int]]):
    """Yields batches of question indices, stage by stage, shuffled with a seed within each pass.

    A batch never mixes two passes; the last of a pass may be smaller. With several ranks each gets every
    `world`-th question of a batch; a remainder that cannot be shared out evenly is left out of that pass, and
    the shuffle of the next pass leaves out others.

    Args:
        stages: question indices of each stage (Curriculum.cut).
        epochs: passes over each stage.
        batch_size: questions in a batch, over all ranks.
        seed: of the shuffles.
        rank, world: this process and the number of processes.
        start: batches already trained on, to continue after them. The trainer prefetches, so what was handed
            out is not what was trained on: whoever trains keeps the count.
    """

    def __init__(
        self,
        stages: Sequence[np.ndarray],
        epochs: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
    ) -> None:
        if batch_size < world:
            raise UserError(
                f"prompts_per_batch must be at least the number of processes ({world}), got {batch_size}: "
                "each needs a question. Set data.prompts_per_batch."
            )
        if min(map(len, stages)) < world:
            raise UserError(
                f"each stage must have a question for each process ({world}), got {[len(s) for s in stages]}. "
                "Set data.curriculum.stages or trainer.devices."
            )
        self.rank, self.world = rank, world
        self.batches: list[tuple[int, list[int]]] = []  # (stage, questions over all ranks)
        for stage, questions in enumerate(stages):
            for epoch in range(epochs):
                order = np.random.default_rng([seed, 1, stage, epoch]).permutation(questions)
                order = order[: len(order) - len(order) % world]
                step = batch_size - batch_size % world
                self.batches += [(stage, order[i : i + step].tolist()) for i in range(0, len(order), step)]
        self.start = start % len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's share of each batch that is left; from the next time on, of all batches."""
        start, self.start = self.start, 0
        for _, questions in self.batches[start:]:
            yield questions[self.rank :: self.world]

    def __len__(self) -> int:
        """Return the number of batches of the whole curriculum, those before `start` included."""
        return len(self.batches)

    def stage_of(self, batch: int) -> int:
        """Return the stage of a batch; batches count on when the curriculum is repeated."""
        return self.batches[batch % len(self)][0]

    def fingerprint(self) -> str:
        """Return a hash of the order over all ranks."""
        return hashlib.sha256(repr(self.batches).encode()).hexdigest()[:16]
