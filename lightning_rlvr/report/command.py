"""The report itself: report.md, report.html, the tables as csv and the figures as png and svg."""

from __future__ import annotations

import argparse
import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.table import Table

from lightning_rlvr import analysis
from lightning_rlvr.analysis.drawing import STYLE
from lightning_rlvr.analysis.screen import show
from lightning_rlvr.report.figures import FOLLOWS, figures, smoothing
from lightning_rlvr.report.tables import held_out_table, markdown, paired_table
from lightning_rlvr.store import make_folder
from lightning_rlvr.types import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = Path(__file__).with_name("page.html")
BASELINE = "grpo"  # if there is one and none is named
DPI = 150
NOTES = "notes.md"
CAPTIONS = {
    "training": "Means over seeds; the band is the 95 % t-interval of the mean, as far as runs have reached. Held-out "
    "values are those of each validation, the first before any update.{smooth}",
    "classes": "Shares of the classes of tokens that an objective singles out, and k3 estimates of their KL, drawn as "
    "above; the axis of a KL leaves out its highest 2 %, which are single spikes.",
    "law": "Each dot is a rollout batch of a seed: its accuracy against its mean token entropy. The line is the least-"
    "squares fit R = -a exp(H) + b (arXiv 2505.22617).",
    "change": "How the mean token entropy changed from each {window}, against what the covariance theory predicts: "
    "-eta Cov(log pi, a) a rollout batch, with a the pull of the loss on a token and eta the learning rate "
    "(arXiv 2505.22617). Adam's step is not the gradient's, so each variant has a scale of its own across and a factor "
    "of its own: measured = factor x predicted, the line, fitted through 0 by least squares and drawn where the "
    "correlation r is at least {follows}. The prediction leaves out that Adam's factor drifts while it trains, that a "
    "covariance over the batch takes all contexts for one, what one update on a batch changes for the next, entropy "
    "bonus and exact KL; the measured change also has what the next questions bring.",
    "ends": "Each small dot is a seed, the large one their mean, the bars its 95 % t-intervals.",
}


def report(folder: Path, baseline: str | None = None, output: Path | None = None) -> Path:
    """Write the report of a sweep; return the folder that it is in.

    The report's folder holds the curves too, at a small size: it can be kept in the place of the runs, and given here
    as `folder`, its tables and figures are made anew. Text of one's own stands in its notes.md, which heads the report.

    Args:
        folder: of the sweep (finished runs VARIANT/seed-N), of one run, or of an earlier report.
        baseline: the variant that the others are compared with, seed by seed; that of the earlier report, or grpo if
            there is one.
        output: where to; FOLDER/report if not given, or FOLDER if that is a report. What stands there of an older
            report is written over.

    Raises: UserError if there are no finished runs, or no such variant.
    """
    runs, manifest = analysis.read_runs(folder), analysis.read_manifest(folder)
    baseline = baseline or manifest.get("baseline") or (BASELINE if BASELINE in analysis.variants_of(runs) else None)
    compared = None if baseline is None else analysis.paired(runs, baseline)
    if not any(name.startswith("avg@") for name in analysis.held_out_metrics(runs)):
        raise UserError(f"the runs of {folder} must have held-out metrics to report, and have none. Set data.val.")
    training, held_out = analysis.read_training(folder), analysis.read_held_out(folder)
    output = output or (folder if analysis.is_kept(folder) else folder / "report")
    make_folder(output, "output")
    summary = analysis.summarise(runs)
    pictures = figures(runs, training, held_out, baseline)
    summary.to_csv(output / "held_out.csv")
    if compared is not None:
        compared.to_csv(output / "paired.csv")
    drawings = {name: _save(figure, output / name) for name, figure in pictures.items()}
    head = [_provenance(runs, manifest), *_notes(output)]
    text = _text(folder, head, summary, compared, baseline, smoothing(training), list(pictures))
    (output / "report.md").write_text(text, encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8").replace("/*TITLE*/", html.escape(folder.resolve().name))
    (output / "report.html").write_text(page.replace("<!--BODY-->", _html(text, drawings)), encoding="utf-8")
    analysis.keep(output, runs, training, held_out, {**manifest, **({"baseline": baseline} if baseline else {})})
    return output


def _text(
    folder: Path,
    head: Sequence[str],
    summary: pd.DataFrame,
    compared: pd.DataFrame | None,
    baseline: str | None,
    smooth: int,
    pictures: Sequence[str],
) -> str:
    """Return the report in Markdown."""
    parts = [
        f"# {folder.resolve().name}",
        *head,
        "## Held-out, after training",
        "Mean over seeds ± half of its 95 % t-interval; best in **bold**, second <u>underlined</u>. `base` is the "
        "policy before training.",
        markdown(held_out_table(summary)),
    ]
    if compared is not None and len(compared):
        parts += [
            f"## Against {baseline}, seed by seed",
            f"Mean over seeds of the difference to {baseline} with the same seed, and its 95 % t-interval; \\* where "
            "that, as printed, leaves out 0; not corrected for the number of comparisons. paired.csv has the p-values.",
            markdown(paired_table(compared)),
        ]
    parts.append("## Figures")
    averaged = f" Training curves are centred means of {smooth} rollout batches." if smooth > 1 else ""
    window = f"{smooth} rollout batches to the next" if smooth > 1 else "rollout batch to the next"
    for name in pictures:
        parts += [f"![{name}]({name}.png)", CAPTIONS[name].format(smooth=averaged, window=window, follows=FOLLOWS)]
    return "\n\n".join(parts) + "\n"


def _provenance(runs: pd.DataFrame, manifest: Mapping[str, Any]) -> str:
    """Return how many runs there are, and what the manifest says of their making, in a sentence or two."""
    counts = runs.groupby("variant", sort=False).size()
    seeds = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    text = f"{len(runs)} finished runs of {len(counts)} variants, {seeds} seeds each."
    if "versions" not in manifest:
        return text
    versions, commit = manifest["versions"], manifest["commit"]
    named = [f"{name} {versions[name]}" for name in ("lightning_rlvr", "torch", "transformers")]
    made_with = ", ".join([*named, *([f"commit {commit}"] if commit else [])])
    return f"{text} Threads a run: {manifest['threads']}; {made_with}."


def _notes(folder: Path) -> list[str]:
    path = folder / NOTES
    return [path.read_text(encoding="utf-8").strip()] if path.is_file() else []


def _save(figure: Figure, path: Path) -> bytes:
    """Write a figure as png and svg; return the svg."""
    from matplotlib import rc_context

    with rc_context(STYLE):  # type: ignore[arg-type]
        figure.savefig(path.with_suffix(".png"), dpi=DPI)
        drawing = io.BytesIO()
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    path.with_suffix(".svg").write_bytes(drawing.getvalue())
    return drawing.getvalue()


def _html(text: str, drawings: dict[str, bytes]) -> str:
    """Return the report's Markdown, which is of a few kinds of blocks, as HTML with the figures in it."""
    out = []
    for block in text.strip().split("\n\n"):
        if match := re.fullmatch(r"(#+) (.*)", block):
            level = len(match[1])
            out.append(f"<h{level}>{html.escape(match[2])}</h{level}>")
        elif match := re.fullmatch(r"!\[(.*)\]\(.*\)", block):
            data = base64.b64encode(drawings[match[1]]).decode()
            out.append(f'<figure><img alt="{match[1]}" src="data:image/svg+xml;base64,{data}"></figure>')
        elif block.startswith("|"):
            header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.split("\n"))
            lines = [f"<tr>{''.join(f'<th>{_inline(cell)}</th>' for cell in header)}</tr>"]
            lines += [f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in rows]
            out.append(f'<div class="wide"><table>{"".join(lines)}</table></div>')
        else:
            out.append(f'<p class="note">{_inline(block)}</p>')
    return "\n".join(out)


def _inline(text: str) -> str:
    text = html.escape(text).replace("&lt;u&gt;", "<u>").replace("&lt;/u&gt;", "</u>").replace("\\*", "&#42;")
    return re.sub(r"`(.+?)`", r"<code>\1</code>", re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text))


def main(args: Sequence[str]) -> None:
    """`python -m lightning_rlvr report`: write the report and print its main table."""
    parser = argparse.ArgumentParser("python -m lightning_rlvr report", description="Tables and figures of a sweep.")
    parser.add_argument("folder", type=Path, help="folder of a sweep, of one run, or of an earlier report")
    parser.add_argument("--baseline", help="variant that the others are compared with (default: grpo if there is one)")
    parser.add_argument(
        "--output", type=Path, help="folder for the report (default: FOLDER/report, or FOLDER if that is a report)"
    )
    chosen = parser.parse_args(args)
    output = report(chosen.folder, chosen.baseline, chosen.output)
    header, *rows = held_out_table(analysis.summarise(analysis.read_runs(chosen.folder)))
    table = Table(*header)
    for row in rows:
        table.add_row(*(re.sub(r"\*\*(.+?)\*\*", r"[bold]\1[/]", re.sub(r"<u>(.+?)</u>", r"[u]\1[/]", c)) for c in row))
    show(table, f"report: {(output / 'report.html').resolve()}")
