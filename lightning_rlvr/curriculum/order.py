"""The curriculum: from stored scores to stages of questions in sorted order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from lightning_rlvr.curriculum.score import NUMBERS
from lightning_rlvr.ops.semantic_entropy import Estimator
from lightning_rlvr.types import Prompt, UserError

FILTERS = ("confident_and_wrong", "all_right", "all_wrong")
Order = Literal["ascending", "descending", "shuffled", "pass_rate", "column"]


@dataclass(frozen=True)
class Adaptive:
    """Re-order what is left of the curriculum by what training shows of the questions.

    Each training group is a fresh estimate x of its question's semantic entropy (or pass rate, if that is the
    order): e <- (1 - weight) * e + weight * x, starting from the stored score. Every `every` batches all visits that
    are left are sorted again by e: each pass takes the first questions with a visit left that it has not had yet. A
    question keeps its number of visits, a pass and a stage their length.

    Args:
        every: batches between two re-orderings.
        weight: of the fresh estimate against the running one, in (0, 1].
    """

    every: int = 8
    weight: float = 0.5

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"every must be at least 1 batch, got {self.every}. Set data.curriculum.adaptive.every.")
        if not 0 < self.weight <= 1:
            raise UserError(
                f"weight must lie in (0, 1], got {self.weight}: it is the share of the fresh estimate in the running "
                "one. Set data.curriculum.adaptive.weight."
            )


@dataclass(frozen=True)
class Curriculum:
    """In which order questions are trained on, and which are left out.

    Args:
        order: by semantic entropy `ascending` (SENT: agreed first, disputed last) or `descending`, by
            `pass_rate` (often solved first), by a `column`, or `shuffled`.
        column: with order column, what to sort by, ascending: a number of the score file (mean_length, clusters, ...)
            or else a column of the data. A minus before its name sorts descending.
        stages: how many parts of (nearly) equal size the sorted questions are cut into.
        epochs: passes over the questions of a stage before the next begins: one number, or one for each stage.
        estimator: which estimate of semantic entropy orders them.
        all_right, all_wrong: whether questions whose samples were all right, or all wrong, are kept or dropped.
        confident_and_wrong: whether questions of which more than half of the samples gave one and the same wrong
            answer are kept in order, come last, or are dropped: their entropy is low, but they are not easy.
        at_boundary: whether optimizer, schedule and reference carry over to the next stage, or restart: the optimizer
            and its schedule from nothing, the reference from the policy as it is then.
        adaptive: re-order by running estimates while training; off if null.

    Source: arXiv 2512.04359; its release uses 2 stages of 5 epochs and restarts between them.
    """

    order: Order = "ascending"
    stages: int = 2
    epochs: int | list[int] = 1
    estimator: Estimator = "discrete"
    column: str = ""
    all_right: Literal["keep", "drop"] = "keep"
    all_wrong: Literal["keep", "drop"] = "keep"
    confident_and_wrong: Literal["keep", "last", "drop"] = "keep"
    at_boundary: Literal["carry_over", "restart"] = "carry_over"
    adaptive: Adaptive | None = None

    def __post_init__(self) -> None:
        if self.stages < 1:
            raise UserError(f"stages must be at least 1, got {self.stages}. Set data.curriculum.stages.")
        if not self.passes or min(self.passes) < 1:
            raise UserError(f"epochs must be at least 1, got {self.epochs}. Set data.curriculum.epochs.")
        if len(self.passes) != self.stages:
            raise UserError(
                f"epochs must be one number or one for each of the {self.stages} stages, got {self.epochs}. "
                "Set data.curriculum.epochs."
            )
        if (self.order == "column") != bool(self.column):
            raise UserError(
                f"column must be named with order column, and only then: got order {self.order}, column "
                f"{self.column!r}. Set data.curriculum.column."
            )
        if self.adaptive is not None:
            self._check_adaptive()

    def _check_adaptive(self) -> None:
        if self.order not in ("ascending", "descending", "pass_rate"):
            raise UserError(
                f"an adaptive curriculum needs an order that training estimates, got {self.order}. Set "
                "data.curriculum.order to ascending, descending or pass_rate, or data.curriculum.adaptive to null."
            )
        if len(set(self.passes)) > 1 or self.passes[0] < 2:
            raise UserError(
                f"an adaptive curriculum needs at least 2 epochs, as many in each stage, got {self.epochs}: what it "
                "learns of a question orders that question's later visits. Set data.curriculum.epochs, or "
                "data.curriculum.adaptive to null."
            )

    @property
    def passes(self) -> list[int]:
        """Passes over the questions of each stage."""
        return [self.epochs] * self.stages if isinstance(self.epochs, int) else list(self.epochs)

    @property
    def sorted_by(self) -> str:
        """The column of the scores or of the data that questions are sorted by, or `shuffled`."""
        if self.order == "column":
            return self.column.removeprefix("-")
        return self.order if self.order in ("pass_rate", "shuffled") else f"semantic_entropy_{self.estimator}"

    @property
    def orders_by_scores(self) -> bool:
        """Whether the order is read from scores."""
        return self.sorted_by in NUMBERS

    @property
    def needs_scores(self) -> bool:
        """Whether order or filters are read from scores."""
        return self.orders_by_scores or any(getattr(self, name) != "keep" for name in FILTERS)

    def check(self, size: int, dropped: int = 0) -> None:
        """Raise UserError if `size` questions, after some were dropped, are too few for the stages."""
        if size < self.stages:
            why = f" after the filters of data.curriculum dropped {dropped}" if dropped else ""
            raise UserError(
                f"stages must be at most the number of questions ({size}{why}), got {self.stages}: a stage would be "
                "empty. Set data.curriculum.stages."
            )

    def key(self, prompts: Sequence[Prompt], scores: pd.DataFrame | None) -> np.ndarray:
        """Return what the questions are sorted by, ascending [questions].

        Raises: UserError if the column is not there or holds what is no number.
        """
        if self.order == "shuffled":
            return np.zeros(len(prompts))
        if not self.orders_by_scores:
            values = column_of(prompts, self.sorted_by)
        else:
            if scores is None or len(scores) != len(prompts):
                raise ValueError(
                    f"ordering {len(prompts)} questions needs {len(prompts)} scores, got "
                    f"{None if scores is None else len(scores)}"
                )
            values = scores[self.sorted_by].to_numpy(dtype=np.float64)
        if np.isnan(values).any():
            raise UserError(
                f"the numbers that questions are ordered by must not be nan, but {np.isnan(values).sum()} of "
                f"{self.sorted_by} are: they have no place in the order. A server that was sampled may not have told "
                "what they are made of. Set data.curriculum.estimator to discrete, or data.curriculum.order."
            )
        return -values if self.order in ("descending", "pass_rate") or self.column.startswith("-") else values

    def dropped(self, scores: pd.DataFrame | None) -> dict[str, np.ndarray]:
        """Return, for each filter that drops, which questions it does [questions]; each counts for the first."""
        filters = [name for name in FILTERS if getattr(self, name) == "drop"]
        out: dict[str, np.ndarray] = {}
        if scores is None or not filters:
            return out
        gone, found = np.zeros(len(scores), dtype=bool), kinds(scores)
        for name in filters:
            out[name] = found[name] & ~gone
            gone |= out[name]
        return out

    def last(self, scores: pd.DataFrame | None, size: int) -> np.ndarray:
        """Return which of `size` questions come after all others, whatever the order [questions]."""
        if scores is None or self.confident_and_wrong != "last":
            return np.zeros(size, dtype=bool)
        return kinds(scores)["confident_and_wrong"]

    def cut(self, prompts: Sequence[Prompt], scores: pd.DataFrame | None, seed: int) -> list[np.ndarray]:
        """Return the stages: arrays of question indices in sorted order, ties in a seeded random order.

        Raises: UserError if too few questions are left for the stages.
        """
        key = self.key(prompts, scores)
        kept = np.ones(len(prompts), dtype=bool)
        for chosen in self.dropped(scores).values():
            kept &= ~chosen
        self.check(int(kept.sum()), int((~kept).sum()))
        order = np.lexsort((tie_break(len(prompts), seed), key.round(9), self.last(scores, len(prompts))))
        return np.array_split(order[kept[order]], self.stages)


def tie_break(size: int, seed: int) -> np.ndarray:
    """Return the rank that settles ties, a seeded permutation.

    Estimates that are equal in exact arithmetic may differ by a rounding, so keys are compared to 1e-9.
    """
    return np.random.default_rng([seed, 0]).permutation(size)


def kinds(scores: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return which questions are of the kinds that filters name [questions]; they may be of several."""
    rate = scores["pass_rate"].to_numpy()
    wrong = (scores["majority"].to_numpy() > 0.5) & ~scores["majority_correct"].to_numpy(dtype=bool)
    return {"confident_and_wrong": wrong, "all_right": rate == 1, "all_wrong": rate == 0}


def column_of(prompts: Sequence[Prompt], name: str) -> np.ndarray:
    """Return the numbers that the data has in a column [questions]. Raises: UserError if one is missing."""
    values = np.empty(len(prompts))
    for i, prompt in enumerate(prompts):
        value = prompt.metadata.get(name)
        try:
            values[i] = np.nan if value is None else float(value)
        except (TypeError, ValueError):
            values[i] = np.nan
        if not np.isfinite(values[i]):
            raise UserError(
                f"column must name numbers of the score file ({', '.join(NUMBERS)}) or of the data, got {name!r}: "
                f"question {prompt.uid!r} has {value!r} there, and {', '.join(prompt.metadata) or 'no columns'}. "
                "Set data.curriculum.column."
            )
    return values
