"""What the theory says of entropy, against what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd


class Law(NamedTuple):
    """The fit R = -a exp(H) + b of accuracy against entropy (nats), and the share of variance that it explains."""

    a: float
    b: float
    r2: float


class Fit(NamedTuple):
    """How measured changes follow predicted ones: the slope of measured = slope * predicted, and the correlation."""

    slope: float
    r: float


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


def entropy_changes(training: pd.DataFrame, window: int) -> pd.DataFrame:
    """Return how entropy changed from one window of rollout batches to the next, and how it should have.

    A rollout batch is predicted to change the mean token entropy by -train/lr * train/covariance, as one plain gradient
    step of that size would. Both the measured entropy and the sum of the predictions so far are averaged over the
    batches of a window, so that questions that differ from batch to batch matter less. Columns: variant, seed, batch
    (the last of the earlier window), measured and predicted (nats).

    Args:
        training: as `read_training` returns it.
        window: batches in a window; what is left at the end of a run is not used.

    Source: covariance theory of entropy, arXiv 2505.22617 and 2512.04359.
    """
    frames = []
    for _, run in training.sort_values("batch").groupby(["variant", "seed"], sort=False):
        step = -run["train/lr"] * run["train/covariance"]
        levels = pd.DataFrame({"measured": run["train/entropy"], "predicted": step.cumsum() - step})
        number = np.arange(len(run)) // window
        means = levels.groupby(number).mean()[: len(run) // window]
        changes = means.diff().iloc[1:]
        last = run["batch"].to_numpy()[np.asarray(changes.index, dtype=int) * window - 1]
        variant, seed = run["variant"].iloc[0], run["seed"].iloc[0]
        frames.append(changes.assign(variant=variant, seed=seed, batch=last))
    columns = ["variant", "seed", "batch", "measured", "predicted"]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def fit_changes(changes: pd.DataFrame) -> Fit:
    """Fit measured = slope * predicted by least squares through 0: no pull, no change.

    >>> fit_changes(pd.DataFrame({"predicted": [-1.0, -2.0, 0.0], "measured": [-3.0, -6.0, 0.0]}))
    Fit(slope=3.0, r=1.0)
    """
    x, y = (changes[name].to_numpy(dtype=np.float64) for name in ("predicted", "measured"))
    if len(x) < 3 or not x.any():
        return Fit(math.nan, math.nan)
    r = np.corrcoef(x, y)[0, 1] if np.ptp(x) and np.ptp(y) else math.nan
    return Fit(float(x @ y / (x @ x)), round(float(r), 6))
