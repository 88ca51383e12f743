"""Means over seeds with their intervals, and paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import pandas as pd

from lightning_rlvr.analysis.runs import held_out_metrics, variants_of
from lightning_rlvr.types import UserError

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean over seeds and its 95 % t-interval, mean - half to mean + half; half is nan for less than two values."""

    mean: float
    half: float
    seeds: int


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
