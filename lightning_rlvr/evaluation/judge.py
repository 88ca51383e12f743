"""Verdicts on stored responses: made from their texts alone, so another reward needs no new samples."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_rlvr.models.pretrained import file_digest
from lightning_rlvr.ops.pass_at_k import UNPARSED
from lightning_rlvr.ops.semantic_entropy import cluster_groups
from lightning_rlvr.rewards import verdicts_of
from lightning_rlvr.rewards.identity import questions_digest, shown
from lightning_rlvr.store import Record, Store
from lightning_rlvr.types import Prompt, Response, Reward, UserError, Verdict

PROBLEMS_AT_A_TIME = 16


def judging_manifest(reward: Reward, questions: Sequence[Prompt], responses: Path) -> dict[str, Any]:
    """Return what verdicts depend on: the reward, the questions with their golds, and the file of the responses.

    The file counts by its content: another machine samples other responses from an equal manifest.
    """
    return {
        "reward": shown(reward, "the benchmark's reward"),
        "golds": questions_digest(questions),
        "responses": file_digest(responses),
    }


def judge(name: str, reward: Reward, questions: Sequence[Prompt], samples: pd.DataFrame, store: Store) -> None:
    """Judge what is missing of the verdicts on a model's responses to a benchmark, and finish the store.

    Verdicts of another reward or other gold answers are replaced: unlike samples they are soon made anew.
    """
    from tqdm import tqdm

    with store.claim():
        _drop_others(store)
        done = store.done()
        missing = [i for i, prompt in enumerate(questions) if prompt.uid not in done]
        with tqdm(total=len(missing), desc=name, unit=" problems judged", mininterval=1.0, disable=not missing) as bar:
            for start in range(0, len(missing), PROBLEMS_AT_A_TIME):
                part = missing[start : start + PROBLEMS_AT_A_TIME]
                store.append(_judge(reward, [questions[i] for i in part], samples.iloc[part]))
                bar.update(len(part))
        store.finish([prompt.uid for prompt in questions])


def _drop_others(store: Store) -> None:
    try:
        store.check()
    except UserError:
        store.path.unlink(missing_ok=True)
        shutil.rmtree(store.parts, ignore_errors=True)


def _judge(reward: Reward, questions: Sequence[Prompt], samples: pd.DataFrame) -> list[Record]:
    """Return one record a question, with lists over its responses."""
    responses = [
        [
            Response(text, bool(cut), int(tokens))
            for text, cut, tokens in zip(row["response"], row["truncated"], row["tokens"], strict=True)
        ]
        for row in samples.to_dict("records")
    ]
    repeated = [prompt for prompt, own in zip(questions, responses, strict=True) for _ in own]
    found = iter(verdicts_of(reward, [response for own in responses for response in own], repeated))
    verdicts = [[next(found) for _ in own] for own in responses]
    labels = cluster_groups([[verdict.answer for verdict in own] for own in verdicts], reward.equivalent)
    return [_record(*of_one) for of_one in zip(questions, verdicts, labels, strict=True)]


def _record(prompt: Prompt, verdicts: Sequence[Verdict], labels: Sequence[int]) -> Record:
    answers = [verdict.answer for verdict in verdicts]
    return {
        "uid": prompt.uid,
        "gold": prompt.answer,
        "status": [verdict.status.value for verdict in verdicts],
        "answer": answers,
        "score": [verdict.score for verdict in verdicts],
        "cluster": [UNPARSED if a is None else label for a, label in zip(answers, labels, strict=True)],
    }
