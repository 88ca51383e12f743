"""What is shown of a sweep."""

import io
import json

import pytest
from rich.console import Console

from lightning_rlvr.sweep import process
from lightning_rlvr.sweep.board import Board, Pace
from lightning_rlvr.sweep.experiment import read_experiment


@pytest.fixture
def board(write, setup_of, tmp_path):
    """Return a function that shows four runs: one finished, one under way, one failed, one waiting."""
    runs = read_experiment(write()).runs(tmp_path / "out")
    for run in runs[:2]:
        process.execute(run, setup_of(tmp_path / "out"))
    states = dict(zip(runs, ("finished", "running", "failed", "waiting"), strict=True))

    def board(terminal):
        return runs, Board(runs, states, Console(file=io.StringIO(), force_terminal=terminal, width=200))

    return board


def text(board):
    board._console.print(board.table())
    return board._console.file.getvalue()


def test_the_table_has_a_row_for_each_variant_and_a_column_for_each_seed(board):
    shown = text(board(False)[1])
    one, two = (next(line for line in shown.splitlines() if name in line) for name in ("one", "two"))
    assert "seed 1" in shown
    assert "0.500" in one
    assert "2/3 0.500" in one
    assert "failed" in two
    assert "waiting" in two
    assert " ".join(shown.split("┏")[0].split()) == "1 of 4 finished, 1 running, 1 failed, 1 waiting, about 1:24 left"


def test_where_there_is_no_terminal_each_change_is_a_line(board):
    runs, shown = board(False)
    with shown:
        shown.now(runs[1], "finished")
        shown.now(runs[3], "running")
    assert shown._console.file.getvalue().splitlines() == [
        "one/seed-2 finished in 42 s 0.500 (2 of 4 finished, 1 failed, 1 waiting)",
        "two/seed-2 running (2 of 4 finished, 1 running, 1 failed)",
    ]


def test_in_a_terminal_the_table_is_drawn_over(board):
    runs, shown = board(True)
    with shown:
        shown.now(runs[3], "running")
    assert shown._console.file.getvalue().count("variant") >= 2


def test_a_run_that_has_not_begun_to_train_is_starting(board):
    runs, shown = board(False)
    (runs[1].folder / "curriculum.json").unlink()
    assert "starting" in text(shown)


def test_the_time_left_counts_from_the_first_step_seen():
    pace = Pace()
    assert pace.left(0, 10, now=0.0) is None
    assert pace.left(4, 10, now=60.0) is None
    assert pace.left(5, 10, now=61.0) == pytest.approx(5.0)
    assert pace.left(5, 10, now=100.0) == pytest.approx(5.0), "between two steps it does not climb"
    assert pace.left(7, None, now=101.0) is None


def test_steps_that_take_several_updates_are_counted_once(board):
    from lightning_rlvr.sweep.state import planned

    runs, _ = board(False)
    config = {"trainer": {"max_epochs": 2, "max_steps": 5}, "model": {"updates_per_rollout": 2}}
    (runs[0].folder / "config.yaml").write_text(json.dumps(config))
    assert planned(runs[0]) == 3
