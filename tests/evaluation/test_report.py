"""Tables, picture and json of an evaluation."""

import json

import pandas as pd
import pytest
import torch

from lightning_rlvr.evaluation.measure import Bootstrap, Result
from lightning_rlvr.evaluation.report import Report, write_report
from lightning_rlvr.types import UserError

RESPONSES = {
    "length": 120.4,
    "entropy": 0.25,
    "truncated": 0.125,
    "correct": 0.5,
    "wrong": 0.25,
    "unparsable": 0.25,
    "timeout": 0.0,
    "error": 0.0,
}


def report(**means):
    """Models by name, with the means of benchmarks a and b; all problems of one are worth the same."""
    results = {
        model: {
            name: Result(("0", "1"), {"avg@2": torch.full((2,), value, dtype=torch.float64)}, RESPONSES)
            for name, value in zip("ab", values, strict=True)
        }
        for model, values in means.items()
    }
    return Report.make(results, Bootstrap(0.9, 50), {})


def rows(text, title):
    lines = text.split(f"## {title}\n")[1].split("\n\n## ")[0].splitlines()
    table = [line for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def test_the_best_is_bold_and_the_second_underlined():
    text = report(base=(0.5, 0.25), grpo=(0.75, 0.25), sent=(0.75, 0.125)).markdown()
    assert rows(text, "avg@2") == [
        ["model", "a (2)", "b (2)", "average"],
        ["---", "---:", "---:", "---:"],
        ["base", "<u>50.0</u> [50.0, 50.0]", "**25.0** [25.0, 25.0]", "37.5 [37.5, 37.5]"],
        ["grpo", "**75.0** [75.0, 75.0]", "**25.0** [25.0, 25.0]", "**50.0** [50.0, 50.0]"],
        ["sent", "**75.0** [75.0, 75.0]", "<u>12.5</u> [12.5, 12.5]", "<u>43.8</u> [43.8, 43.8]"],
    ]
    assert "90% bootstrap intervals" in text


def test_what_reads_the_same_is_marked_the_same():
    table = rows(report(base=(0.50001, 0.0), other=(0.5, 0.0)).markdown(), "avg@2")
    assert [row[1] for row in table[2:]] == ["50.0 [50.0, 50.0]"] * 2


def test_one_model_has_neither_marks_nor_differences():
    text = report(base=(0.5, 0.25)).markdown()
    assert "**" not in text.split("## ")[1]
    assert "Paired" not in text


def test_differences_have_their_sign_and_share():
    table = rows(report(base=(0.5, 0.25), worse=(0.25, 0.25)).markdown(), "worse - base")
    assert table[2] == [
        "avg@2",
        "-25.0 [-25.0, -25.0] 1.000",
        "+0.0 [+0.0, +0.0] 1.000",
        "-12.5 [-12.5, -12.5] 1.000",
    ]


def test_nothing_is_minus_zero():
    text = report(base=(0.5, 0.25), worse=(0.4999, 0.2499)).markdown()
    assert "-0.0" not in text


def test_how_responses_were():
    table = rows(report(base=(0.5, 0.25)).markdown(), "Responses")
    assert table[0][2:] == ["tokens", "entropy (nats a token)", "truncated", "unparsable", "timeout", "error"]
    assert table[2] == ["base", "a", "120", "0.250", "12.5%", "25.0%", "0.0%", "0.0%"]


def test_names_cannot_break_the_table():
    table = rows(report(**{"a|b": (0.5, 0.5)}).markdown(), "avg@2")
    assert table[2][0] == r"a\|b"


def test_the_files(tmp_path):
    found = report(base=(0.5, 0.25), sent=(0.75, 0.125))
    write_report(found, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "table.csv", "table.md", "table.png"]
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["models"] == ["base", "sent"]
    assert stored["problems"] == {"a": 2, "b": 2}
    assert stored["results"]["sent"]["average"]["avg@2"] == {"value": 0.4375, "low": 0.4375, "high": 0.4375}
    assert stored["differences_to_first"]["sent"]["a"]["avg@2"]["not_better"] == 0
    assert stored["responses"]["base"]["a"] == RESPONSES
    table = pd.read_csv(tmp_path / "table.csv")
    assert list(table.columns[:5]) == ["measure", "model", "a", "a low", "a high"]
    assert table["average"].tolist() == [0.375, 0.4375]
    assert (tmp_path / "table.md").read_text() == found.markdown()
    assert (tmp_path / "table.png").stat().st_size > 5_000


def test_names_are_no_formulas_in_the_picture(tmp_path):
    write_report(report(**{"$a_{$": (0.5, 0.5), r"$\frac$": (0.25, 0.5)}), tmp_path)
    assert (tmp_path / "table.png").stat().st_size > 5_000


def test_the_picture_grows_with_the_names(tmp_path):
    sizes = []
    for letter in ("a", "a" * 60):
        write_report(report(**{letter: (0.5, 0.5)}), tmp_path)
        sizes.append(int.from_bytes((tmp_path / "table.png").read_bytes()[16:20], "big"))  # PNG: width
    assert sizes[1] > sizes[0] + 400


def test_a_folder_that_cannot_be_written_is_the_users_to_change(tmp_path):
    (tmp_path / "table.csv").mkdir()
    with pytest.raises(UserError, match=r"output must be a folder that can be written.*Set output"):
        write_report(report(base=(0.5, 0.25)), tmp_path)
    assert not (tmp_path / "results.json").exists()
