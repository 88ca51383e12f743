"""The report about semantic-entropy scores: its figures, and the page in a real browser."""

import json
import math
import re
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from support import browser, opened

from lightning_rlvr.curriculum import Curriculum
from lightning_rlvr.curriculum.order import kinds
from lightning_rlvr.curriculum.report import EXAMPLES, boundaries, choose, most_entropy, report_page, write_report
from lightning_rlvr.curriculum.score import ESTIMATORS, estimates
from lightning_rlvr.types import Prompt, UserError

MANIFEST = {"policy": "Embedded(seed=1)", "samples": 4, "temperature": 1.0}
HOSTILE = "</script><script>document.title='owned'</script><b>bold</b> \"'`${1}` שלום 🧮 \u2028 \u202e"


def question(number, answers, gold="1", length=4, truncated=0, **replaced):
    """Score four answers to a question as `score_batch` would; only equal texts are one cluster."""
    labels: dict[object, int] = {}
    drawn = {
        "answers": answers,
        "cluster": [labels.setdefault(i if a is None else a, len(labels)) for i, a in enumerate(answers)],
        "correct": [a == gold for a in answers],
        "logp": [-1.0 - 0.5 * i for i in range(len(answers))],
        "length": [length] * len(answers),
    }
    record = {
        "uid": f"q{number}",
        "question": f"question {number}?",
        "gold": gold,
        **estimates(drawn),
        "pass_rate": sum(drawn["correct"]) / len(answers),
        "mean_token_entropy": 0.5,
        "mean_length": float(length),
        "truncated": truncated,
        "unparsable": answers.count(None),
        **drawn,
    }
    return {**record, **replaced}


def table():
    """Six questions: entropies 0, 0 (wrong), 0.562 (2 times: 1 wrong), 1.040, 1.386 nats by counts."""
    rows = [["1", "1", "1", "1"], ["7", "7", "7", "7"], ["1", "1", "1", "2"], ["7", None, "7", "7"]]
    rows += [["1", "1", "2", None], ["1", "2", None, None]]
    return pd.DataFrame([question(i, row, length=i + 1, truncated=int(i == 5)) for i, row in enumerate(rows)])


def cut(scores, curriculum):
    prompts = [Prompt(uid=uid, text="?", answer="1") for uid in scores["uid"]]
    return curriculum.cut(prompts, scores, 0)


def page_of(scores, curriculum=None):
    curriculum = curriculum or Curriculum()
    return report_page(scores, curriculum, cut(scores, curriculum), MANIFEST)


def data_of(page):
    return json.loads(re.search(r"^const data = (.*);$", page, re.MULTILINE)[1])


def test_its_figures_are_those_counted_by_hand():
    data = data_of(page_of(table()))
    assert (data["questions"], data["samples"], data["stages"]) == (6, 4, 2)
    assert data["kinds"] == {"confident_and_wrong": 2, "all_right": 1, "all_wrong": 2}
    # the majority of ["1", "2", None, None] is the first of two that are as frequent
    assert data["majority_right"] == pytest.approx(4 / 6, abs=1e-6)
    assert data["pass_rate"] == pytest.approx((4 + 0 + 3 + 0 + 2 + 1) / 24, abs=1e-6)
    assert data["unparsable"] == pytest.approx(4 / 24, abs=1e-6)
    assert data["truncated"] == pytest.approx(1 / 24, abs=1e-6)
    three, two = 0.25 * math.log(4) + 0.75 * math.log(4 / 3), 0.5 * math.log(2) + 0.5 * math.log(4)
    discrete = data["estimates"]["discrete"]
    assert discrete["agreed"] == pytest.approx(2 / 6, abs=1e-6)
    everything = {"low": 0, "mean": (2 * three + two + math.log(4)) / 6, "high": math.log(4)}
    assert discrete["parts"]["all"] == pytest.approx(everything, abs=1e-6)
    assert discrete["parts"]["stage 2"] == pytest.approx(
        {"low": three, "mean": (three + two + math.log(4)) / 3, "high": math.log(4)}, abs=1e-6
    )
    assert discrete["boundaries"] == [pytest.approx([three, three], abs=1e-6)]


def test_the_histogram_counts_each_question_once_in_its_stage():
    data = data_of(page_of(table()))
    bins = np.array(data["estimates"]["discrete"]["bins"])
    assert bins.sum(axis=0).tolist() == [3, 3]
    assert bins[0].tolist() == [2, 0], "agreed"
    assert bins[-1].tolist() == [0, 1], "every sample a cluster"
    three, width = 0.25 * math.log(4) + 0.75 * math.log(4 / 3), math.log(4) / (len(bins) - 1)
    assert bins[round(three / width)].tolist() == [1, 1], "a tie that the boundary cuts"
    for name in ESTIMATORS:
        assert np.sum(data["estimates"][name]["bins"]) == sum(cell[2] for cell in data["estimates"][name]["cells"]) == 6


def test_cells_pair_entropy_with_pass_rate():
    cells = data_of(page_of(table()))["estimates"]["discrete"]["cells"]
    assert [cell for cell in cells if cell[0] == 0] == [[0, 0, 1, 1], [0, 1, 1, 0]]
    assert [cell[1:] for cell in cells if 0.5 < cell[0] < 0.6] == [[0, 1, 1], [0.75, 1, 0]]


def test_a_stage_has_its_own_row():
    scores = table()
    parts = data_of(page_of(scores, Curriculum(order="column", column="mean_length")))["parts"]
    assert list(parts) == ["stage 1", "stage 2", "all"]
    assert parts["stage 2"] == pytest.approx(
        {
            "questions": 3,
            "pass_rate": 3 / 12,
            "mean_length": 5,
            "confident_and_wrong": 1,
            "unparsable": 4 / 12,
            "truncated": 1 / 12,
        },
        abs=1e-6,
    )


def test_questions_left_out_are_a_part_with_reasons():
    data = data_of(page_of(table(), Curriculum(confident_and_wrong="drop", all_right="drop")))
    assert list(data["parts"]) == ["stage 1", "stage 2", "left out", "all"]
    assert data["parts"]["left out"]["questions"] == 3
    assert data["left_out"] == {"confident_and_wrong": 2, "all_right": 1}
    assert np.sum(data["estimates"]["discrete"]["bins"], axis=0).tolist() == [2, 1, 3]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_boundaries_lie_in_the_estimate_that_sorts(estimator):
    scores, curriculum = table(), Curriculum(stages=3, estimator=estimator, order="descending")
    stages = cut(scores, curriculum)
    entropy = scores[f"semantic_entropy_{estimator}"]
    wanted = [(entropy[a[-1]], entropy[b[0]]) for a, b in pairwise(stages)]
    for name in ESTIMATORS:
        found = boundaries(scores, name, curriculum, stages)
        assert found == ([pytest.approx(pair, abs=1e-6) for pair in wanted] if name == estimator else [])
    named = Curriculum(order="column", column=f"-semantic_entropy_{estimator}", stages=3)
    assert boundaries(scores, estimator, named, stages) == boundaries(scores, estimator, curriculum, stages)


@pytest.mark.parametrize("order", ["shuffled", "pass_rate"])
def test_other_orders_have_no_boundaries_in_entropy(order):
    curriculum = Curriculum(order=order)
    assert boundaries(table(), "discrete", curriculum, cut(table(), curriculum)) == []


def test_questions_that_come_last_make_no_boundary():
    scores, curriculum = table(), Curriculum(stages=3, confident_and_wrong="last")
    stages = cut(scores, curriculum)
    assert [stage.tolist() for stage in stages] == [[0, 2], [4, 5], [1, 3]]
    entropy = scores["semantic_entropy_discrete"]
    assert boundaries(scores, "discrete", curriculum, stages) == [pytest.approx((entropy[2], entropy[4]), abs=1e-6)]


def test_without_stages_all_questions_are_one_part():
    data = data_of(report_page(table(), Curriculum(all_right="drop"), [], MANIFEST))
    assert list(data["parts"]) == ["all"]
    assert data["left_out"] == {}
    assert [estimate["boundaries"] for estimate in data["estimates"].values()] == [[], [], []]


def test_the_shaded_region_holds_all_that_is_confident_and_wrong():
    rng = np.random.default_rng(0)
    answers = [[["2", "2", "3", "4", "5", None][k] for k in rng.integers(0, 6, size=5)] for _ in range(300)]
    scores = pd.DataFrame([question(i, row) for i, row in enumerate(answers)])
    wrong = scores[kinds(scores)["confident_and_wrong"]]
    assert len(wrong) > 10
    for name in ESTIMATORS:
        assert wrong[f"semantic_entropy_{name}"].max() <= most_entropy(5, name) + 1e-9
    assert wrong["semantic_entropy_discrete"].max() == pytest.approx(most_entropy(5, "discrete"))


def test_examples_are_of_each_sort_and_none_comes_twice():
    scores = pd.concat([table()] * 20, ignore_index=True)
    chosen = choose(scores, "discrete")
    assert list(chosen) == ["Confident and wrong", "Lowest entropy", "Median entropy", "Highest entropy"]
    rows = [row for group in chosen.values() for row in group]
    assert len(rows) == len(set(rows)) == 4 * EXAMPLES
    entropy = scores["semantic_entropy_discrete"]
    assert entropy[chosen["Lowest entropy"]].max() == entropy.min()
    assert entropy[chosen["Median entropy"]].tolist() == pytest.approx([entropy.median()] * EXAMPLES)
    assert entropy[chosen["Highest entropy"]].min() == entropy.max()
    assert kinds(scores)["confident_and_wrong"][chosen["Confident and wrong"]].all()


def example_of(record):
    (examples,) = data_of(page_of(pd.DataFrame([record]), Curriculum(stages=1)))["examples"].values()
    return examples[0]


def test_clusters_are_shown_largest_first_and_unparsable_ones_last():
    shown = example_of(question(0, [None, "3", "1", None, "0.5", "1/2"], gold="1/2", cluster=[0, 1, 2, 3, 4, 4]))
    keys = ("answer", "count", "right", "clusters", "others")
    assert [tuple(group[key] for key in keys) for group in shown["clusters"]] == [
        ("0.5", 2, 1, 1, ["1/2"]),
        ("3", 1, 0, 1, []),
        ("1", 1, 0, 1, []),
        (None, 2, 0, 2, []),
    ]


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_an_answer_that_is_none_is_unparsable(nothing):
    record = question(0, [None] * 4)
    shown = example_of({**record, "answers": [nothing] * 4})
    assert [(group["answer"], group["count"]) for group in shown["clusters"]] == [(None, 4)]
    assert [group["answer"] for group in example_of(question(0, ["nan"] * 4))["clusters"]] == ["nan"]


def test_many_clusters_are_counted_not_listed():
    shown = example_of(question(0, [str(i) for i in range(64)]))
    assert len(shown["clusters"]) + shown["more"] == 64
    assert shown["more"] == shown["more_samples"] > 0


def test_long_texts_are_cut():
    record = question(0, ["9" * 100_000] * 4, gold="g" * 100_000, question="q" * 100_000)
    page = page_of(pd.DataFrame([record]), Curriculum(stages=1))
    assert len(page) < 60_000
    assert data_of(page)["examples"]["Confident and wrong"][0]["question"].endswith("… (100,000 characters)")


def test_the_page_does_not_grow_with_the_questions():
    scores = table()
    many = pd.concat([scores] * 2000, ignore_index=True).assign(uid=[f"q{i}" for i in range(12_000)])
    assert len(page_of(many)) < 64_000


def test_a_question_without_an_estimate_is_counted_apart():
    scores = table()
    scores.loc[2, "semantic_entropy_likelihood"] = math.nan
    estimate = data_of(page_of(scores))["estimates"]["likelihood"]
    assert estimate["missing"] == 1
    assert np.sum(estimate["bins"]) == sum(cell[2] for cell in estimate["cells"]) == 5
    assert data_of(report_page(scores, Curriculum(estimator="likelihood"), [], MANIFEST))["examples"]


def test_a_report_that_cannot_be_written_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Set output\."):
        write_report(table(), Curriculum(), cut(table(), Curriculum()), MANIFEST, tmp_path / "file" / "scores.html")


def shown(page, tmp_path, estimator=""):
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    return opened(path, estimator, tmp_path).split("<script>")[0]


def tiles(dom):
    figures = re.findall(r'<div class="[^"]*"><b>([^<]*)</b><span>([^<]*)</span>', dom)
    return {name: value.replace("&nbsp;", " ") for value, name in figures}


@browser
def test_the_page_shows_figures_bars_and_boundaries(tmp_path):
    write_report(table(), Curriculum(), cut(table(), Curriculum()), MANIFEST, tmp_path / "deep" / "page.html")
    dom = shown((tmp_path / "deep" / "page.html").read_text(encoding="utf-8"), tmp_path)
    assert tiles(dom) == {
        "questions": "6",
        "mean entropy": "0.592",
        "agreed": "33.3 %",
        "pass rate": "41.7 %",
        "majority right": "66.7 %",
        "all right": "1",
        "all wrong": "2",
        "confident and wrong": "2",
        "unparsable": "16.7 %",
        "truncated": "4.2 %",
    }
    assert dom.count('class="boundary"') == 2, "one in each picture"
    assert "stage 1 | 2</text>" in dom
    assert dom.count("<rect x=") == 5, "four bins, one of two stages"
    assert dom.count('class="bubble wrong"') == 2
    assert dom.count("<article>") == 6
    assert "Embedded(seed=1)" in dom


@browser
def test_the_address_chooses_the_estimator(tmp_path):
    dom = shown(page_of(table()), tmp_path, "likelihood")
    assert tiles(dom)["mean entropy"] == f"{table()['semantic_entropy_likelihood'].mean():.3f}"
    assert 'class="boundary"' not in dom
    assert "They overlap in this estimate" in dom


@browser
def test_what_the_model_wrote_is_never_read_as_markup(tmp_path):
    hostile = question(0, [HOSTILE, None, HOSTILE, "</b>"], gold=HOSTILE, question=HOSTILE, uid=HOSTILE)
    scores = pd.DataFrame([hostile])
    page = report_page(scores, Curriculum(stages=1), [np.array([0])], {HOSTILE: HOSTILE})
    assert page.count("</script>") == 1
    dom = shown(page, tmp_path)
    assert "<title>Semantic entropy of questions</title>" in dom
    assert "<b>bold" not in dom
    assert dom.count("&lt;b&gt;bold&lt;/b&gt; \"'`${1}` שלום 🧮") == 6, "question, gold, uid, answer, manifest twice"


@browser
@pytest.mark.parametrize("stages", [0, 1, 3])
def test_questions_that_all_agree_still_make_a_page(tmp_path, stages):
    scores = pd.DataFrame([question(i, ["1"] * 4) for i in range(stages or 1)])
    curriculum = Curriculum(stages=stages or 1)
    page = report_page(scores, curriculum, cut(scores, curriculum) if stages else [], MANIFEST)
    dom = shown(page, tmp_path)
    assert tiles(dom)["agreed"] == "100 %"
    assert dom.count("<article>") == max(stages, 1)
    assert dom.count('class="boundary"') == (2 if stages == 3 else 0)
    assert ("stage 1 | 2 | 3</text>" in dom) == (stages == 3)
    assert "NaN" not in dom
