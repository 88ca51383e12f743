import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from lightning_rlvr.tasks import Files
from lightning_rlvr.types import Task, UserError

ROWS = [
    {"question": "What is 1 + 1?", "answer": "2", "id": "a"},
    {"question": "What is {1 + 2}?", "answer": "3", "id": "b"},
    {"question": "What is\u2028half of one?", "answer": 0.5, "id": "c"},
]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), "utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_the_three_formats_hold_the_same(tmp_path, suffix):
    rows = [{**row, "answer": str(row["answer"])} for row in ROWS]
    prompts = Files(write(tmp_path / f"set{suffix}", rows)).load()
    assert [p.uid for p in prompts] == ["set:0", "set:1", "set:2"]
    assert [p.text for p in prompts] == [row["question"] for row in rows]
    assert [p.answer for p in prompts] == ["2", "3", "0.5"]
    assert prompts[1].metadata == rows[1]


def test_gsm8k(tmp_path):
    rows = [
        {
            "question": "A farm sells 617 eggs twice a day. How many?",
            "answer": "It sells 617*2 = <<617*2=1234>>1,234.\n#### 1,234",
        },
        {"question": "How many legs?", "answer": "Not #### 3\nbut 4.\n#### -4 "},
    ]
    task = Files(
        write(tmp_path / "train.jsonl", rows),
        answer_pattern="#### (.+)$",
        prompt_template="Question: {question}\nAnswer:",
    )
    first, second = task.load()
    assert first.text == "Question: A farm sells 617 eggs twice a day. How many?\nAnswer:"
    assert [first.answer, second.answer] == ["1,234", "-4"]


def test_the_last_match_is_the_gold(tmp_path):
    path = write(tmp_path / "a.json", [{"question": "q", "answer": "#### 1\n#### 2"}])
    assert Files(path, answer_pattern="#### (.+)").load()[0].answer == "2"


def test_columns_by_name_and_by_path(tmp_path):
    rows = [{"prompt": [{"content": "1+1?", "role": "user"}], "reward_model": {"ground_truth": "2"}, "level": 3}]
    arguments = {
        "question_column": "prompt.0.content",
        "answer_column": "reward_model.ground_truth",
        "prompt_template": "[{level}] {question}",
    }
    for name in ("dapo.parquet", "dapo.jsonl"):
        prompt = Files(write(tmp_path / name, rows), **arguments).load()[0]
        assert (prompt.text, prompt.answer) == ("[3] 1+1?", "2")
    flat = write(tmp_path / "flat.json", [{"a.b": "q", "a": {"b": "no"}, "answer": "1"}])
    assert Files(flat, question_column="a.b").load()[0].text == "q"


def test_rows_uid_and_unique(tmp_path):
    path = write(tmp_path / "a.jsonl", [*ROWS, {**ROWS[0], "id": "d"}])
    assert [p.uid for p in Files(path, rows=(1, 3)).load()] == ["a:1", "a:2"]
    assert [p.uid for p in Files(path, rows=(2, None), uid_column="id").load()] == ["c", "d"]
    assert [p.uid for p in Files(path, unique=True).load()] == ["a:0", "a:1", "a:2"]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])).filter(str.strip))
def test_any_text_survives_jsonl(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("t") / "a.jsonl"
    assert Files(write(path, [{"question": text, "answer": "1"}])).load()[0].text == text


def test_paths_and_byte_order_marks(tmp_path, monkeypatch):
    data = b"\xef\xbb\xbf" + json.dumps({"question": "q", "answer": "1"}).encode() + b"\r\n\r\n"
    (tmp_path / "a.jsonl").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Files("a.jsonl").load() == Files("~/a.jsonl").load() != []


def good(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"x", r"must end in .json, .jsonl, .parquet, got"),
        ("a.jsonl", good(ROWS[0]) + b"\n{]\n", "line 3, column 2"),
        ("a.json", b'[\n{"question": "q",\n "answer": }]', "line 3, column 12"),
        ("a.json", b'{"question": "q", "answer": "1"}', "it holds a dict, not a list"),
        ("a.json", b"[1]", "row 0 holds a int, not an object"),
        ("a.jsonl", b"[]\n", "line 1 holds a list, not an object"),
        ("a.jsonl", good(ROWS[0]) + b'{"question": "\xff", "answer": "1"}', "line 2 is not UTF-8"),
        ("a.json", b'[\n\n{"question": "\xff"}]', "line 3 is not UTF-8"),
        ("a.json", b"[" * 200_000, "intact .json file"),
        ("a.json", b"[" + b"9" * 5000 + b"]", "intact .json file"),
        ("a.json", b"", "line 1, column 1"),
        ("a.parquet", b"PAR1 and no more", "intact .parquet file"),
        ("a.parquet", b"", "intact .parquet file"),
        ("a.json", b"[]", "must hold at least one row"),
        ("a.jsonl", b"\n\n", "must hold at least one row"),
        ("a.jsonl", good({"problem": "q", "answer": "1"}), "question_column .* 'question'.*has problem, answer"),
        ("a.jsonl", good(ROWS[0], {"question": "q"}), "answer_column .*row 1 of .* has question"),
        ("a.jsonl", good({"question": " ", "answer": "1"}), "question_column 'question' must not be empty.*row 0"),
        ("a.jsonl", good({"question": None, "answer": "1"}), "question_column 'question' must not be empty"),
        ("a.jsonl", good({"question": "q", "answer": ""}), "answer_column 'answer' must not be empty"),
        ("a.jsonl", b'{"question": "q", "answer": NaN}', "answer_column 'answer' must not be empty"),
        ("a.jsonl", good({"question": ["q"], "answer": "1"}), "got a list .* 'question.0'"),
        ("a.jsonl", good({"question": "q", "answer": []}), "answer_column 'answer' must not be empty"),
        ("a.jsonl", good({"question": "q", "answer": ["1", None]}), "answer_column 'answer' must not be empty"),
        ("a.jsonl", good({"question": "q", "answer": [{"value": "1"}]}), "got a dict .* 'answer.value'"),
        ("a.jsonl", good({"question": "\ud800", "answer": "1"}), "surrogate"),
    ],
)
def test_bad_files_are_one_clear_error(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        Files(str(tmp_path / name)).load()
    assert "the task's" in str(caught.value)


def test_truncated_and_broken_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, [{"question": "q" * 50, "answer": str(i)} for i in range(500)])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"intact .parquet file.*a.parquet"):
        Files(str(path)).load()


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"no such file .*Set the task's path"):
        Files(str(tmp_path / "none.json")).load()
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="that is a folder"):
        Files(str(tmp_path / "folder.json")).load()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"answer_pattern": "#### (.+)$"}, r"answer_pattern .* must find an answer in row 0 .* got '2'"),
        ({"answer_pattern": "2|(x)"}, "must find an answer in row 0"),
        ({"answer_pattern": "("}, "must be a regular expression"),
        ({"answer_pattern": "2"}, r"must hold a group"),
        ({"uid_column": "kind"}, r"uid_column 'kind' must differ .* 'k' twice"),
        ({"uid_column": "uid"}, "uid_column must name a column, got 'uid'"),
        ({"question_column": "question.0"}, "question_column must name a column"),
        ({"rows": (0, 9)}, "has 2 rows. Set the task's rows"),
        ({"rows": (2, None)}, "has 2 rows"),
        ({"rows": (1, 1)}, "0 <= start < stop"),
        ({"rows": (-1, 1)}, "0 <= start < stop"),
        ({"prompt_template": "{nope}"}, "got 'nope': available are answer, gap, kind, question"),
        ({"prompt_template": "{gap}"}, "'gap' is empty in row 0"),
    ],
)
def test_bad_arguments_name_the_key(tmp_path, arguments, message):
    rows = [{"question": f"q{i}", "answer": "2", "kind": "k", "gap": None} for i in range(2)]
    path = write(tmp_path / "a.json", rows)
    with pytest.raises(UserError, match=message):
        Files(path, **arguments).load()


def test_a_template_refuses_what_is_no_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "1", "level": NaN}')
    with pytest.raises(UserError, match="'level' is empty in row 0"):
        Files(str(tmp_path / "a.jsonl"), prompt_template="{level}: {question}").load()


def test_rows_outside_the_slice_are_not_judged(tmp_path):
    path = write(tmp_path / "a.json", [{"question": "q", "answer": "1"}, {"question": "", "answer": ""}])
    assert len(Files(path, rows=(0, 1)).load()) == 1


@pytest.mark.parametrize("mode", ["yaml", "omegaconf+"])
@pytest.mark.parametrize(("given_rows", "rows"), [("[1, 2]", (1, 2)), ("[1, null]", (1, None))])
def test_yaml_builds_it(given_rows, rows, mode):
    parser = ArgumentParser(exit_on_error=False, parser_mode=mode)
    parser.add_argument("--task", type=Task)
    yaml = f"""
task:
  class_path: lightning_rlvr.tasks.Files
  init_args:
    path: train.jsonl
    answer_pattern: "#### (.+)$"
    rows: {given_rows}
"""
    expected = Files("train.jsonl", answer_pattern="#### (.+)$", rows=rows)
    assert parser.instantiate_classes(parser.parse_string(yaml)).task == expected


@pytest.mark.parametrize("mode", ["yaml", "omegaconf+"])
def test_a_pattern_that_yaml_takes_for_a_comment_is_never_lost_in_silence(mode):
    parser = ArgumentParser(exit_on_error=False, parser_mode=mode)
    parser.add_argument("--task", type=Task)

    def build(pattern):
        arguments = ["--task=lightning_rlvr.tasks.Files", "--task.path=a.json", f"--task.answer_pattern={pattern}"]
        return parser.instantiate_classes(parser.parse_args(arguments)).task

    assert build("[#]### (.+)$") == Files("a.json", answer_pattern="[#]### (.+)$")
    with pytest.raises(UserError, match=r"answer_pattern must be text, got null.*as \[#\]"):
        build("#### (.+)$")
