"""`data check` finds what makes training wrong before a model is loaded, and says so by its exit status."""

import json

import pytest
from support import QUICKSTART

from lightning_rlvr.__main__ import main
from lightning_rlvr.data_check import Report, contained, normalised
from lightning_rlvr.types import Prompt, UserError

GOOD = [
    {"question": f"A farmer has {i} cows and buys {2 * i + 1} more cows at the market on a sunny day. How many now?"}
    | {"answer": str(3 * i + 1)}
    for i in range(1, 13)
]


@pytest.fixture
def check(tmp_path, capsys, monkeypatch):
    """Write the rows of each split, check them, return the exit status, the report and what was printed."""
    monkeypatch.setenv("LIGHTNING_RLVR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lightning_rlvr.models.Embedded.load", lambda self: pytest.fail("loads a model"))
    monkeypatch.setattr("lightning_rlvr.models.Embedded.prepare", lambda self: pytest.fail("makes a model"))

    def run(train, val, *flags, reward="lightning_rlvr.rewards.MathAnswer"):
        words = ["data", "check", "--config", str(QUICKSTART), "--output", str(tmp_path / "report")]
        words += ["--model.reward", reward, "--data.prompts_per_batch", "2", "--data.max_prompt_tokens", "200"]
        for split, rows in (("train", train), ("val", val)):
            path = tmp_path / f"{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            words += [f"--data.{split}", "lightning_rlvr.tasks.Files", f"--data.{split}.init_args.path", str(path)]
            words += [f"--data.{split}.init_args.prompt_template", "{question}"]
        with pytest.raises(SystemExit) as exit_:
            main([*words, *flags])
        printed = capsys.readouterr()
        assert not (tmp_path / "cache").exists(), "work was done"
        file = tmp_path / "report" / "data_check.json"
        return exit_.value.code, json.loads(file.read_text()) if file.exists() else None, printed

    return run


def found(report):
    return {(one["level"], one["split"], one["what"]): one["count"] for one in report["findings"]}


def test_good_data_pass(check, tmp_path):
    status, report, printed = check(GOOD[:8], GOOD[8:], "--containment", "1")
    assert (status, report["findings"]) == (0, [])
    assert report["splits"]["train"]["questions"] == 8
    assert report["splits"]["train"]["prompt_tokens"]["most"] == max(len(row["question"]) for row in GOOD[:8])
    assert "Nothing found" in printed.out
    assert "| train | 8 |" in (tmp_path / "report" / "data_check.md").read_text()


def test_a_held_out_training_question_is_an_error(check):
    again = {**GOOD[2], "question": GOOD[2]["question"].upper().replace(" ", "  ")}
    status, report, _ = check(GOOD[:8], [*GOOD[8:], again], "--containment", "1")
    assert status == 1
    assert found(report) == {("error", "val", "training question"): 1}
    assert report["findings"][0]["examples"] == ["val:4 = train:2"]


def test_a_chance_repetition_of_a_synthetic_question_is_a_warning(check):
    many = [{**GOOD[0], "question": f"What is {i} plus one?"} for i in range(100)]
    status, report, _ = check(GOOD[:8], [*many, GOOD[0]], "--containment", "1")
    assert (status, found(report)) == (0, {("warning", "val", "training question"): 1})


def test_a_held_out_question_within_a_training_question_is_a_warning(check):
    longer = {**GOOD[0], "question": "Listen well. " + GOOD[9]["question"] + " Say it at once."}
    status, report, _ = check([*GOOD[:8], longer], GOOD[8:])
    assert status == 0
    assert found(report) == {("warning", "val", "near a training question"): 1}
    assert report["findings"][0]["examples"] == ["val:1 ~ train:8 (1.00)"]


def test_repeats_are_warnings_and_contradictions_errors(check):
    same = {**GOOD[0], "answer": f"{GOOD[0]['answer']}.0"}
    status, report, _ = check([*GOOD[:8], same], GOOD[8:], "--containment", "1")
    assert (status, found(report)) == (0, {("warning", "train", "repeated question"): 1})
    other = {**GOOD[0], "answer": "77"}
    status, report, _ = check([*GOOD[:8], same, other], GOOD[8:], "--containment", "1")
    assert status == 1
    assert found(report) == {
        ("warning", "train", "repeated question"): 1,
        ("error", "train", "contradicting golds"): 1,
    }


def test_golds_that_cannot_be_judged_are_errors(check):
    bad = [{"question": f"What is number {i}?", "answer": "?!"} for i in range(2)]
    status, report, printed = check([*GOOD[:8], *bad], GOOD[8:], "--containment", "1")
    assert (status, found(report)) == (1, {("error", "train", "unjudgeable gold"): 2})
    assert report["findings"][0]["examples"] == ["train:8", "train:9"]
    assert "unjudgeable gold" in printed.out


def test_golds_that_are_dropped_are_warnings_and_compared_no_more(check):
    rows = [{**GOOD[0], "answer": "?!"}, {**GOOD[9], "answer": "?!"}]  # else a contradiction and an overlap
    flags = ("--containment", "1", "--data.unjudgeable")
    status, report, _ = check([*GOOD[:8], *rows], GOOD[8:], *flags, "drop")
    assert (status, found(report)) == (0, {("warning", "train", "unjudgeable gold"): 2})
    assert "dropped" in report["findings"][0]["message"]
    assert check([*GOOD[:8], *rows], GOOD[8:], *flags, "error")[0] == 1


def test_a_split_of_nothing_but_unjudgeable_golds_is_an_error(check):
    rows = [{**row, "answer": "?!"} for row in GOOD[:8]]
    status, report, _ = check(rows, GOOD[8:], "--containment", "1", "--data.unjudgeable", "drop")
    assert (status, found(report)) == (1, {("error", "train", "unjudgeable gold"): 8})


def test_long_prompts_are_errors_or_dropped(check):
    long = {"question": "word " * 60, "answer": "3"}
    status, report, _ = check([*GOOD[:8], long], GOOD[8:], "--containment", "1")
    assert (status, found(report)) == (1, {("error", "train", "long prompt"): 1})
    status, report, _ = check([*GOOD[:8], long], GOOD[8:], "--containment", "1", "--data.long_prompts", "drop")
    assert (status, found(report)) == (0, {("warning", "train", "long prompt"): 1})


def test_too_few_questions(check):
    status, report, _ = check(GOOD[:3], GOOD[8:], "--containment", "1", "--data.curriculum.stages", "4")
    assert (status, found(report)) == (1, {("error", "train", "too few questions"): 3})
    status, report, _ = check(GOOD[:3], GOOD[8:], "--containment", "1")
    assert (status, found(report)) == (0, {("warning", "train", "small stage"): 3})


def test_a_split_that_cannot_be_read_is_an_error(check):
    status, report, _ = check([*GOOD[:8], {"question": "", "answer": "3"}], GOOD[8:], "--containment", "1")
    assert (status, found(report)) == (1, {("error", "train", "cannot be loaded"): 0})
    assert "row 8" in report["findings"][0]["message"]


def test_a_wrong_config_is_no_finding(check):
    assert check(GOOD, GOOD, "--data.group_sise", "4")[0] == 2
    assert check(GOOD, GOOD, "--containment", "0")[0] == 2


def test_containment_is_the_share_of_runs_of_words():
    train = [Prompt("a", "a b c d e f", ""), Prompt("b", "x y z c d e", "")]
    asked = [Prompt(text, text, "") for text in ("b c d e", "c d e q", "e d c", "", "X Y!")]
    assert contained(asked, train, 3) == [(1.0, 0), (0.5, 0), (0.0, 0), (0.0, 0), (0.0, 0)]
    assert contained([Prompt("c", "y z", "")], train, 3) == [(1.0, 1)]
    assert normalised("What's  2+3?") == normalised("whats 2 + 3 ?") != normalised("What's 2-3?")


@pytest.mark.parametrize(
    ("one", "other"),
    [("f'(2)", "f(2)"), ("y''", "y'"), ("3\u00b2", "32"), ("x\u2082", "x2"), ("2\u00bd", "21/2"), ("a_1", "a 1")],
)
def test_formulas_that_differ_are_not_one_question(one, other):
    assert normalised(f"Find {one}.") != normalised(f"Find {other}.")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2\u22123", "2-3"),
        ("\u201cx\u201d is 'x'", '"x" is x'),
        ("x\u200by\ufeff", "xy"),
        ("na\u00efve \ufb01nd", "nai\u0308ve find"),
        ("I'm at O\u2019Brien's", "Im at OBriens"),
        ("3\u00b2 and \u00bd", "3^2 and 1/2"),
        ("f'(x)", "f\u2032(x)"),
    ],
)
def test_writings_of_one_question_are(one, other):
    assert normalised(one) == normalised(other)


def test_a_report_that_cannot_be_written_is_the_users_to_change(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Set --output"):
        Report().write(tmp_path / "file")


def test_an_empty_report_passes():
    assert Report().exit_status == 0
