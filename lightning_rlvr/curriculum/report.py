"""The score report: one page about the semantic entropies of a question set and the stages they make."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lightning_rlvr.curriculum.order import Curriculum, kinds, tie_break
from lightning_rlvr.curriculum.score import ESTIMATORS
from lightning_rlvr.types import UserError

PAGE = Path(__file__).with_name("report.html")
BINS = 41  # of the entropies, centred on 0, ..., log(samples)
EXAMPLES = 4  # of each sort
CLUSTERS = 12  # of one example
SPELLINGS = 3  # of one cluster beside its first
QUESTION, ANSWER, VALUE = 1200, 160, 400  # characters; longer texts are cut


def write_report(
    scores: pd.DataFrame,
    curriculum: Curriculum,
    stages: Sequence[np.ndarray],
    manifest: Mapping[str, Any],
    path: Path,
) -> None:
    """Write `report_page` to `path`. Raises: UserError if that is no place to write to."""
    page = report_page(scores, curriculum, stages, manifest)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"the score report must be a file one can write, got {path}: {error}. Set output.") from error


def report_page(
    scores: pd.DataFrame, curriculum: Curriculum, stages: Sequence[np.ndarray], manifest: Mapping[str, Any]
) -> str:
    """Return a self-contained page about scores and the stages that a curriculum cuts them into.

    It holds counts and a few example questions, so it does not grow with the number of questions. Texts stand in it as
    data and are never read as markup. The part of the address after # chooses the estimator.

    Args:
        scores: one row a question, as `score_questions` makes them.
        curriculum: whose estimator is shown first, and whose settings are listed.
        stages: row numbers of `scores` as `Curriculum.cut` returns them; empty if no order could be made.
        manifest: what the scores depend on.
    """
    samples, kind = len(scores["answers"].iloc[0]), kinds(scores)
    parts = _parts(len(scores), stages)
    rows = {**parts, "all": np.arange(len(scores))} if len(parts) > 1 else parts
    data = {
        "questions": len(scores),
        "samples": samples,
        "estimator": curriculum.estimator,
        "stages": len(stages),
        "sorted_by": curriculum.sorted_by,
        "kinds": {name: int(chosen.sum()) for name, chosen in kind.items()},
        "majority_right": _number(scores["majority_correct"].mean()),
        "pass_rate": _number(scores["pass_rate"].mean()),
        "unparsable": _number(scores["unparsable"].mean() / samples),
        "truncated": _number(scores["truncated"].mean() / samples),
        "left_out": {name: int(chosen.sum()) for name, chosen in curriculum.dropped(scores).items()} if stages else {},
        "parts": {name: _summary(scores.iloc[r], kind["confident_and_wrong"][r], samples) for name, r in rows.items()},
        "passes": curriculum.passes if stages else [],
        "estimates": {
            name: {
                **_distribution(scores, name, parts, samples),
                "parts": {part: _extent(_entropy(scores, name)[r]) for part, r in rows.items()},
                "boundaries": boundaries(scores, name, curriculum, stages),
                "most": most_entropy(samples, name),
            }
            for name in ESTIMATORS
        },
        "examples": {
            title: [_example(scores.iloc[row], _tags(row, parts, kind)) for row in chosen]
            for title, chosen in choose(scores, curriculum.estimator).items()
        },
        "curriculum": {key: _text(value, VALUE) for key, value in asdict(curriculum).items()},
        "manifest": {str(key): _text(value, VALUE) for key, value in manifest.items()},
    }
    shown = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return PAGE.read_text(encoding="utf-8").replace("/*DATA*/null", shown)


def boundaries(
    scores: pd.DataFrame, estimator: str, curriculum: Curriculum, stages: Sequence[np.ndarray]
) -> list[tuple[float, float]]:
    """Return the entropies (nats) of the last question of a stage and the first of the next, for each pair in order.

    There are none unless the stages are sorted by this very estimate. Questions that come last whatever their entropy
    belong to no boundary.
    """
    if curriculum.sorted_by != f"semantic_entropy_{estimator}":
        return []
    late = kinds(scores)["confident_and_wrong"] & (curriculum.confident_and_wrong == "last")
    sorted_stages = [stage for stage in (stage[~late[stage]] for stage in stages) if len(stage)]
    entropy = _entropy(scores, estimator)
    return [
        (round(float(entropy[before[-1]]), 6), round(float(entropy[after[0]]), 6))
        for before, after in pairwise(sorted_stages)
    ]


def most_entropy(samples: int, estimator: str) -> float:
    """Return the most entropy (nats) that a question can have of which more than half of the samples agree.

    That is: of which just more than half do, while the others are a cluster each. Estimates that weigh samples by their
    likelihood may spread the mass evenly over these clusters.

    >>> round(most_entropy(3, "discrete"), 6), round(most_entropy(3, "likelihood"), 6)
    (0.636514, 0.693147)
    """
    agreed = samples // 2 + 1
    if estimator != "discrete":
        return math.log(samples - agreed + 1)
    share = agreed / samples
    return -share * math.log(share) + (1 - share) * math.log(samples)


def choose(scores: pd.DataFrame, estimator: str) -> dict[str, list[int]]:
    """Return the rows of example questions of each sort that there is, no question twice, ties in a random order."""
    entropy, tie = _entropy(scores, estimator), tie_break(len(scores), seed=0)
    order = np.lexsort((tie, entropy))[: np.isfinite(entropy).sum()]  # nan comes last
    wrong = np.flatnonzero(kinds(scores)["confident_and_wrong"])
    sorts = {
        "Confident and wrong": wrong[np.lexsort((tie[wrong], -scores["majority"].to_numpy()[wrong]))],
        "Lowest entropy": order,
        "Median entropy": order[np.abs(np.arange(len(order)) - (len(order) - 1) / 2).argsort(kind="stable")],
        "Highest entropy": order[::-1],
    }
    out: dict[str, list[int]] = {}
    taken: set[int] = set()
    for title, rows in sorts.items():
        out[title] = [row for row in rows.tolist() if row not in taken][:EXAMPLES]
        taken.update(out[title])
    return {title: rows for title, rows in out.items() if rows}


def clusters(row: pd.Series) -> list[dict[str, Any]]:
    """Return the clusters of one question's samples, the largest first and all unparsable ones as one, last."""
    members: dict[int, list[int]] = {}
    for i, (label, answer) in enumerate(zip(row["cluster"], row["answers"], strict=True)):
        members.setdefault(int(label) if isinstance(answer, str) else -1, []).append(i)
    out = []
    for label, group in sorted(members.items(), key=lambda item: (item[0] < 0, -len(item[1]))):
        spellings = [] if label < 0 else list(dict.fromkeys(row["answers"][i] for i in group))
        out.append(
            {
                "answer": _text(spellings[0], ANSWER) if spellings else None,
                "others": [_text(other, ANSWER) for other in spellings[1 : SPELLINGS + 1]],
                "clusters": len({int(row["cluster"][i]) for i in group}),
                "count": len(group),
                "right": sum(bool(row["correct"][i]) for i in group),
            }
        )
    return out


def _parts(questions: int, stages: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return what the questions fall into: the stages and what they leave out, or all."""
    if not stages:
        return {"all": np.arange(questions)}
    parts = {f"stage {number}": stage for number, stage in enumerate(stages, start=1)}
    rest = np.setdiff1d(np.arange(questions), np.concatenate(stages))
    return {**parts, "left out": rest} if len(rest) else parts


def _distribution(
    scores: pd.DataFrame, estimator: str, parts: Mapping[str, np.ndarray], samples: int
) -> dict[str, Any]:
    """Return counts of questions by entropy and part, and by entropy and pass rate; a nan is in neither."""
    entropy, top = _entropy(scores, estimator), math.log(samples)
    part = np.empty(len(scores), dtype=object)
    for name, rows in parts.items():
        part[rows] = name
    table = scores[["pass_rate"]].assign(entropy=entropy, wrong=kinds(scores)["confident_and_wrong"], part=part)
    table = table[np.isfinite(entropy)]
    table["bin"] = (table["entropy"] / top * (BINS - 1)).round().clip(0, BINS - 1).astype(int)
    counts = pd.crosstab(table["bin"], table["part"]).reindex(index=range(BINS), columns=list(parts), fill_value=0)
    cells = table.groupby(["bin", "pass_rate"]).agg(
        entropy=("entropy", "mean"), questions=("entropy", "size"), wrong=("wrong", "sum")
    )
    return {
        "agreed": _number((table["entropy"].round(9) == 0).mean()),
        "missing": len(scores) - len(table),
        "bins": counts.to_numpy().tolist(),
        "cells": [
            [_number(cell.entropy), _number(rate), int(cell.questions), int(cell.wrong)]
            for rate, cell in zip(cells.index.get_level_values("pass_rate"), cells.itertuples(), strict=True)
        ],
    }


def _summary(scores: pd.DataFrame, wrong: np.ndarray, samples: int) -> dict[str, Any]:
    return {
        "questions": len(scores),
        "pass_rate": _number(scores["pass_rate"].mean()),
        "mean_length": _number(scores["mean_length"].mean()),
        "confident_and_wrong": int(wrong.sum()),
        "unparsable": _number(scores["unparsable"].mean() / samples),
        "truncated": _number(scores["truncated"].mean() / samples),
    }


def _extent(entropy: np.ndarray) -> dict[str, float | None]:
    known = entropy[np.isfinite(entropy)]
    low, mean, high = (known.min(), known.mean(), known.max()) if len(known) else (np.nan,) * 3
    return {"low": _number(low), "mean": _number(mean), "high": _number(high)}


def _example(row: pd.Series, tags: list[str]) -> dict[str, Any]:
    groups = clusters(row)
    return {
        "uid": _text(row["uid"], ANSWER),
        "question": _text(row["question"], QUESTION),
        "gold": _text(row["gold"], ANSWER),
        "tags": tags,
        "entropy": {name: _number(row[f"semantic_entropy_{name}"]) for name in ESTIMATORS},
        "pass_rate": _number(row["pass_rate"]),
        "mean_length": _number(row["mean_length"]),
        "truncated": int(row["truncated"]),
        "clusters": groups[:CLUSTERS],
        "more": len(groups[CLUSTERS:]),
        "more_samples": sum(group["count"] for group in groups[CLUSTERS:]),
    }


def _tags(row: int, parts: Mapping[str, np.ndarray], kind: Mapping[str, np.ndarray]) -> list[str]:
    parted = [name for name, rows in parts.items() if len(parts) > 1 and row in rows]
    return parted + [name.replace("_", " ") for name, chosen in kind.items() if chosen[row]]


def _entropy(scores: pd.DataFrame, estimator: str) -> np.ndarray:
    """Return the estimates [questions], equal ones equal: they may differ by a rounding."""
    return scores[f"semantic_entropy_{estimator}"].to_numpy(dtype=np.float64).round(9)


def _number(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None


def _text(value: Any, longest: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text):,} characters)"
