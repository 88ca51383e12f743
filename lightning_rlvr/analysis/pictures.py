"""Figures of one run, for notebooks: its tokens, its questions, its objectives on one batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lightning_rlvr.analysis.drawing import COLOURS, STYLE, figure_of
from lightning_rlvr.analysis.tokens import NO_CLASS, position_table
from lightning_rlvr.types import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLASS_COLOURS = {NO_CLASS: "#b0b0b0", "low": "#56b4e9", "high": "#d55e00"}
KIND_COLOURS = {"mixed": "#56b4e9", "all right": "#009e73", "all wrong": "#b0b0b0", "confident and wrong": "#d55e00"}
FLOOR = 1e-4  # nats: entropies below are drawn there


def entropy_and_covariance(ledger: pd.DataFrame) -> Figure:
    """Draw every token by entropy and covariance, coloured by class, and how entropies are spread."""
    shade = _shades(ledger)
    entropy = ledger["entropy"].clip(lower=FLOOR)

    def tokens(axes: Axes) -> None:
        for name, colour in shade.items():
            mine = ledger["class"] == name
            size = 7 if mine.mean() > 0.05 else 22  # few would be overlooked
            axes.scatter(entropy[mine], ledger["covariance"][mine], s=size, alpha=0.6, color=colour, linewidths=0)
        axes.set_xscale("log")
        axes.set_title("every token of the batch")
        axes.set_xlabel("entropy (nats)")
        axes.set_ylabel("covariance of log-probability and advantage")

    def spread(axes: Axes) -> None:
        edges = np.geomspace(FLOOR, max(float(entropy.max()), 2 * FLOOR), 40)
        parts = [entropy[ledger["class"] == name] for name in shade]
        axes.hist(parts, bins=edges.tolist(), stacked=True, color=list(shade.values()))
        axes.set_xscale("log")
        axes.set_title("how entropies are spread")
        axes.set_xlabel("entropy (nats)")
        axes.set_ylabel("tokens")

    return _styled([tokens, spread], 2, shade, 1.2)


def along_the_text(ledger: pd.DataFrame) -> Figure:
    """Draw mean entropy and class shares by position in the response."""
    table, shade = position_table(ledger), _shades(ledger)

    def entropy(axes: Axes) -> None:
        axes.plot(table.index, table["entropy"], color="#222222", marker="o", markersize=3)
        axes.set_title("mean entropy along the response")
        axes.set_ylabel("nats a token")
        axes.set_xlabel("position in the response")

    def shares(axes: Axes) -> None:
        axes.stackplot(table.index, *(table[name] for name in shade), colors=list(shade.values()))
        axes.set_title("classes along the response")
        axes.set_ylabel("share of tokens")
        axes.set_xlabel("position in the response")
        axes.set_ylim(0, 1)

    return _styled([entropy, shares], 2, shade, 1.2)


def token_map(ledger: pd.DataFrame, responses: int = 12, width: int = 40) -> Figure:
    """Draw responses as rows of tokens, darker with entropy; tokens of the narrowest class are framed.

    The responses are those with most framed tokens, then the first ones; `width` positions of each are shown.
    """
    framed = list(_shades(ledger))[-1]
    rows = list(ledger.groupby(["uid", "response"], sort=False))
    if framed != NO_CLASS:
        rows.sort(key=lambda row: -int((row[1]["class"] == framed).sum()))
    rows = rows[:responses]
    columns = min(width, int(max(part["position"].max() for _, part in rows)) + 1)
    grid = np.full((len(rows), columns), np.nan)

    def panel(axes: Axes) -> None:
        for row, (_, part) in enumerate(rows):
            for token in part[part["position"] < columns].to_dict("records"):
                column = token["position"]
                grid[row, column] = token["entropy"]
                text = token["text"].replace("\n", "⏎")[:6]
                size = 8 if len(text) < 3 else 5
                axes.text(column, row, text, ha="center", va="center", fontsize=size, parse_math=False)
                if token["class"] == framed != NO_CLASS:
                    axes.add_patch(_frame(column, row))
        image = axes.imshow(grid, cmap="YlOrBr", vmin=0, vmax=float(np.nanmax(grid)) * 1.5 or 1.0, aspect="auto")
        axes.figure.colorbar(image, ax=axes, label="entropy (nats)", shrink=0.8)
        axes.set_yticks(range(len(rows)), [f"…{str(uid)[-12:]} #{number}" for (uid, number), _ in rows], fontsize=7)
        axes.set_xlabel("position in the response")
        axes.grid(visible=False)
        named = "" if framed == NO_CLASS else f"; framed: class {framed}"
        axes.set_title(f"tokens by entropy{named}")

    figure = _styled([panel], 1, None)
    figure.set_size_inches(2.5 + 0.22 * columns, 0.9 + 0.24 * len(rows))
    return figure


def scores_by_stage(scores: pd.DataFrame) -> Figure:
    """Draw how semantic entropies are spread over the stages of the curriculum, if known, and against pass rates."""
    column = "semantic_entropy_discrete"
    stage = scores["stage"] if "stage" in scores else pd.Series(0, index=scores.index)
    stages = sorted(stage.unique())
    shade = {("all" if stages == [0] else f"stage {n}" if n else "left out"): COLOURS[i] for i, n in enumerate(stages)}
    known = {kind: colour for kind, colour in KIND_COLOURS.items() if kind in set(scores["kind"])}

    def spread(axes: Axes) -> None:
        top = float(scores[column].max())
        parts = [scores[column][stage == number] for number in stages]
        bins = np.linspace(-0.02, top + 0.02, 31).tolist()
        axes.hist(parts, bins=bins, stacked=True, color=list(shade.values()), label=list(shade))
        axes.legend()
        axes.set_title("questions by semantic entropy")
        axes.set_xlabel("semantic entropy (nats)")
        axes.set_ylabel("questions")

    def rates(axes: Axes) -> None:
        counts = scores.groupby(["kind", scores[column].round(6), "pass_rate"]).size().reset_index(name="questions")
        for kind, colour in known.items():
            mine = counts[counts["kind"] == kind]
            size = 12 + 300 * mine["questions"].to_numpy(dtype=float) / counts["questions"].to_numpy(dtype=float).max()
            axes.scatter(mine[column], mine["pass_rate"], s=size, color=colour, alpha=0.7, linewidths=0)
        axes.set_title("against the share of right answers")
        axes.set_xlabel("semantic entropy (nats)")
        axes.set_ylabel("pass rate")

    return _styled([spread, rates], 2, known, 1.2)


def step_sizes(tables: Mapping[float, pd.DataFrame]) -> Figure:
    """Draw measured change of entropy over its first-order prediction, by the size of the step.

    `tables` are those of `lightning_rlvr.compare.compare`, by eta. Those without gradient are left out.

    Raises: UserError if none has any.
    """
    changes = [table.filter(like="entropy_change/").astype(float) for table in tables.values()]
    ratios = pd.DataFrame([t["entropy_change/measured"] / t["entropy_change/first_order"] for t in changes])
    ratios = ratios.dropna(axis="columns", how="all")  # 0 / 0
    if ratios.empty:
        raise UserError(
            "a rollout batch must have groups whose rewards differ for its objectives to be compared, and has none: no "
            "step changes the policy. Take another of RUN/rollouts."
        )
    shade = {str(name): COLOURS[i % len(COLOURS)] for i, name in enumerate(ratios)}

    def panel(axes: Axes) -> None:
        for name, colour in shade.items():
            axes.plot(list(tables), ratios[name].tolist(), color=colour, marker="o", markersize=4)
        axes.axhline(1, color="#aaaaaa", linewidth=1, linestyle="--")
        axes.set_xscale("log")
        axes.set_title("how far a first-order prediction carries")
        axes.set_xlabel("size of the gradient step")
        axes.set_ylabel("measured / predicted change of entropy")

    return _styled([panel], 1, shade, 1.5)


def _styled(panels: list[Any], columns: int, colour: Mapping[str, str] | None, scale: float = 1.0) -> Figure:
    from matplotlib import rc_context

    with rc_context(STYLE):  # type: ignore[arg-type]
        return figure_of(panels, columns, colour, scale)


def _shades(ledger: pd.DataFrame) -> dict[str, str]:
    """Return a colour for each class, in the order in which the one narrows the other."""
    names = ledger["class"].value_counts().index.tolist()
    ordered = [name for name in CLASS_COLOURS if name in names] + sorted(set(names) - set(CLASS_COLOURS))
    return {name: CLASS_COLOURS.get(name, COLOURS[i]) for i, name in enumerate(ordered)}


def _frame(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, edgecolor="#0072b2", linewidth=1.4)
