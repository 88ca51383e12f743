"""Tables and figures of a sweep."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from studies import write_study

from lightning_rlvr.__main__ import main
from lightning_rlvr.analysis import paired, read_held_out, read_runs, read_training, summarise
from lightning_rlvr.analysis.drawing import BASELINE, colours
from lightning_rlvr.report.command import report
from lightning_rlvr.report.figures import figures
from lightning_rlvr.report.tables import held_out_table, paired_table
from lightning_rlvr.types import UserError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of a study."""
    folder = tmp_path_factory.mktemp("written") / "study"
    write_study(folder)
    return report(folder)


def test_best_is_bold_and_second_is_underlined_whatever_the_base(study):
    header, base, grpo, sent, mask = held_out_table(summarise(read_runs(study)))
    column = header.index("avg@4")
    assert [row[column].split(" ")[0] for row in (base, grpo, sent, mask)] == [
        "0.200",
        "0.600",
        "**0.800**",
        "<u>0.705</u>",
    ]
    column = header.index("pass@4")
    assert {row[column].split(" ")[0] for row in (grpo, sent, mask)} == {"0.900"}, "all alike, none is best"
    assert "pass@1" not in header
    assert sent[header.index("entropy (nats)")] == "0.500 ± 0.000", "more is not better"


def test_differences_that_leave_out_zero_have_a_star(study):
    header, sent, _ = paired_table(paired(read_runs(study), "grpo"))
    assert sent[header.index("avg@4")] == r"+0.200 [+0.200, +0.200]\*"
    assert sent[header.index("length (tokens)")] == "+0.0 [+0.0, +0.0]"


def test_the_report_has_all_its_parts(written):
    kinds = ("training", "classes", "law", "change", "ends")
    files = {f"{name}.{kind}" for name in kinds for kind in ("png", "svg")}
    assert {path.name for path in written.iterdir()} == files | {
        *("report.md", "report.html", "held_out.csv", "paired.csv"),
        *("sweep.json", "runs.csv", "training.parquet", "validations.parquet"),
    }
    text = (written / "report.md").read_text()
    assert "8 finished runs of 3 variants, 2 to 3 seeds each. Threads a run: 1; lightning_rlvr 0.1.0" in text
    assert "Against grpo, seed by seed" in text
    assert pd.read_csv(written / "runs.csv").shape[0] == 8


def test_the_page_needs_no_other_file(written):
    page = (written / "report.html").read_text()
    assert page.count('src="data:image/svg+xml;base64,') == 5
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert "<td><b>0.800</b> ± 0.025</td>" in page
    assert "<td><u>0.705</u>" in page


def test_the_same_runs_give_the_same_files(written, study, tmp_path):
    again = report(study, output=tmp_path / "again")
    for path in written.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_report_is_made_anew_from_itself(study, tmp_path):
    kept = tmp_path / "kept" / "study"
    kept.mkdir(parents=True)
    (kept / "notes.md").write_text("Made on a Monday, **by hand**.\n")
    report(study, "mask", kept)
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    for name in before:
        if name.endswith((".png", ".svg", "report.md", ".html", "held_out.csv", "paired.csv")):
            (kept / name).unlink()
    shutil.rmtree(study)
    assert report(kept) == kept
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    heading, runs, notes, *_ = text = before["report.md"].decode().split("\n\n")
    assert (heading, notes) == ("# study", "Made on a Monday, **by hand**.")
    assert runs.startswith("8 finished runs")
    assert "## Against mask, seed by seed" in text
    assert b"<b>by hand</b>" in before["report.html"]


def test_without_grpo_there_is_nothing_to_compare_with(study):
    (study / "grpo").rename(study / "first")
    folder = report(study)
    assert "Against" not in (folder / "report.md").read_text()
    assert not (folder / "paired.csv").exists()
    assert "Against first" in (report(study, "first") / "report.md").read_text()


def test_one_seed_is_enough(study):
    for variant in ("grpo", "sent", "mask"):
        (study / variant / "seed-2").rename(study / variant / "other-2")
        (study / variant / "seed-3").rename(study / variant / "other-3")
    text = (report(study) / "report.md").read_text()
    assert "| sent | **0.800** | 0.900 | 0.500 | 9.0 | 0.500 |" in text
    assert "| sent | +0.200 | +0.000 |" in text


def test_a_variant_has_one_colour_in_all_figures(study):
    names = ["grpo", "sent", "mask"]
    chosen = colours(names, "grpo")
    assert len(set(chosen.values())) == 3
    assert chosen["grpo"] == BASELINE
    drawn = figures(read_runs(study), read_training(study), read_held_out(study), "grpo")
    for panel in drawn["training"].axes:
        assert [line.get_color() for line in panel.lines] == list(chosen.values())
        assert panel.get_xlabel()
        assert panel.get_ylabel()
    (legend,) = drawn["training"].legends
    assert [text.get_text() for text in legend.get_texts()] == names


def test_classes_are_drawn_of_those_who_have_any(study):
    drawn = figures(read_runs(study), read_training(study), read_held_out(study), "grpo")["classes"]
    assert [axes.get_title(loc="left") for axes in drawn.axes] == ["share of tokens in class low", "KL of class low"]
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["sent"]
    assert drawn.axes[1].lines[0].get_ydata().tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_the_law_is_drawn_for_each_variant(study):
    drawn = figures(read_runs(study), read_training(study), read_held_out(study), "grpo")["law"]
    assert [axes.get_title(loc="left") for axes in drawn.axes] == ["grpo", "sent", "mask"]
    assert "a = 1.00, b = 3.00, R² = 1.00" in [text.get_text() for text in drawn.axes[0].texts]


def test_the_change_of_entropy_is_drawn_against_its_prediction(study):
    training = read_training(study)
    pull = np.array([0.5, 0.1, 0.3, 0.2])  # the last batch's has no change after it
    for variant, factor in {"grpo": 100.0, "sent": 20.0, "mask": -50.0}.items():
        levels = 2 - 0.01 * factor * np.concatenate([[0], pull[:-1].cumsum()])
        for batch in range(4):
            here = (training["variant"] == variant) & (training["batch"] == batch + 1)
            training.loc[here, ["train/covariance", "train/entropy"]] = [pull[batch], levels[batch]]
    drawn = figures(read_runs(study), training, read_held_out(study), "grpo")["change"]
    assert [axes.get_title(loc="left") for axes in drawn.axes] == ["grpo", "sent", "mask"]
    texts = [text.get_text() for axes in drawn.axes for text in axes.texts]
    assert texts == ["factor 100, r = 1.00", "factor 20, r = 1.00", "r = -1.00"]
    assert [len(axes.lines) for axes in drawn.axes] == [1, 1, 0], "no line where nothing follows it"
    for axes in drawn.axes:
        (dots,) = axes.collections
        assert sorted({round(x, 9) for x in dots.get_offsets()[:, 0]}) == [-0.005, -0.003, -0.001]
        for column, (low, high) in enumerate((axes.get_xlim(), axes.get_ylim())):
            assert low < dots.get_offsets()[:, column].min() <= dots.get_offsets()[:, column].max() < high
    without = training.drop(columns="train/covariance")
    assert "change" not in figures(read_runs(study), without, read_held_out(study), "grpo")


def test_runs_without_held_out_questions_are_refused(study):
    for path in study.glob("*/seed-*/summary.json"):
        path.write_text(re.sub(r'"(before|after)": \{.*?\}', r'"\1": null', path.read_text()))
    with pytest.raises(UserError, match=r"Set data\.val"):
        report(study)


def test_the_command_prints_the_table_and_where_the_page_is(study, tmp_path, capsys):
    main(["report", str(study), "--baseline", "mask", "--output", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "sent" in said
    assert "Against mask" in (tmp_path / "out" / "report.md").read_text()
    assert "out/report.html" in said.replace("\n", "")


def test_axes_end_where_runs_have_been_and_spikes_are_left_out(study):
    training = read_training(study)
    training.loc[training.index[-1], ["train/kl/old", "train/entropy"]] = [50.0, 2.0]
    drawn = figures(read_runs(study), training, read_held_out(study), "grpo")
    assert drawn["training"].axes[0].get_ylim()[1] == pytest.approx(2.0, rel=0.06)
    old = next(axes for axes in drawn["classes"].axes if axes.get_title(loc="left").endswith("that sampled"))
    assert old.get_ylim()[0] == 0
    assert old.get_ylim()[1] < 50


def test_what_rounds_to_nothing_has_no_sign(study):
    table = paired(read_runs(study), "grpo")
    table.loc[("sent", "avg@4"), ["difference", "low", "high"]] = [-0.0001, -0.0002, -0.0001]
    header, sent, _ = paired_table(table)
    assert sent[header.index("avg@4")] == "+0.000 [+0.000, +0.000]"


def test_a_folder_that_cannot_be_made_is_refused(study):
    with pytest.raises(UserError, match="--output"):
        report(study, output=Path("/proc/x"))
