"""The figures of a sweep: one colour a variant throughout, bands over seeds, one legend beside the panels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_rlvr.analysis import (
    bands,
    entropy_changes,
    entropy_law,
    fit_changes,
    held_out_metrics,
    interval,
    variants_of,
)
from lightning_rlvr.analysis.drawing import STYLE, colours, figure_of, limits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAND = 0.4
SPIKES = 0.98  # a k3 estimate has single values far above all others, beyond this quantile
FOLLOWS = 0.3  # the least correlation at which measured changes are said to follow predicted ones
BATCHES = "rollout batches"
TRAINING = {
    "train/entropy": ("token entropy in training", "nats a token"),
    "train/reward": ("reward in training", "mean reward of a response"),
    "train/response_length": ("response length in training", "tokens"),
}
CLASSES = {
    "share": ("share of tokens in class {}", "share of tokens"),
    "kl": ("KL of class {}", "nats a token"),
}
TARGETS = {"old": "KL to the policy that sampled", "all": "KL of all tokens"}


def figures(
    runs: pd.DataFrame, training: pd.DataFrame, held_out: pd.DataFrame, baseline: str | None
) -> dict[str, Figure]:
    """Return the figures by name: training, law, ends; classes and change where the runs have what they show."""
    from matplotlib import rc_context

    colour = colours(variants_of(runs), baseline)
    accuracy = next(name for name in held_out_metrics(runs) if name.startswith("avg@"))
    with rc_context(STYLE):  # type: ignore[arg-type]
        out = {
            "training": _training(training, held_out, accuracy, colour),
            "law": _law(training, colour),
            "ends": _ends(runs, accuracy, colour),
        }
        more = {"classes": _classes(training, colour), "change": _change(training, colour)}
        return out | {name: figure for name, figure in more.items() if figure is not None}


def _training(training: pd.DataFrame, held_out: pd.DataFrame, accuracy: str, colour: Mapping[str, str]) -> Figure:
    smooth = smoothing(training)
    panels = [
        partial(_curves, curves=training, column=column, smooth=smooth, colour=colour, title=title, unit=unit)
        for column, (title, unit) in TRAINING.items()
    ]
    column, title = f"val/{accuracy}", f"held-out {accuracy}"
    drawn = partial(_curves, curves=held_out, column=column, smooth=1, colour=colour, title=title, marker="o")
    return figure_of([*panels, partial(drawn, unit="share correct")], 2, colour)


def _classes(training: pd.DataFrame, colour: Mapping[str, str]) -> Figure | None:
    """Draw share and KL of each class of tokens; what never leaves 0, or nobody has, is not drawn."""
    panels, drawn, smooth = [], set[str](), smoothing(training)
    for kind, (title, unit) in CLASSES.items():
        for column in sorted(name for name in map(str, training) if name.startswith(f"train/{kind}/")):
            top = training.groupby("variant")[column].max()
            mine = training[training["variant"].isin(top[top > 0].index)]
            if mine.empty:
                continue
            drawn |= set(mine["variant"])
            name = column.rsplit("/", 1)[1]
            text = TARGETS.get(name, title.format(name))
            curves = partial(_curves, curves=mine, column=column, smooth=smooth, colour=colour, title=text)
            panels.append(partial(curves, unit=unit, bottom=0.0, most=SPIKES if kind == "kl" else 1.0))
    shown = {variant: shade for variant, shade in colour.items() if variant in drawn}
    return figure_of(panels, 3, shown) if panels else None


def _law(training: pd.DataFrame, colour: Mapping[str, str]) -> Figure:
    """Draw accuracy against entropy at every rollout batch, a panel for each variant, with the fit of the law."""
    ends = [limits(training[name]) for name in ("train/entropy", "train/accuracy")]

    def panel(axes: Axes, variant: str) -> None:
        mine = training[training["variant"] == variant]
        entropy, correct = mine["train/entropy"], mine["train/accuracy"]
        axes.scatter(entropy, correct, s=7, alpha=0.35, color=colour[variant], linewidths=0)
        law = entropy_law(entropy, correct)
        axes.set_title(variant, pad=17)
        if not math.isnan(law.a):
            x = np.linspace(entropy.min(), entropy.max(), 100)
            axes.plot(x, -law.a * np.exp(x) + law.b, color=colour[variant], linewidth=2)
            fit = f"a = {law.a:.2f}, b = {law.b:.2f}, R² = {law.r2:.2f}"
            axes.text(0, 1.02, fit, transform=axes.transAxes, va="bottom", fontsize=8, color="#555555")
        axes.set_xlim(*ends[0])
        axes.set_ylim(*ends[1])
        axes.set_xlabel("token entropy H (nats a token)")
        axes.set_ylabel("accuracy R in training")

    panels = [partial(panel, variant=variant) for variant in colour]
    return figure_of(panels, min(4, math.ceil(math.sqrt(len(panels)))), None)


def _change(training: pd.DataFrame, colour: Mapping[str, str]) -> Figure | None:
    """Draw measured against predicted change of entropy, a panel for each variant.

    Predictions of different objectives have no scale in common: a mask divides the pull by the tokens that it keeps.
    """
    if not {"train/covariance", "train/lr"} <= set(training):
        return None
    changes = entropy_changes(training, smoothing(training))
    if math.isnan(fit_changes(changes).slope):
        return None
    ends = limits(changes["measured"])

    def panel(axes: Axes, variant: str) -> None:
        mine = changes[changes["variant"] == variant]
        fit = fit_changes(mine)
        axes.scatter(mine["predicted"], mine["measured"], s=9, alpha=0.5, color=colour[variant], linewidths=0)
        axes.set_title(variant, pad=17)
        across = limits(pd.concat([mine["predicted"], pd.Series([0.0])]))
        note = "" if math.isnan(fit.r) else f"r = {fit.r:.2f}"
        if fit.r >= FOLLOWS:
            axes.plot(across, [fit.slope * end for end in across], color=colour[variant], linewidth=2)
            note = f"factor {fit.slope:.3g}, {note}"
        axes.text(0, 1.02, note, transform=axes.transAxes, va="bottom", fontsize=8, color="#555555")
        axes.set_xlim(*across)
        axes.set_ylim(*ends)
        axes.ticklabel_format(axis="x", scilimits=(0, 0))
        axes.set_xlabel("predicted change (nats)")
        axes.set_ylabel("measured change (nats)")

    panels = [partial(panel, variant=variant) for variant in colour]
    return figure_of(panels, min(4, math.ceil(math.sqrt(len(panels)))), None)


def _ends(runs: pd.DataFrame, accuracy: str, colour: Mapping[str, str]) -> Figure:
    """Draw final accuracy and entropy of each variant: the mean, its intervals, and each seed."""

    def panel(axes: Axes) -> None:
        for variant, shade in colour.items():
            x, y = (runs.loc[variant][f"after/{name}"] for name in ("entropy", accuracy))
            axes.scatter(x, y, s=12, color=shade, alpha=0.45, linewidths=0)
            across, up = interval(x), interval(y)
            axes.errorbar(
                across.mean, up.mean, xerr=_bar(across.half), yerr=_bar(up.half), fmt="o", color=shade,
                markersize=7, elinewidth=1.2, markeredgecolor="white",
            )  # fmt: skip
        axes.set_title("after training, held-out")
        axes.set_xlabel("token entropy (nats a token)")
        axes.set_ylabel(f"{accuracy} (share correct)")
        axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))  # an interval may reach below 0, entropy does not

    return figure_of([panel], 1, colour, scale=1.5)


def _curves(
    axes: Axes,
    curves: pd.DataFrame,
    column: str,
    smooth: int,
    colour: Mapping[str, str],
    title: str,
    unit: str,
    marker: str = "",
    bottom: float | None = None,
    most: float = 1.0,
) -> None:
    """Draw a column over batches, a line for each variant; the axis ends at `bottom` and the quantile `most`."""
    alpha = BAND / max(3, curves["variant"].nunique())  # where many overlap each is fainter
    for variant, band in bands(curves[curves[column].notna()], column, smooth).groupby("variant", sort=False):
        shade = colour[str(variant)]
        axes.plot(band["batch"], band["mean"], color=shade, marker=marker, markersize=4)
        axes.fill_between(band["batch"], band["low"], band["high"], color=shade, alpha=alpha, linewidth=0)
    axes.set_title(title)
    axes.set_xlabel(BATCHES)
    axes.set_ylabel(unit)
    axes.margins(x=0.02)
    # An interval may reach where no run has been, or can be.
    low = float(curves[column].min()) if bottom is None else bottom
    high = float(curves[column].quantile(most))
    room = 0.05 * (high - low) or 0.05
    axes.set_ylim(low - room if bottom is None else bottom, high + room)


def smoothing(training: pd.DataFrame) -> int:
    """Return over how many batches curves are averaged: a twentieth of the run, and an odd number.

    >>> smoothing(pd.DataFrame({"batch": range(1, 65)}))
    3
    """
    return max(1, int(training["batch"].max()) // 20) // 2 * 2 + 1


def _bar(half: float) -> float | None:
    return None if math.isnan(half) else half
