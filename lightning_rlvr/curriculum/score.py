"""Semantic-entropy scores of questions: sample answers, cluster them by meaning, store what came out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lightning_rlvr.ops.semantic_entropy import Estimator, Unparsable, cluster_answers, semantic_entropy
from lightning_rlvr.rollout import seed_of
from lightning_rlvr.types import Engine, Prompt, Response, Reward, Rollouts, Sampling, UserError, Verdict

ESTIMATORS: tuple[Estimator, ...] = ("discrete", "rao_blackwell", "likelihood")


@dataclass(frozen=True)
class Scoring:
    """How questions are scored.

    Args:
        samples: answers sampled for each question (M in arXiv 2512.04359, which does not state it).
        temperature: of the sampling; the policy's own distribution at 1.
        unparsable: whether unparsable answers are a cluster each, or one cluster together.
        prompts_per_batch: questions sampled at a time; changes no score.
        file: scores to use, made by `python -m lightning_rlvr score`; made and cached by itself if not given.
    """

    samples: int = 8
    temperature: float = 1.0
    unparsable: Unparsable = "own_cluster_each"
    prompts_per_batch: int = 32
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
    seed: int,
) -> pd.DataFrame:
    """Return one row a question, in the order given.

    Columns: uid, the semantic entropy by each estimator (nats), clusters, pass_rate, mean_token_entropy (nats),
    mean_length (tokens), truncated and unparsable (counts), and the samples themselves: answers (None if
    unparsable), correct, logp (summed, nats), length (tokens). Randomness depends on `seed` and the uid alone.
    """
    from tqdm import tqdm

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=scoring.temperature)
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(prompts), desc="semantic entropy", unit="question", leave=False) as bar:
        for start in range(0, len(prompts), scoring.prompts_per_batch):
            batch = prompts[start : start + scoring.prompts_per_batch]
            seeds = [seed_of(seed, "score", prompt.uid) for prompt in batch]
            rollouts = engine.generate([encode(p.text) for p in batch], seeds, scoring.samples, sampling)
            repeated = [prompt for prompt in batch for _ in range(scoring.samples)]
            verdicts = reward(decode(rollouts), repeated)
            for i, prompt in enumerate(batch):
                part = slice(i * scoring.samples, (i + 1) * scoring.samples)
                rows.append(_score_row(prompt, rollouts.rows(part), verdicts[part], reward, scoring))
            bar.update(len(batch))
    return pd.DataFrame(rows)


def _score_row(
    prompt: Prompt, rollouts: Rollouts, verdicts: Sequence[Verdict], reward: Reward, scoring: Scoring
) -> dict[str, Any]:
    answers = [verdict.answer for verdict in verdicts]
    labels = cluster_answers(answers, lambda a, b: reward.equivalent([(a, b)])[0], scoring.unparsable)
    logp = rollouts.logp.double().sum(dim=1).cpu()
    lengths = rollouts.mask.sum(dim=1).cpu()
    entropies = {
        f"semantic_entropy_{name}": semantic_entropy(torch.tensor(labels), logp, lengths, name) for name in ESTIMATORS
    }
    correct = [verdict.correct for verdict in verdicts]
    return {
        "uid": prompt.uid,
        **entropies,
        "clusters": max(labels) + 1,
        "pass_rate": sum(correct) / len(correct),
        "mean_token_entropy": float(rollouts.entropy.sum() / lengths.sum()),
        "mean_length": float(lengths.double().mean()),
        "truncated": int(rollouts.truncated.sum()),
        "unparsable": sum(answer is None for answer in answers),
        "answers": answers,
        "correct": correct,
        "logp": logp.tolist(),
        "length": lengths.tolist(),
    }


def manifest(
    prompts: Sequence[Prompt],
    policy: str,
    prompt_format: str,
    reward: str,
    scoring: Scoring,
    max_new_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """Return what the scores depend on; equal manifests mean equal scores."""
    data = hashlib.sha256("\n".join(repr((p.uid, p.text, p.answer)) for p in prompts).encode()).hexdigest()
    settings = {k: v for k, v in asdict(scoring).items() if k not in ("file", "prompts_per_batch")}
    return {
        "policy": policy,
        "prompt_format": prompt_format,
        "reward": reward,
        "data": data,
        "questions": len(prompts),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        **settings,
    }


def cache_path(folder: Path, about: dict[str, Any]) -> Path:
    """Return where scores with this manifest are cached."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"scores-{digest}.parquet"


def write_scores(scores: pd.DataFrame, path: Path, about: dict[str, Any]) -> None:
    """Write scores as parquet with their manifest inside: the whole file or none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pandas(scores, preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), b"manifest": json.dumps(about).encode()})
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, partial)
    partial.replace(path)


def read_scores(path: Path, about: dict[str, Any]) -> pd.DataFrame:
    """Read scores made for exactly this manifest.

    Raises: UserError if the file is missing or not a score file, or that says what differs from `about`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        stored = json.loads((table.schema.metadata or {}).get(b"manifest", b"{}"))
    except (OSError, pa.ArrowInvalid, json.JSONDecodeError) as error:
        raise UserError(f"cannot read the scores {path}: {error}. Set data.scoring.file, or null to score.") from error
    keys = dict.fromkeys([*about, *stored])
    differing = {key: (stored.get(key), about.get(key)) for key in keys if stored.get(key) != about.get(key)}
    if differing:
        lines = "\n".join(f"  {key}: the file has {a!r}, this run {b!r}" for key, (a, b) in differing.items())
        raise UserError(
            f"the scores in {path} were made for something else:\n{lines}\n"
            "Set data.scoring.file to scores of this model and data, or to null to score."
        )
    return table.to_pandas()
