import json
import sys
import time

import pytest

from lightning_rlvr.tasks import HubDataset
from lightning_rlvr.types import UserError

ROWS = [{"question": f"{i} + 1?", "answer": f"so\n#### {i + 1}"} for i in range(4)]
PATTERN = "#### (.+)$"


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    module = pytest.importorskip("datasets")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    module.disable_progress_bars()
    return module


def test_load_dataset(datasets, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = HubDataset("json", options={"data_files": str(path)}, answer_pattern=PATTERN, rows=(1, 3))
    assert [(p.uid, p.text, p.answer) for p in task.load()] == [
        ("json:train:1", "1 + 1?", "2"),
        ("json:train:2", "2 + 1?", "3"),
    ]


def test_a_saved_folder_with_and_without_splits(datasets, tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "splits"))
    one = HubDataset(str(tmp_path / "one"), answer_pattern=PATTERN).load()
    splits = HubDataset(str(tmp_path / "splits"), split="test", answer_pattern=PATTERN).load()
    assert [p.answer for p in one] == [p.answer for p in splits] == ["1", "2", "3", "4"]
    with pytest.raises(UserError, match=r"got 'train': it has test"):
        HubDataset(str(tmp_path / "splits")).load()


def test_a_folder_of_files(datasets, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "train.json").write_text(json.dumps(ROWS))
    assert len(HubDataset(str(tmp_path / "plain"), split="train[:2]").load()) == 2
    with pytest.raises(UserError, match=r"split 'test'.*Set the task's name, config, split"):
        HubDataset(str(tmp_path / "plain"), split="test").load()


def test_columns_are_checked_as_in_files(datasets, tmp_path):
    datasets.Dataset.from_list([{"problem": "q", "answer": "1"}]).save_to_disk(str(tmp_path / "one"))
    with pytest.raises(UserError, match=r"question_column must name a column, got 'question': .*has problem, answer"):
        HubDataset(str(tmp_path / "one")).load()


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install lightning_rlvr\[datasets\]"):
        HubDataset("openai/gsm8k").load()


def test_an_unreachable_hub_is_told_quickly(datasets, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"must be within reach, got 'openai/gsm8k'.*Set the task's name"):
        HubDataset("openai/gsm8k", config="main").load()
    assert time.monotonic() - start < 15


def test_a_missing_set_names_the_keys(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="Set the task's name, config, split or options"):
        HubDataset("nobody/nothing").load()
