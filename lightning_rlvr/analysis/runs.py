"""What runs leave, as pandas frames: the folder of a sweep, of one run, or of an earlier report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_rlvr.types import UserError

RUN = re.compile(r"seed-(\d+)")
MANIFEST, SUMMARY, METRICS = "sweep.json", "summary.json", "metrics.csv"
KEPT = {"runs": "runs.csv", "training": "training.parquet", "held_out": "validations.parquet"}  # by `keep`
CURVES = ("entropy", "reward", "accuracy", "response_length", "covariance", "lr", "share/", "kl/")
ABOUT = ("experiment", "commit", "threads", "versions", "variants", "seeds")  # of a manifest; the rest is of a machine


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Read a file of a study here. Raises: UserError if it is missing, damaged or lacks something."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} must be as this program leaves it, and cannot be read: {error!r}. Make it anew, or take it out "
            "with the run or the report that it belongs to."
        ) from error


def read_runs(folder: Path) -> pd.DataFrame:
    """Return a row for each finished run, by variant and seed.

    `folder` is that of a sweep (runs VARIANT/seed-N), of a single run, which is a variant of its name, or one that
    `keep` wrote to. Columns: `before/NAME` and `after/NAME` for each held-out metric, train_entropy/first and /last
    (nats), seconds, peak_memory (bytes), updates. Variants are in the order of the sweep's manifest.

    Raises: UserError if there is no finished run, or a file is damaged.
    """
    if is_kept(folder):
        with _reading(folder / KEPT["runs"]):
            table = pd.read_csv(folder / KEPT["runs"], dtype={"variant": str}, float_precision="round_trip")
            return table.set_index(["variant", "seed"])
    rows = []
    for path, variant, seed, summary in _finished(folder):
        with _reading(path / SUMMARY):
            rows.append({"variant": variant, "seed": seed, **_row(summary)})
    return pd.DataFrame(rows).set_index(["variant", "seed"])


def _row(summary: Mapping[str, Any]) -> dict[str, object]:
    row: dict[str, object] = {}
    for when in ("before", "after"):
        held_out = {k.removeprefix("val/"): v for k, v in (summary[when] or {}).items() if k != "step"}
        row |= {f"{when}/{name}": value for name, value in held_out.items()}
    row |= {f"train_entropy/{end}": value for end, value in (summary["train_entropy"] or {}).items()}
    row |= {"seconds": summary["seconds"]["total"], "peak_memory": summary["peak_memory_bytes"]}
    return row | {"updates": summary["optimizer_steps"]}


def read_training(folder: Path) -> pd.DataFrame:
    """Return the training metrics of every finished run: a row for each rollout batch.

    Columns: variant, seed, batch (from 1 on), and those of metrics.csv under train/ and seconds/, or what `keep` kept
    of them.
    """
    return _read_metrics(folder, "train/", "training")


def read_held_out(folder: Path) -> pd.DataFrame:
    """Return the held-out metrics of every finished run: a row for each validation, before any update at batch 0.

    Columns: variant, seed, batch (those trained on before), and those of metrics.csv under val/.
    """
    return _read_metrics(folder, "val/", "held_out")


def is_kept(folder: Path) -> bool:
    """Return whether a folder is one that `keep` wrote to."""
    return (folder / KEPT["runs"]).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a sweep or of what was kept of one, empty if there is none."""
    path = folder / MANIFEST
    with _reading(path):
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def keep(
    folder: Path, runs: pd.DataFrame, training: pd.DataFrame, held_out: pd.DataFrame, manifest: Mapping[str, Any]
) -> None:
    """Write what tables and figures of a study need to a folder that reads like the study's, at a small size.

    Of the training metrics these are the curves that figures draw; of the manifest, what is not of one machine.
    """
    runs.to_csv(folder / KEPT["runs"])
    curves = [name for name in map(str, training) if name.removeprefix("train/").startswith(CURVES)]
    training = training[["variant", "seed", "batch", *curves]]
    for name, table in (("training", training), ("held_out", held_out)):
        table.to_parquet(folder / KEPT[name], index=False, compression="zstd")
    about = {name: manifest[name] for name in (*ABOUT, "baseline") if name in manifest}
    (folder / MANIFEST).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _read_metrics(folder: Path, prefix: str, kept_as: str) -> pd.DataFrame:
    if is_kept(folder):
        if not (kept := folder / KEPT[kept_as]).is_file():
            raise UserError(f"{folder} must hold {kept.name} beside runs.csv, as `report` leaves them; it does not.")
        with _reading(kept):
            return pd.read_parquet(kept)
    frames = []
    for path, variant, seed, _ in _finished(folder):
        with _reading(path / METRICS):
            table = pd.read_csv(path / METRICS)
            if (present := f"{prefix}entropy") not in table:
                continue
            rows = table[table[present].notna()]
            batch = rows["step"].to_numpy() + 1
        if prefix == "val/":
            batch[0] = 0  # the run's first validation precedes its first batch
        rows = rows[[c for c in map(str, rows) if c.startswith((prefix, "seconds/")) and rows[c].notna().any()]]
        frames.append(rows.assign(variant=variant, seed=seed, batch=batch))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["variant", "seed", "batch"])


def _finished(folder: Path) -> list[tuple[Path, str, int, dict[str, Any]]]:
    """Return folder, variant, seed and summary of each finished run, in the manifest's order, then by name and seed."""
    alone = (folder / SUMMARY).is_file()
    found = []
    for path in folder.glob(SUMMARY if alone else f"*/*/{SUMMARY}"):
        match = RUN.fullmatch(path.parent.name)
        with _reading(path):
            summary = json.loads(path.read_text(encoding="utf-8"))
            if summary["status"] != "finished" or not (alone or match):
                continue
            seed = summary["seed"] if match is None else int(match[1])
        found.append((path.parent, folder.resolve().name if alone else path.parents[1].name, seed, summary))
    if not found:
        raise UserError(
            f"{folder} must hold finished runs, VARIANT/seed-N, as a sweep leaves them, or be that of one; it has none."
        )
    known = read_manifest(folder).get("variants", [])
    return sorted(found, key=lambda run: (known.index(run[1]) if run[1] in known else len(known), run[1], run[2]))


def held_out_metrics(runs: pd.DataFrame) -> list[str]:
    """Return the names of the held-out metrics: avg@k, then each pass@k, then the others."""
    names = [name.removeprefix("after/") for name in map(str, runs) if name.startswith("after/")]
    passes = sorted((n for n in names if n.startswith("pass@")), key=lambda n: int(n.removeprefix("pass@")))
    average = [name for name in names if name.startswith("avg@")]
    return [*average, *passes, *(name for name in names if name not in (*average, *passes))]


def variants_of(runs: pd.DataFrame) -> list[str]:
    """Return the variants in order."""
    return list(dict.fromkeys(map(str, runs.index.get_level_values("variant"))))
