"""From the folders of a sweep to tables: pandas frames in, pandas frames out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pandas as pd

from lightning_rlvr.types import UserError

RUN = re.compile(r"seed-(\d+)")
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean over seeds and its 95 % t-interval, mean - half to mean + half; half is nan for less than two values."""

    mean: float
    half: float
    seeds: int


class Law(NamedTuple):
    """The fit R = -a exp(H) + b of accuracy against entropy (nats), and the share of variance that it explains."""

    a: float
    b: float
    r2: float


# --- reading -------------------------------------------------------------------------------------


def read_runs(folder: Path) -> pd.DataFrame:
    """Return a row for each finished run FOLDER/VARIANT/seed-N, by variant and seed.

    Columns: `before/NAME` and `after/NAME` for each held-out metric, train_entropy/first and /last (nats), seconds,
    peak_memory (bytes), updates, folder. Variants are in the order of the sweep's manifest.

    Raises: UserError if there is no finished run.
    """
    rows = []
    for path, variant, seed in _folders(folder):
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        if summary["status"] != "finished":
            continue
        row: dict[str, object] = {"variant": variant, "seed": seed}
        for when in ("before", "after"):
            held_out = {k.removeprefix("val/"): v for k, v in (summary[when] or {}).items() if k != "step"}
            row |= {f"{when}/{name}": value for name, value in held_out.items()}
        row |= {f"train_entropy/{end}": value for end, value in (summary["train_entropy"] or {}).items()}
        row |= {"seconds": summary["seconds"]["total"], "peak_memory": summary["peak_memory_bytes"]}
        rows.append({**row, "updates": summary["optimizer_steps"], "folder": str(path)})
    if not rows:
        raise UserError(f"{folder} must hold finished runs, VARIANT/seed-N, as a sweep leaves them; it has none.")
    return pd.DataFrame(rows).set_index(["variant", "seed"])


def read_training(folder: Path) -> pd.DataFrame:
    """Return the training metrics of every finished run: a row for each rollout batch.

    Columns: variant, seed, batch (from 1 on), and those of metrics.csv under train/ and seconds/.
    """
    return _read_metrics(folder, "train/", "train/entropy")


def read_held_out(folder: Path) -> pd.DataFrame:
    """Return the held-out metrics of every finished run: a row for each validation, before any update at batch 0.

    Columns: variant, seed, batch (those trained on before), and those of metrics.csv under val/.
    """
    return _read_metrics(folder, "val/", "val/entropy")


def _read_metrics(folder: Path, prefix: str, present: str) -> pd.DataFrame:
    frames = []
    for variant, seed, path in read_runs(folder).reset_index()[["variant", "seed", "folder"]].itertuples(index=False):
        table = pd.read_csv(Path(path) / "metrics.csv")
        if present not in table:
            continue
        rows = table[table[present].notna()]
        batch = rows["step"].to_numpy() + 1
        if prefix == "val/":
            batch[0] = 0  # the run's first validation precedes its first batch
        rows = rows[[c for c in map(str, rows) if c.startswith((prefix, "seconds/")) and rows[c].notna().any()]]
        frames.append(rows.assign(variant=variant, seed=seed, batch=batch))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["variant", "seed", "batch"])


def _folders(folder: Path) -> list[tuple[Path, str, int]]:
    """Return the run folders with variant and seed, in the order of the manifest and then by name and seed."""
    manifest = folder / "sweep.json"
    known = json.loads(manifest.read_text(encoding="utf-8"))["variants"] if manifest.is_file() else []
    found = []
    for summary in folder.glob("*/*/summary.json"):
        match = RUN.fullmatch(summary.parent.name)
        if match:
            found.append((summary.parent, summary.parents[1].name, int(match[1])))
    return sorted(found, key=lambda run: (known.index(run[1]) if run[1] in known else len(known), run[1], run[2]))


# --- statistics ----------------------------------------------------------------------------------


def interval(values: Sequence[float] | np.ndarray | pd.Series) -> Interval:
    """Return mean and 95 % t-interval of values, one from each seed; nan values do not count.

    >>> interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, half=2.4841377117503..., seeds=3)
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    count = len(known)
    if count < 2:
        return Interval(float(known.mean()) if count else math.nan, math.nan, count)
    half = t_quantile(count - 1) * known.std(ddof=1) / math.sqrt(count)
    return Interval(float(known.mean()), float(half), count)


def t_within(t: float, dof: int) -> float:
    """Return the probability that a t variable with whole degrees of freedom lies in [-t, t].

    Source: Abramowitz and Stegun (1964), 26.7.3 and 26.7.4.
    """
    theta = math.atan(t / math.sqrt(dof))
    cos, odd = math.cos(theta), dof % 2
    term = total = cos if odd else 1.0
    if dof == 1:
        total = 0.0
    for k in range(2 + odd, dof - 1, 2):
        term *= cos**2 * (k - 1) / k
        total += term
    inside = math.sin(theta) * total
    return (theta + inside) * 2 / math.pi if odd else inside


def t_quantile(dof: int, confidence: float = CONFIDENCE) -> float:
    """Return the t with a t variable in [-t, t] with this probability.

    >>> [round(t_quantile(dof), 3) for dof in (1, 2, 4, 9, 30)]
    [12.706, 4.303, 2.776, 2.262, 2.042]
    """
    low, high = 0.0, 1.0
    while t_within(high, dof) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, dof) < confidence else (low, middle)
    return (low + high) / 2


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """Return mean, half and seeds over seeds of every held-out metric: rows variants, columns (metric, statistic).

    The row `base` is the policy before training: what variants share of it counts once a seed. `train_entropy` is the
    mean token entropy (nats) of the last rollout batch; for the base of the first.
    """
    metrics = held_out_metrics(runs)
    before = runs.groupby("seed").mean(numeric_only=True)
    rows = {"base": _row(before, {m: f"before/{m}" for m in metrics} | {"train_entropy": "train_entropy/first"})}
    columns = {m: f"after/{m}" for m in metrics} | {"train_entropy": "train_entropy/last"}
    for variant in variants_of(runs):
        rows[variant] = _row(_of(runs, variant), columns)
    names = pd.MultiIndex.from_tuples(list(rows["base"]), names=["metric", "statistic"])
    table = pd.DataFrame([[row[name] for name in names] for row in rows.values()], columns=names)
    return table.set_index(pd.Index(rows, name="variant"))


def paired(runs: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Return how each variant differs from the baseline, seed by seed: rows (variant, metric).

    Columns: difference (mean over the seeds that both have), low and high of its 95 % t-interval, p (two-sided paired
    t-test, not corrected for the number of comparisons), seeds.

    Raises: UserError if there is no such variant.
    """
    variants = variants_of(runs)
    if baseline not in variants:
        raise UserError(f"baseline must be a variant with finished runs ({', '.join(variants)}), got {baseline!r}. "
                        "Set --baseline.")  # fmt: skip
    columns = {m: f"after/{m}" for m in held_out_metrics(runs)} | {"train_entropy": "train_entropy/last"}
    rows = []
    for variant in variants:
        for metric, column in columns.items():
            if variant == baseline or column not in runs:
                continue
            both = pd.concat([_of(runs, variant)[column], _of(runs, baseline)[column]], axis=1, join="inner")
            found = interval(both.iloc[:, 0] - both.iloc[:, 1])
            low, high = found.mean - found.half, found.mean + found.half
            rows.append([variant, metric, found.mean, low, high, _p_value(found), found.seeds])
    names = ["variant", "metric", "difference", "low", "high", "p", "seeds"]
    return pd.DataFrame(rows, columns=names).set_index(["variant", "metric"])


def bands(curves: pd.DataFrame, column: str, smooth: int = 1) -> pd.DataFrame:
    """Return the mean over seeds and its 95 % t-interval of a column at each batch: variant, batch, mean, low, high.

    Each run's curve is smoothed first, by the centred mean of `smooth` batches. With one seed, low and high are nan.
    """
    rows = []
    for variant, of_variant in curves.groupby("variant", sort=False):
        wide = of_variant.pivot_table(index="batch", columns="seed", values=column)
        wide = wide.rolling(smooth, center=True, min_periods=1).mean()
        for batch, values in wide.iterrows():
            found = interval(values)
            rows.append([variant, batch, found.mean, found.mean - found.half, found.mean + found.half])
    return pd.DataFrame(rows, columns=["variant", "batch", "mean", "low", "high"])


def entropy_law(entropy: Sequence[float] | pd.Series, accuracy: Sequence[float] | pd.Series) -> Law:
    """Fit R = -a exp(H) + b by least squares: it is linear in exp(H).

    >>> law = entropy_law([0.0, 1.0, 2.0], [3.0, 3.0 - math.e + 1.0, 3.0 - math.e**2 + 1.0])
    >>> [round(value, 9) for value in law]
    [1.0, 4.0, 1.0]

    Source: arXiv 2505.22617.
    """
    x, y = np.exp(np.asarray(entropy, dtype=np.float64)), np.asarray(accuracy, dtype=np.float64)
    x, y = x[~np.isnan(x + y)], y[~np.isnan(x + y)]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Law(math.nan, math.nan, math.nan)
    slope, b = np.polyfit(x, y, 1)
    rest = ((y - slope * x - b) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    return Law(float(-slope), float(b), round(float(1 - rest), 6))


def held_out_metrics(runs: pd.DataFrame) -> list[str]:
    """Return the names of the held-out metrics: avg@k, then each pass@k, then the others."""
    names = [name.removeprefix("after/") for name in map(str, runs) if name.startswith("after/")]
    passes = sorted((n for n in names if n.startswith("pass@")), key=lambda n: int(n.removeprefix("pass@")))
    average = [name for name in names if name.startswith("avg@")]
    return [*average, *passes, *(name for name in names if name not in (*average, *passes))]


def variants_of(runs: pd.DataFrame) -> list[str]:
    """Return the variants in order."""
    return list(dict.fromkeys(map(str, runs.index.get_level_values("variant"))))


def _of(runs: pd.DataFrame, variant: str) -> pd.DataFrame:
    """Return a variant's runs by seed."""
    return cast("pd.DataFrame", runs.xs(variant, level="variant"))


def _row(runs: pd.DataFrame, columns: dict[str, str]) -> dict[tuple[str, str], float]:
    found = {metric: interval(runs[column]) for metric, column in columns.items() if column in runs}
    return {(metric, name): value for metric, values in found.items() for name, value in values._asdict().items()}


def _p_value(found: Interval) -> float:
    if math.isnan(found.half):
        return math.nan
    if found.half == 0:
        return float(found.mean == 0)
    return 1 - t_within(abs(found.mean) * t_quantile(found.seeds - 1) / found.half, found.seeds - 1)
