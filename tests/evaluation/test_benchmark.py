"""Benchmark files."""

import pytest
import yaml
from support import ROOT, Counting

from lightning_rlvr.evaluation import Benchmark, read_benchmark
from lightning_rlvr.evaluation.benchmark import read_benchmarks
from lightning_rlvr.rewards import MathAnswer
from lightning_rlvr.tasks import HubDataset
from lightning_rlvr.tasks.template import Template
from lightning_rlvr.types import Reward, Task, UserError

SHIPPED = sorted((ROOT / "configs" / "benchmarks").glob("*.yaml"))
MATH = {"aime24", "aime25", "amc23", "gsm8k", "math500", "minerva", "olympiadbench"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_file_makes_a_benchmark_called_like_it(path):
    assert set(yaml.safe_load(path.read_text())) == {"name", "task", "reward"}
    benchmark = read_benchmark(path)
    assert benchmark.name == path.stem
    assert isinstance(benchmark.task, Task)
    assert isinstance(benchmark.reward, Reward)


def test_those_of_the_paper_are_there():
    assert {path.stem for path in SHIPPED} >= MATH
    for name in MATH:
        benchmark = read_benchmark(ROOT / "configs" / "benchmarks" / f"{name}.yaml")
        assert isinstance(benchmark.task, HubDataset)
        assert isinstance(benchmark.reward, MathAnswer)
        asked = benchmark.task._prompt(0, ROWS[name], Template.parse(benchmark.task.prompt_template))
        assert asked.text.startswith("Q?\n\n")
        assert asked.text.endswith(r"within \boxed{}.")
        assert asked.answer == GOLDS.get(name, "7")


# rows of our own in the columns of the hub's data sets
ROWS = {
    "aime24": {"id": 60, "problem": "Q?", "solution": "...", "answer": "7", "url": "", "year": "2024"},
    "aime25": {"problem": "Q?", "answer": "7", "id": "0"},
    "amc23": {"id": 0, "question": "Q?", "answer": "7", "url": ""},
    "gsm8k": {"question": "Q?", "answer": "3 + 4 = 7\n#### 7"},
    "math500": {
        "problem": "Q?",
        "solution": "...",
        "answer": "7",
        "subject": "",
        "level": 2,
        "unique_id": "test/7.json",
    },
    "minerva": {"question": "Q?", "answer": r"1.6 \times 10^{3}"},
    "olympiadbench": {
        "id": 1,
        "question": "Q?",
        "solution": ["..."],
        "final_answer": ["$2$"],
        "is_multiple_answer": False,
    },
}
GOLDS = {"minerva": r"1.6 \times 10^{3}", "olympiadbench": "$2$"}

SUMS = {
    "name": "sums",
    "task": {"class_path": "lightning_rlvr.tasks.ReasoningGym", "init_args": {"name": "chain_sum", "size": 2}},
    "reward": {"class_path": "lightning_rlvr.rewards.ExactMatch"},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": None}, "exactly the keys name, task and reward.*reward"),
        ({"extra": 1}, "exactly the keys name, task and reward.*extra"),
        ({"reward": {"class_path": "lightning_rlvr.rewards.Nothing"}}, "does not read as one"),
        ({"reward": {"class_path": "lightning_rlvr.tasks.Files"}}, "does not read as one"),
        (
            {"task": {"class_path": "lightning_rlvr.tasks.ReasoningGym", "init_args": {"name": "a", "size": 0}}},
            "size must be >= 1",
        ),
    ],
)
def test_what_is_no_benchmark(tmp_path, change, message):
    settings = {key: value for key, value in {**SUMS, **change}.items() if value is not None}
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=message) as caught:
        read_benchmark(tmp_path / "b.yaml")
    assert "b.yaml" in str(caught.value)


def test_a_missing_file_names_the_key(tmp_path):
    with pytest.raises(UserError, match=r"no such file .* Set benchmarks"):
        read_benchmark(tmp_path / "none.yaml")


def test_two_of_one_name_are_refused(tmp_path):
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text(yaml.safe_dump(SUMS))
    with pytest.raises(UserError, match=r"name of its own, got \['sums', 'sums'\]"):
        read_benchmarks([tmp_path / "a.yaml", tmp_path / "b.yaml"])
    with pytest.raises(UserError, match="at least one, each"):
        read_benchmarks([])


@pytest.mark.parametrize("name", ["average", "", " ", "..", ".hidden", "two\nlines"])
def test_names_that_tables_and_files_cannot_have_are_refused(tmp_path, name):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**SUMS, "name": name}))
    with pytest.raises(UserError, match=r"not 'average', got .* Set benchmarks"):
        read_benchmarks([tmp_path / "a.yaml"])


class Picky(Reward):
    """Judges no question but those of certain golds."""

    def __init__(self, *golds):
        self.golds = golds

    def unjudgeable(self, prompts):
        return [i for i, prompt in enumerate(prompts) if prompt.answer not in self.golds]

    def check(self, prompts):
        if self.unjudgeable(prompts):
            raise UserError("no such gold")

    def __call__(self, responses, prompts):
        raise AssertionError("judges nothing here")


def test_what_cannot_be_judged_is_an_error_or_dropped_and_counted():
    with pytest.raises(UserError, match=r"benchmark 'b': no such gold"):
        Benchmark("b", Counting(4), Picky("1", "3")).questions()
    with pytest.warns(UserWarning, match=r"'b': dropped 2 of 4 .* count:0, count:2"):
        kept = Benchmark("b", Counting(4), Picky("1", "3")).questions("drop")
    assert [prompt.answer for prompt in kept] == ["1", "3"]
    assert len(Benchmark("b", Counting(4), Picky("0", "1", "2", "3")).questions("drop")) == 4
    with pytest.raises(UserError, match="'b': the reward can judge none"):
        Benchmark("b", Counting(4), Picky()).questions("drop")
