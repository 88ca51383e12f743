"""How figures look: one style, one colour a variant throughout, panels in a grid with one legend beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d"),
    *("#8c564b", "#11a579", "#e73f74", "#80ba5a", "#f2b701", "#3969ac", "#a5aa99"),
)
BASELINE, GRID = "#222222", "#e4e4e4"
PANEL = (3.6, 2.7)  # inches
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "lightning_rlvr",  # the same figure is the same file
}


def colours(variants: Sequence[str], baseline: str | None) -> dict[str, str]:
    """Return a colour for each variant, near black for the baseline."""
    others = [variant for variant in variants if variant != baseline]
    chosen = {variant: COLOURS[i % len(COLOURS)] for i, variant in enumerate(others)}
    return {variant: chosen.get(variant, BASELINE) for variant in variants}


def figure_of(
    panels: Sequence[Callable[[Axes], None]], columns: int, colour: Mapping[str, str] | None, scale: float = 1.0
) -> Figure:
    """Lay panels out in a grid, with the legend of the variants, if any, to their right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (scale * PANEL[0] * columns + (1.6 if colour else 0.0), scale * PANEL[1] * rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        panel(axes)
    for axes in grid[len(panels) :]:
        axes.remove()
    if colour:
        handles = [Line2D([], [], color=shade, linewidth=2.5, label=variant) for variant, shade in colour.items()]
        figure.legend(handles=handles, loc="outside right upper")
    return figure


def limits(values: pd.Series) -> tuple[float, float]:
    """Return the limits of an axis that panels share: all dots are within."""
    low, high = values.min(), values.max()
    room = 0.05 * (high - low) or 0.05
    return low - room, high + room
