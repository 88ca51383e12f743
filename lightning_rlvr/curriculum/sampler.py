"""Batches of questions, stage by stage, for every rank alike."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from lightning_rlvr.curriculum.order import Adaptive
from lightning_rlvr.types import UserError


def check_batch_size(batch_size: int, world: int) -> None:
    """Raise UserError if the questions of a batch cannot be shared out evenly among `world` processes."""
    if batch_size < 1 or batch_size % world:
        raise UserError(
            f"prompts_per_batch must be a multiple of the number of processes ({world}), got {batch_size}: each trains "
            "on as many questions. Set data.prompts_per_batch or trainer.devices."
        )


class Batch(NamedTuple):
    """The questions of one rollout batch over all ranks, and which pass over which stage they belong to."""

    stage: int
    epoch: int
    questions: list[int]


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
        epochs: Sequence[int],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
    ) -> None:
        check_batch_size(batch_size, world)
        if min(map(len, stages)) < world:
            raise UserError(
                f"each stage must have a question for each process ({world}), got {[len(s) for s in stages]}. "
                "Set data.curriculum.stages or trainer.devices."
            )
        self.rank, self.world, self.seed = rank, world, seed
        self.batches: list[Batch] = []
        for stage, (questions, count) in enumerate(zip(stages, epochs, strict=True)):
            for epoch in range(count):
                order = np.random.default_rng([seed, 1, stage, epoch]).permutation(questions)
                order = order[: len(order) - len(order) % world]
                starts = range(0, len(order), batch_size)
                self.batches += [Batch(stage, epoch, order[i : i + batch_size].tolist()) for i in starts]
        self.start = start % len(self.batches)
        self._planned = _digest(repr([tuple(batch) for batch in self.batches]))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's share of each batch that is left; from the next time on, of all batches."""
        start, self.start = self.start, 0
        for number in range(start, len(self.batches)):
            yield self.batches[number].questions[self.rank :: self.world]

    def __len__(self) -> int:
        """Return the number of batches of the whole curriculum, those before `start` included."""
        return len(self.batches)

    def batch(self, number: int) -> Batch:
        """Return a batch over all ranks; batches count on when the curriculum is repeated."""
        return self.batches[number % len(self)]

    def fingerprint(self) -> str:
        """Return a hash of the order over all ranks as it was planned at first."""
        return self._planned

    def state_dict(self) -> dict[str, Any]:
        """Return what is known beyond the plan: nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""


class AdaptiveSampler(CurriculumSampler):
    """A sampler that re-orders what is left by running estimates: see `Adaptive`.

    A re-ordering after batch n changes batches from n + 2 on: batch n + 1 may be with the trainer already.

    Args:
        key: what the questions are sorted by at first, ascending [questions].
        tie: settles ties [questions].
        last: which questions come after all others [questions].
        adaptive: how often, and how much fresh estimates weigh.
    """

    def __init__(
        self,
        stages: Sequence[np.ndarray],
        epochs: Sequence[int],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        *,
        key: np.ndarray,
        tie: np.ndarray,
        last: np.ndarray,
        adaptive: Adaptive,
    ) -> None:
        super().__init__(stages, epochs, batch_size, seed, rank, world, start)
        self.estimate, self._adaptive = key.astype(np.float64), adaptive
        self._tie, self._last = tie, last
        self._planned = _digest(f"{self._planned} {adaptive}")

    def observe(self, number: int, fresh: Sequence[float]) -> bool:
        """Take fresh estimates of the key of the questions of batch `number`, over all ranks, in its order.

        Returns whether the rest was re-ordered. Raises: ValueError if there are more or fewer estimates than questions.
        """
        weight = self._adaptive.weight
        for question, value in zip(self.batch(number).questions, fresh, strict=True):
            self.estimate[question] = (1 - weight) * self.estimate[question] + weight * value
        place = number % len(self)
        if (place + 1) % self._adaptive.every or place + 2 >= len(self):
            return False
        self._reorder(place + 2)
        return True

    def _reorder(self, start: int) -> None:
        """Hand out the visits that are left from batch `start` on, pass by pass, to the first in order.

        A question with as many visits left as there are passes is taken whatever its place. Stages may differ in length
        by a question; where that leaves a pass short of questions, it takes the next in order once more.
        """
        rest = self.batches[start:]
        visits = Counter(q for batch in rest for q in batch.questions)
        passes = list(dict.fromkeys((batch.stage, batch.epoch) for batch in rest))
        had = {q for b in self.batches[:start] if (b.stage, b.epoch) == passes[0] for q in b.questions}
        order = [int(q) for q in np.lexsort((self._tie, self.estimate.round(9), self._last)) if q in visits]
        out: list[Batch] = []
        for number, (stage, epoch) in enumerate(passes):
            sizes = [len(b.questions) for b in rest if (b.stage, b.epoch) == (stage, epoch)]
            due = len(passes) - number
            free = [q for q in order if q not in had]
            free.sort(key=lambda q: 0 if visits[q] >= due else 1 if visits[q] > 0 else 2)
            chosen, had = free[: sum(sizes)], set()
            visits.subtract(chosen)
            shuffled = np.random.default_rng([self.seed, 2, start, stage, epoch]).permutation(chosen).tolist()
            for size in sizes:
                out.append(Batch(stage, epoch, shuffled[:size]))
                shuffled = shuffled[size:]
        self.batches[start:] = out

    def state_dict(self) -> dict[str, Any]:
        """Return the estimates and the order as it is now."""
        return {"estimate": self.estimate.tolist(), "batches": [list(batch) for batch in self.batches]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.estimate = np.array(state["estimate"])
        self.batches = [Batch(*batch) for batch in state["batches"]]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
