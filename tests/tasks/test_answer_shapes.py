"""The shapes that benchmarks' gold answers are found in load from local files, and responses are judged by them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_rlvr.rewards import MathAnswer
from lightning_rlvr.tasks import Files
from lightning_rlvr.types import Response, UserError

NESTED = r"Half of \(\frac{1}{2}\) is \(\boxed{\frac{1}{4}}\)."


@pytest.fixture(scope="module")
def math_answer():
    reward = MathAnswer(workers=1)
    yield reward
    reward.close()


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("row", "settings", "gold", "right", "wrong"),
    [
        ({"answer": None, "solution": "3 + 4 = 7\n#### 7"}, {"answer_pattern": "#### (.+)$"}, "7", "7", "3"),
        ({"answer": None, "solution": "#### 1\n#### 1,234"}, {"answer_pattern": "#### (.+)$"}, "1,234", "1234", "1"),
        ({"answer": None, "solution": NESTED}, {}, NESTED, "0.25", "1/2"),
        ({"answer": "7", "solution": "no mark"}, {"answer_pattern": "#### (.+)$"}, "7", "7", "8"),
        ({"answer": 142.0}, {}, "142", "142", "143"),
        ({"answer": "142.0"}, {}, "142.0", "142", "1420"),
        ({"answer": 0.5}, {}, "0.5", r"\frac{1}{2}", "5"),
        ({"answer": "033"}, {}, "033", "33", "3"),
        ({"answer": "$\\frac{3}{4}$"}, {}, "$\\frac{3}{4}$", "0.75", "3"),
        ({"answer": "$x=4$"}, {}, "$x=4$", "4", "5"),
        ({"answer": "$2,5$"}, {}, "$2,5$", "5, 2", "2"),
        ({"answer": "2, -1"}, {}, "2, -1", r"\{-1, 2\}", "-1"),
        ({"answer": "(1,8), (2,7)"}, {}, "(1,8), (2,7)", "(1,8), (2,7)", "(8,1), (7,2)"),
    ],
)
def test_an_answer_is_read_and_judged(tmp_path, math_answer, suffix, row, settings, gold, right, wrong):
    keys = {"solution_column": "solution", **settings} if "solution" in row else settings
    (prompt,) = Files(
        write(tmp_path / f"a{suffix}", [{"problem": "q", **row}]), question_column="problem", **keys
    ).load()
    assert prompt.answer == gold
    math_answer.check([prompt])
    answers = [Response(rf"So \boxed{{{answer}}}.") for answer in (right, wrong)]
    assert [verdict.correct for verdict in math_answer(answers, [prompt] * 2)] == [True, False]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_list_holds_alternatives(tmp_path, suffix):
    rows = [
        {"question": "a", "final_answer": ["2", " 4 ", "2"], "level": 3},
        {"question": "b", "final_answer": ["$1$"], "level": 4},
    ]
    first, second = Files(write(tmp_path / f"a{suffix}", rows), answer_column="final_answer").load()
    assert (first.answer, first.metadata["alternatives"], first.metadata["level"]) == ("2", ["4"], 3)
    assert (second.answer, "alternatives" in second.metadata) == ("$1$", False)


def test_a_float_that_stands_for_many_whole_numbers_is_left_as_it_is(tmp_path):
    assert Files(write(tmp_path / "a.jsonl", [{"question": "q", "answer": 4e33}])).load()[0].answer == "4e+33"


def test_numbers_in_a_list(tmp_path):
    (prompt,) = Files(write(tmp_path / "a.jsonl", [{"question": "q", "answer": [3.0, 0.5]}])).load()
    assert (prompt.answer, prompt.metadata["alternatives"]) == ("3", ["0.5"])


def test_a_pattern_finds_each_alternative(tmp_path):
    rows = [{"question": "q", "answer": ["#### 1", "so #### 2"]}]
    (prompt,) = Files(write(tmp_path / "a.jsonl", rows), answer_pattern="#### (.+)$").load()
    assert (prompt.answer, prompt.metadata["alternatives"]) == ("1", ["2"])


def test_a_column_called_alternatives_is_not_taken_for_right_answers(tmp_path):
    rows = [{"question": "Which?", "answer": "A", "alternatives": ["A", "B", "C"]}]
    (prompt,) = Files(write(tmp_path / "a.jsonl", rows)).load()
    assert prompt.metadata["alternatives"] == []


def test_an_answer_missing_in_both_columns_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer": None, "solution": " "}])
    with pytest.raises(UserError, match="solution_column 'solution' must not be empty"):
        Files(path, solution_column="solution").load()
    with pytest.raises(UserError, match="solution_column must be text, got null"):
        Files(path, solution_column=None)
