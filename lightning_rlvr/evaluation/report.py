"""An evaluation as results.json, table.md, table.csv and table.png."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import pandas as pd

from lightning_rlvr.evaluation.measure import (
    AVERAGE,
    Bootstrap,
    Estimate,
    Results,
    differences,
    estimates,
)
from lightning_rlvr.ops.bootstrap import Difference
from lightning_rlvr.types import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = "results.json"
TITLE = 26  # letters of a benchmark's name on one line of the picture
RESPONSES = {  # column, how its numbers are written
    "length": "{:.0f}",
    "entropy": "{:.3f}",
    "truncated": "{:.1%}",
    "unparsable": "{:.1%}",
    "timeout": "{:.1%}",
    "error": "{:.1%}",
}


@dataclass(frozen=True)
class Report:
    """All numbers of an evaluation. `estimates` and `differences` are by model, benchmark or `average`, and measure."""

    estimates: Mapping[str, Mapping[str, Mapping[str, Estimate]]]
    differences: Mapping[str, Mapping[str, Mapping[str, Difference]]]
    responses: Mapping[str, Mapping[str, Mapping[str, float]]]  # by model and benchmark
    problems: Mapping[str, int]  # by benchmark
    bootstrap: Bootstrap
    manifests: Mapping[str, Any]  # of the files measured, by model and benchmark

    @classmethod
    def make(cls, results: Results, bootstrap: Bootstrap, manifests: Mapping[str, Any]) -> Report:
        """Compute means, intervals and differences."""
        first = next(iter(results.values()))
        return cls(
            estimates(results, bootstrap),
            differences(results, bootstrap),
            {model: {b: r.responses for b, r in own.items()} for model, own in results.items()},
            {name: len(result.uids) for name, result in first.items()},
            bootstrap,
            manifests,
        )

    @property
    def models(self) -> list[str]:
        """Names of the models; the first is the one that others are compared with."""
        return list(self.estimates)

    @property
    def columns(self) -> list[str]:
        """Names of the benchmarks, and `average`."""
        return [*self.problems, AVERAGE]

    @property
    def measures(self) -> list[str]:
        """Names of the measures: pass@k, avg@n, maj@k."""
        return list(self.estimates[self.models[0]][AVERAGE])

    def plain(self) -> dict[str, Any]:
        """Return everything as json has it."""
        return {
            "models": self.models,
            "benchmarks": list(self.problems),
            "problems": dict(self.problems),
            "bootstrap": asdict(self.bootstrap),
            "results": _plain(self.estimates),
            "responses": _plain(self.responses),
            "differences_to_first": _plain(self.differences),
            "manifests": _plain(self.manifests),
        }

    def table(self) -> pd.DataFrame:
        """Return one row a measure and model: for each column the mean, and its interval's ends as low and high."""
        rows = []
        for measure in self.measures:
            for model in self.models:
                row: dict[str, Any] = {"measure": measure, "model": model}
                for name in self.columns:
                    found = self.estimates[model][name][measure]
                    row |= {name: found.value, f"{name} low": found.low, f"{name} high": found.high}
                rows.append(row)
        return pd.DataFrame(rows)

    def markdown(self) -> str:
        """Return the tables of the measures in percent, of the responses, and of the differences to the first model."""
        parts = [
            f"Percent; in brackets {self.bootstrap.level:.0%} bootstrap intervals over problems "
            f"({self.bootstrap.resamples} resamples). The best is **bold**, the second <u>underlined</u>.",
            *(self._measure_table(measure) for measure in self.measures),
            self._response_table(),
            *(self._difference_table(model) for model in self.differences),
        ]
        return "\n\n".join(parts) + "\n"

    def _measure_table(self, measure: str) -> str:
        marks = {name: _marks([self.estimates[m][name][measure].value for m in self.models]) for name in self.columns}
        heads = [*(f"{name} ({count})" for name, count in self.problems.items()), AVERAGE]
        rows = []
        for i, model in enumerate(self.models):
            cells = []
            for name in self.columns:
                found = self.estimates[model][name][measure]
                value = marks[name][i].format(_percent(found.value))
                cells.append(f"{value} [{_percent(found.low)}, {_percent(found.high)}]")
            rows.append([model, *cells])
        return f"## {measure}\n" + _markdown(["model", *heads], rows)

    def _response_table(self) -> str:
        rows = [
            [
                model,
                name,
                *(form.format(values[key]) if isfinite(values[key]) else "-" for key, form in RESPONSES.items()),
            ]
            for model, own in self.responses.items()
            for name, values in own.items()
        ]
        heads = ["tokens", "entropy (nats a token)", *list(RESPONSES)[2:]]
        return "## Responses\n" + _markdown(["model", "benchmark", *heads], rows)

    def _difference_table(self, model: str) -> str:
        found = self.differences[model]
        rows = []
        for measure in self.measures:
            cells = [found[name][measure] for name in self.columns]
            rows.append(
                [
                    measure,
                    *(
                        f"{_percent(d.value, '+')} [{_percent(d.low, '+')}, {_percent(d.high, '+')}] {d.not_better:.3f}"
                        for d in cells
                    ),
                ]
            )
        title = f"## {model} - {self.models[0]}\nPaired by problem; last, the share of resamples without a gain.\n\n"
        return title + _markdown(["measure", *self.columns], rows)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return value._asdict()
    if isinstance(value, float) and not isfinite(value):  # what a server does not tell
        return None
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _percent(share: float, sign: str = "") -> str:
    return f"{round(100 * share, 1) + 0.0:{sign}.1f}"  # + 0.0: never -0.0


def _marks(values: Sequence[float]) -> list[str]:
    """Return how each value of a column is written: the best bold, the second underlined, none if all are equal.

    They are ranked by what is shown of them.
    """
    shown = [float(_percent(value)) for value in values]
    ranked = sorted(set(shown), reverse=True)
    styles = dict(zip(ranked, ("**{}**", "<u>{}</u>"), strict=False)) if len(ranked) > 1 else {}
    return [styles.get(value, "{}") for value in shown]


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def write_report(report: Report, folder: Path) -> None:
    """Write the report; results.json last and whole, since it marks an evaluation as finished.

    Raises: UserError if the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(report.markdown(), encoding="utf-8")
        report.table().to_csv(folder / "table.csv", index=False)
        _picture(report, folder / "table.png")
        partial = folder / f".{RESULTS}.partial"
        partial.write_text(json.dumps(report.plain(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(folder / RESULTS)
    except OSError as error:
        raise UserError(f"output must be a folder that can be written, got {folder}: {error}. Set output.") from error


def _picture(report: Report, path: Path) -> None:
    """Draw models as rows and benchmarks as columns: points with their intervals, one colour a measure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = 1.0 + 0.09 * max(map(len, report.models)) + 2.2 * len(report.columns)  # inches
    in_a_row = max(1, int(width / 1.3))  # entries of the legend
    rows = -(-len(report.measures) // in_a_row)
    figure = Figure(figsize=(width, 1.2 + 0.2 * rows + 0.5 * len(report.models)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(report.columns), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, report.columns, strict=True):
        _panel(axes, report, name)
    panels[0].set_yticks(range(len(report.models)), [_literal(name) for name in report.models])
    panels[0].set_ylim(len(report.models) - 0.5, -0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(in_a_row, len(labels)), fontsize=8)
    figure.savefig(path, dpi=110)


def _literal(name: str) -> str:
    """Return the name as matplotlib writes it as it stands: two dollar signs would make it a formula."""
    return name.replace("$", r"\$")


def _panel(axes: Axes, report: Report, name: str) -> None:
    step = 0.6 / len(report.measures)
    for j, measure in enumerate(report.measures):
        found = [report.estimates[model][name][measure] for model in report.models]
        values = [100 * f.value for f in found]
        below = [max(0.0, 100 * (f.value - f.low)) for f in found]
        above = [max(0.0, 100 * (f.high - f.value)) for f in found]
        rows = [i - 0.3 + (j + 0.5) * step for i in range(len(found))]
        axes.errorbar(values, rows, xerr=[below, above], fmt="o", markersize=4, capsize=2, linewidth=1, label=measure)
    axes.set_title(_literal(fill(name, TITLE)), fontsize=10)
    axes.set_xlabel("%", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
