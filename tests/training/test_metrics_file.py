"""metrics.csv as it is written, cut and gone on with."""

import pandas as pd
import pytest

from lightning_rlvr.training.callbacks.run_folder import cut, hold
from lightning_rlvr.training.metrics_file import MetricsFile
from lightning_rlvr.types import UserError


def test_a_file_that_is_cut_and_gone_on_with_is_the_one_written_in_one_go(tmp_path):
    rows = [({"a": 1.5}, 0), ({"b": 2.0}, 0), ({"a": 0.1, "c": 3}, 1), ({"a": float("nan")}, 2)]
    for name, parts in {"whole": [rows], "cut": [rows[:3], rows[1:]]}.items():
        for number, part in enumerate(parts):
            if number:
                cut(tmp_path / name / "metrics.csv", 2)  # its head and a row
            logger = MetricsFile(tmp_path / name)
            for metrics, step in part:
                logger.log_metrics(metrics, step)
    whole = tmp_path / "whole" / "metrics.csv"
    assert whole.read_bytes() == (tmp_path / "cut" / "metrics.csv").read_bytes()
    assert pd.read_csv(whole)["step"].tolist() == [0, 0, 1, 2]


def test_lines_that_were_removed_are_warned_of(tmp_path):
    (tmp_path / "log").write_text("1\n2\n")
    with pytest.warns(UserWarning, match="has 2 lines where the checkpoint counts 3"):
        cut(tmp_path / "log", 3)
    cut(tmp_path / "log", 0)
    assert not (tmp_path / "log").exists()


def test_a_folder_is_held_by_one_process(tmp_path):
    held = hold(tmp_path)
    with pytest.raises(UserError, match="another process is at work"):
        hold(tmp_path)
    held.close()
    hold(tmp_path).close()
