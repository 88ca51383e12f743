"""Semantic-entropy scores of questions, and the stages that a run cut them into."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lightning_rlvr.store import read_manifest
from lightning_rlvr.types import UserError


def read_scores(path: Path, run: Path | None = None) -> pd.DataFrame:
    """Return scores that `python -m lightning_rlvr score` wrote, a row for each question.

    Added columns: `kind` (confident and wrong, all right, all wrong, or mixed) and, with a run, `stage`: the stage of
    its curriculum that holds the question, from 1 on; 0 for questions that filters left out.

    Raises: UserError if the file is no score file.
    """
    from lightning_rlvr.curriculum.order import kinds  # it brings torch, which tables of runs do not need

    read_manifest(path, "the path of the scores")
    scores = pd.read_parquet(path)
    scores["kind"] = "mixed"
    found = kinds(scores)
    for name in ("all_right", "all_wrong", "confident_and_wrong"):
        scores.loc[found[name], "kind"] = name.replace("_", " ")
    return scores if run is None else scores.assign(stage=_stages(run, scores["uid"]))


def stage_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Return for each stage: questions, least, mean and greatest semantic entropy (nats), pass rate, kinds' counts."""
    grouped = scores.groupby("stage")
    table = grouped["semantic_entropy_discrete"].agg(["min", "mean", "max"]).add_prefix("entropy ")
    table.insert(0, "questions", grouped.size())
    table["pass rate"] = grouped["pass_rate"].mean()
    return table.join(pd.crosstab(scores["stage"], scores["kind"]))


def answer_table(scores: pd.DataFrame, rows: int = 5) -> pd.DataFrame:
    """Return questions with their gold and the answers that samples gave, the most frequent first: `12 x 5, 13 x 3`."""
    chosen = scores.head(rows)
    answers = [", ".join(f"{a} x {n}" for a, n in _counts(given).items()) for given in chosen["answers"]]
    return chosen[["question", "gold", "semantic_entropy_discrete", "pass_rate"]].assign(answers=answers)


def _counts(answers: Sequence[str | None]) -> dict[str, int]:
    """Return how often each answer was given, the most frequent first; ties as they came."""
    return dict(Counter("unparsable" if answer is None else answer for answer in answers).most_common())


def _stages(run: Path, uids: pd.Series) -> pd.Series:
    path = run / "curriculum.json"
    if not path.is_file():
        raise UserError(f"{run} must hold curriculum.json, as fit leaves it where data.curriculum is set.")
    stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
    number = {uid: i for i, stage in enumerate(stages, start=1) for uid in stage}
    return uids.map(number).fillna(0).astype(int)
