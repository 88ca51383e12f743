"""The tables of a report, as Markdown; best in bold, second underlined."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd

UNITS = {
    "entropy": "entropy (nats)",
    "response_length": "length (tokens)",
    "train_entropy": "last in training (nats)",
}


def shown(metrics: Iterable[str]) -> list[str]:
    """Return the metrics that tables show, once each: not pass@1, which is avg@k, nor what only the csv has."""
    chosen = [m for m in metrics if m in UNITS or (m.startswith(("avg@", "pass@")) and m != "pass@1")]
    return list(dict.fromkeys(chosen))


def held_out_table(summary: pd.DataFrame) -> list[list[str]]:
    """Return the rows of the main table, header first: each variant's mean ± half of its 95 % interval.

    The best and the second of avg@k and pass@k are marked by their rounded means, so that what reads the same ranks the
    same; the policy before training does not compete.
    """
    metrics = shown(summary.columns.get_level_values("metric"))
    rows = [["variant", *(UNITS.get(metric, metric) for metric in metrics)]]
    cells = {metric: _column(summary, metric) for metric in metrics}
    for variant in summary.index:
        rows.append([str(variant), *(cells[metric][variant] for metric in metrics)])
    return rows


def paired_table(paired: pd.DataFrame) -> list[list[str]]:
    """Return the rows of the comparisons, header first: mean difference and its 95 % interval, * where it has no 0."""
    metrics = shown(paired.index.get_level_values("metric"))
    rows = [["variant", *(UNITS.get(metric, metric) for metric in metrics)]]
    cells: dict[tuple[str, str], str] = {}
    for variant, metric, difference, low, high, *_ in paired.reset_index().itertuples(index=False):
        cells[variant, metric] = _difference(difference, low, high, _digits(metric))
    for variant in dict.fromkeys(paired.index.get_level_values("variant")):
        rows.append([variant, *(cells.get((variant, metric), "") for metric in metrics)])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, header first, as a Markdown table, numbers to the right.

    >>> print(markdown([["variant", "avg@8"], ["sent", "**0.9**"]]))
    | variant | avg@8 |
    |---|--:|
    | sent | **0.9** |
    """
    header, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([header, "|---" + "|--:" * (len(rows[0]) - 1) + "|", *body])


def _column(summary: pd.DataFrame, metric: str) -> dict[str, str]:
    digits = _digits(metric)
    means, halves = summary[metric, "mean"], summary[metric, "half"]
    rounded = {str(name): round(mean, digits) for name, mean in means.items() if not math.isnan(mean)}
    ranked = sorted({mean for name, mean in rounded.items() if name != "base"}, reverse=True)
    out = {}
    for name, mean, half in zip(map(str, summary.index), means, halves, strict=True):
        text = _number(mean, digits)
        if metric.startswith(("avg@", "pass@")) and name != "base" and len(ranked) > 1 and name in rounded:
            text = {0: f"**{text}**", 1: f"<u>{text}</u>"}.get(ranked.index(rounded[name]), text)
        out[name] = text if math.isnan(half) else f"{text} ± {_number(half, digits)}"
    return out


def _difference(difference: float, low: float, high: float, digits: int) -> str:
    difference, low, high = (round(value, digits) + 0.0 for value in (difference, low, high))  # no -0.000
    text = f"{difference:+.{digits}f}"
    if math.isnan(low):
        return text
    star = "\\*" if low > 0 or high < 0 else ""
    return f"{text} [{low:+.{digits}f}, {high:+.{digits}f}]{star}"


def _digits(metric: str) -> int:
    return 1 if metric == "response_length" else 3


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"
