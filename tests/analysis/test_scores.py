"""Scores as notebooks show them."""

import json

import pandas as pd
import pytest

from lightning_rlvr import analysis
from lightning_rlvr.analysis.pictures import scores_by_stage, step_sizes
from lightning_rlvr.store import Store
from lightning_rlvr.types import UserError

ANSWERS = {
    "sure": ["1"] * 4,
    "fooled": ["2", "2", "2", "1"],
    "torn": ["1", "1", "3", None],
    "lost": ["7", "8", "9", None],
}


@pytest.fixture
def scored(tmp_path):
    """Scores of four questions, all of which have the gold 1, and a run that left one of them out."""
    rows = []
    for (uid, answers), entropy in zip(ANSWERS.items(), (0.0, 0.56, 1.04, 1.39), strict=True):
        largest = max(answers, key=answers.count)
        rows.append({
            "uid": uid, "question": f"{uid}?", "gold": "1", "semantic_entropy_discrete": entropy, "answers": answers,
            "majority": answers.count(largest) / 4, "majority_correct": largest == "1",
            "pass_rate": answers.count("1") / 4,
        })  # fmt: skip
    store = Store(tmp_path / "scores.parquet", {"layout": 2})
    store.append(rows)
    store.finish(list(ANSWERS))
    (tmp_path / "curriculum.json").write_text(json.dumps({"stages": [["sure", "fooled"], ["torn"]]}))
    return tmp_path


def test_questions_have_their_kind_and_stage(scored):
    table = analysis.read_scores(scored / "scores.parquet", scored).set_index("uid")
    assert table["kind"].tolist() == ["all right", "confident and wrong", "mixed", "all wrong"]
    assert table["stage"].tolist() == [1, 1, 2, 0]
    assert "stage" not in analysis.read_scores(scored / "scores.parquet")


def test_stages_are_summed_up(scored):
    table = analysis.stage_table(analysis.read_scores(scored / "scores.parquet", scored))
    assert table.index.tolist() == [0, 1, 2]
    assert table.loc[1, ["questions", "entropy min", "entropy max", "pass rate"]].tolist() == [2, 0.0, 0.56, 0.625]
    assert table.loc[1, "confident and wrong"] == 1


def test_answers_are_counted_the_most_frequent_first(scored):
    table = analysis.answer_table(analysis.read_scores(scored / "scores.parquet"), rows=3)
    assert table["answers"].tolist() == ["1 x 4", "2 x 3, 1 x 1", "1 x 2, 3 x 1, unparsable x 1"]


def test_what_is_no_score_file_is_refused(scored, tmp_path):
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r"other\.parquet"):
        analysis.read_scores(tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r"curriculum\.json"):
        analysis.read_scores(scored / "scores.parquet", tmp_path / "elsewhere")


def test_the_figure_has_every_question(scored):
    spread, rates = scores_by_stage(analysis.read_scores(scored / "scores.parquet", scored)).axes
    assert sum(patch.get_height() for patch in spread.patches) == 4
    assert [text.get_text() for text in spread.get_legend().get_texts()] == ["left out", "stage 1", "stage 2"]
    assert sum(len(dots.get_offsets()) for dots in rates.collections) == 4


def test_steps_are_drawn_as_measured_over_predicted():
    def table(ratio):
        columns = {"entropy_change/measured": [ratio, 2.0], "entropy_change/first_order": [1.0, 2.0]}
        return pd.DataFrame(columns, index=["GRPO", "SENT"])

    (axes,) = step_sizes({0.01: table(1.0), 0.1: table(0.6)}).axes
    assert [line.get_ydata().tolist() for line in axes.lines[:2]] == [[1.0, 0.6], [1.0, 1.0]]
    assert axes.lines[0].get_xdata().tolist() == [0.01, 0.1]
