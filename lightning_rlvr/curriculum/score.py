"""Semantic-entropy scores of questions: sample answers, cluster them by meaning, store what came out."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch

from lightning_rlvr.ops.semantic_entropy import Estimator, Unparsable, cluster_groups, semantic_entropy
from lightning_rlvr.rewards import verdicts_of
from lightning_rlvr.rewards.identity import questions_digest
from lightning_rlvr.rollout import Served, seed_of
from lightning_rlvr.store import Store, read_records
from lightning_rlvr.types import Engine, Prompt, Response, Reward, Rollouts, Sampling, UserError, Verdict

ESTIMATORS: tuple[Estimator, ...] = ("discrete", "rao_blackwell", "likelihood")
# What the curriculum can order by, beside columns of the data.
NUMBERS = (
    *(f"semantic_entropy_{name}" for name in ESTIMATORS),
    "clusters",
    "majority",
    "pass_rate",
    "mean_token_entropy",
    "mean_length",
    "truncated",
    "unparsable",
)
LAYOUT = 2  # of the file; changes when its columns do


@dataclass(frozen=True)
class Scoring:
    """How questions are scored.

    Args:
        samples: answers sampled for each question (M in arXiv 2512.04359, which does not state it).
        temperature: of the sampling; the policy's own distribution at 1.
        unparsable: whether unparsable answers are a cluster each, or one cluster together. Stored scores are
            recomputed for it, without sampling again.
        seed: of the sampling.
        prompts_per_batch: questions sampled at a time; changes no score beyond rounding.
        served: a server that runs the policy and is sampled in its place (all but the discrete estimator need vLLM's).
        file: scores to use, made by `python -m lightning_rlvr score`; made and cached by itself if not given.
    """

    samples: int = 8
    temperature: float = 1.0
    unparsable: Unparsable = "own_cluster_each"
    seed: int = 1
    prompts_per_batch: int = 32
    served: Served | None = None
    file: str | None = None

    def __post_init__(self) -> None:
        for key, least in (("samples", 2), ("prompts_per_batch", 1)):
            if getattr(self, key) < least:
                raise UserError(f"{key} must be at least {least}, got {getattr(self, key)}. Set data.scoring.{key}.")
        if self.temperature <= 0:
            raise UserError(
                f"temperature must be positive, got {self.temperature}: greedy answers all agree, so their "
                "semantic entropy is 0 for every question. Set data.scoring.temperature."
            )


def score_questions(
    prompts: Sequence[Prompt],
    encode: Callable[[str], list[int]],
    decode: Callable[[Rollouts], list[Response]],
    engine: Engine,
    reward: Reward,
    scoring: Scoring,
    max_new_tokens: int,
    store: Store,
    done: set[str],
    world: int = 1,
) -> None:
    """Score the questions that are not `done` and append them to the store, batch by batch.

    Columns: uid, question, gold; the semantic entropy by each estimator (nats), clusters, majority (share of the
    most frequent parsed answer), majority_correct, pass_rate, mean_token_entropy (nats), mean_length (tokens),
    truncated and unparsable (counts; unparsable are all without an answer, also where the verifier gave up); and the
    samples themselves: answers (None if unparsable), cluster, correct, logp (summed, nats), length (tokens).
    Randomness depends on the seed and the uid alone.

    Batches are cut before what is done is left out, and shared out to `world` ranks as they are: so a score does not
    depend on rank or resumption by as much as a rounding.
    """
    from tqdm import tqdm

    size = scoring.prompts_per_batch
    cut = [[p for p in prompts[i : i + size] if p.uid not in done] for i in range(0, len(prompts), size)]
    mine = [batch for batch in cut if batch][store.rank :: world]
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=scoring.temperature)
    total = sum(map(len, mine))
    with tqdm(total=total, desc="semantic entropy", unit="question", leave=False, disable=store.rank > 0) as bar:
        for batch in mine:
            seeds = [seed_of(scoring.seed, "score", prompt.uid) for prompt in batch]
            rollouts = engine.generate([encode(p.text) for p in batch], seeds, scoring.samples, sampling)
            repeated = [prompt for prompt in batch for _ in range(scoring.samples)]
            verdicts = verdicts_of(reward, decode(rollouts), repeated)
            store.append(score_batch(batch, rollouts, verdicts, reward))
            bar.update(len(batch))


def score_batch(
    prompts: Sequence[Prompt],
    rollouts: Rollouts,
    verdicts: Sequence[Verdict],
    reward: Reward,
) -> list[dict[str, Any]]:
    """Return one record a question; rows of `rollouts` and `verdicts` are prompt-major.

    Unparsable answers are a cluster each; `recompute` puts them together.
    """
    samples = len(verdicts) // len(prompts)
    groups = [verdicts[i * samples : (i + 1) * samples] for i in range(len(prompts))]
    answers = [[_writable(verdict.answer) for verdict in group] for group in groups]
    labels = cluster_groups(answers, reward.equivalent)
    logp = rollouts.logp.double().sum(dim=1).view(-1, samples).tolist()
    lengths = rollouts.mask.sum(dim=1).view(-1, samples)
    entropy = rollouts.entropy.double().sum(dim=1).view(-1, samples).sum(dim=1) / lengths.sum(dim=1)
    truncated = rollouts.truncated.view(-1, samples).sum(dim=1)
    records = []
    for i, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        correct = [verdict.correct for verdict in group]
        drawn: dict[str, Any] = {
            "answers": answers[i],
            "cluster": labels[i],
            "correct": correct,
            "logp": logp[i],
            "length": lengths[i].tolist(),
        }
        records.append(
            {
                "uid": prompt.uid,
                "question": prompt.text,
                "gold": prompt.answer,
                **estimates(drawn),
                "pass_rate": sum(correct) / samples,
                "mean_token_entropy": float(entropy[i]),
                "mean_length": float(lengths[i].double().mean()),
                "truncated": int(truncated[i]),
                "unparsable": drawn["answers"].count(None),
                **drawn,
            }
        )
    return records


def _writable(answer: str | None) -> str | None:
    """Replace what UTF-8 cannot write: half a surrogate pair."""
    return answer if answer is None else answer.encode("utf-8", "replace").decode()


def estimates(drawn: dict[str, Any]) -> dict[str, Any]:
    """Return what follows from the clusters of one question's samples: entropies, clusters, and the majority."""
    labels, lengths = torch.tensor(drawn["cluster"]), torch.tensor(drawn["length"])
    logp = torch.tensor(drawn["logp"], dtype=torch.float64)
    told = not logp.isnan().any()  # a server may not tell it: only the discrete estimator does without
    parsed = [label for label, answer in zip(drawn["cluster"], drawn["answers"], strict=True) if answer is not None]
    largest = max(dict.fromkeys(parsed), key=parsed.count, default=None)
    return {
        **{
            f"semantic_entropy_{name}": semantic_entropy(labels, logp, lengths, name)
            if told or name == "discrete"
            else math.nan
            for name in ESTIMATORS
        },
        "clusters": len(set(drawn["cluster"])),
        "majority": parsed.count(largest) / len(labels),
        "majority_correct": largest is not None and bool(drawn["correct"][drawn["cluster"].index(largest)]),
    }


def recompute(scores: pd.DataFrame, unparsable: Unparsable) -> pd.DataFrame:
    """Return the scores with unparsable answers clustered as given, from the samples stored."""
    records = []
    for row in cast("list[dict[str, Any]]", scores.to_dict("records")):
        drawn = {key: list(row[key]) for key in ("answers", "cluster", "correct", "logp", "length")}
        names = [None if a is None else str(k) for a, k in zip(drawn["answers"], drawn["cluster"], strict=True)]
        drawn["cluster"] = cluster_groups([names], lambda pairs: [False] * len(pairs), unparsable)[0]
        records.append({**row, **drawn, **estimates(drawn)})
    return pd.DataFrame(records, columns=scores.columns)


def manifest(
    prompts: Sequence[Prompt],
    encode: Callable[[str], list[int]],
    policy: str,
    precision: str,
    prompt_format: str,
    reward: str,
    scoring: Scoring,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Return what the stored scores depend on: equal manifests mean equal scores.

    `reward` is the verifier's repr, which names its version; the tokenizer and the template show in the prompts' ids.
    """
    return {
        "policy": policy,
        "weights": precision if precision.endswith("-true") and precision != "32-true" else "as loaded",
        "prompt_format": prompt_format,
        "prompt_tokens": _hash([encode(p.text) for p in prompts]),
        "reward": reward,
        "data": questions_digest(prompts),
        "questions": len(prompts),
        "max_new_tokens": max_new_tokens,
        "seed": scoring.seed,
        "samples": scoring.samples,
        "temperature": scoring.temperature,
        "layout": LAYOUT,
        **({} if scoring.served is None else {"served": scoring.served.fingerprint()}),
    }


def _hash(values: Any) -> str:
    return hashlib.sha256(repr(values).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def cache_path(folder: Path, about: dict[str, Any]) -> Path:
    """Return where scores with this manifest are cached."""
    return folder / f"scores-{_hash(json.dumps(about, sort_keys=True))[:16]}.parquet"


def read_scores(path: Path, about: dict[str, Any], unparsable: Unparsable, setting: str) -> pd.DataFrame:
    """Read scores made for exactly this manifest, with unparsable answers clustered as asked for.

    Raises: UserError if the file is missing or not a score file, or that says what differs from `about`.
    """
    scores = read_records(path, about, setting)
    return scores if unparsable == "own_cluster_each" else recompute(scores, unparsable)
