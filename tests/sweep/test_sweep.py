"""Sweeps with a stand-in for `fit`: what is done, left alone, refused, stopped and taken up again."""

import json
import os
import signal
import threading
import time

import pytest

from lightning_rlvr.sweep import executors, process, state
from lightning_rlvr.sweep.experiment import read_experiment
from lightning_rlvr.training.callbacks import summary
from lightning_rlvr.types import UserError

LINGER = {"one": {"behave": "linger"}, "two": {}}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def records(out):
    """The records of all runs; a run that is started again has a new one."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("*/seed-*.json"))}


def soon(true):
    """Wait for something to become true."""
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def when(true, do):
    """Do something in a thread once something is true."""
    thread = threading.Thread(target=lambda: (soon(true), do()))
    thread.start()
    return thread


def test_all_runs_are_done_once(run_sweep, out):
    assert run_sweep()
    first = records(out)
    assert len(first) == 4
    assert all(json.loads(record)["exit"] == 0 for record in first.values())
    assert run_sweep()
    assert records(out) == first


def test_in_a_slurm_job_a_run_starts_its_processes_itself(run_sweep, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert run_sweep(seeds=[1], variants={"one": {}})


def test_a_new_seed_joins_a_finished_sweep(run_sweep, out):
    assert run_sweep(seeds=[1])
    first = records(out)
    assert run_sweep(seeds=[1, 5])
    assert set(records(out)) == {"one/seed-1.json", "one/seed-5.json", "two/seed-1.json", "two/seed-5.json"}
    assert all(records(out)[name] == record for name, record in first.items())


def test_the_manifest_holds_what_repeats_a_run(run_sweep, out):
    run_sweep({"threads": 2})
    manifest = json.loads((out / "sweep.json").read_text())
    assert manifest["environment"]["OMP_NUM_THREADS"] == "2"
    assert manifest["environment"]["LIGHTNING_RLVR_CACHE"].endswith("threads-2")
    assert manifest["commands"]["two/seed-2"][-3:] == ["--lr=0.1", "--seed_everything=2", f"--run_dir={out}/two/seed-2"]
    assert manifest["experiment"]["seeds"] == manifest["seeds"] == [1, 2]
    assert {"python", "torch", "lightning_rlvr"} <= set(manifest["versions"])


def test_a_failed_run_is_reported_and_done_again_on_request(run_sweep, out, capsys):
    failing = {"variants": {"one": {}, "two": {"behave": "fail"}}, "seeds": [1]}
    assert not run_sweep(**failing)
    said = capsys.readouterr().out
    assert "two/seed-1 failed" in said
    assert "\nprogress 2\nat work\nnothing works\n" in said
    assert "progress 1" not in said, "a bar is shown as it was left"
    assert "--retry" in said
    before = records(out)
    assert not run_sweep(**failing)
    assert records(out) == before
    (out / "mended").touch()
    assert run_sweep({"retry": True}, **failing)
    assert records(out)["one/seed-1.json"] == before["one/seed-1.json"]
    assert (out / "two" / "seed-1" / "begun").read_text() == "newagain"
    assert (out / "two" / "seed-1.log").read_text().count("at work") == 2, "the log goes on too"
    assert not (out / ".unfinished").exists()


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"threads": 2}, {}, "threads: the file has 1, this run 2"),
        ({}, {"overrides": {"size": 3}}, "size=3"),
    ],
)
def test_a_run_made_otherwise_is_refused(run_sweep, out, options, changes, message):
    run_sweep()
    before = records(out)
    with pytest.raises(UserError, match=message):
        run_sweep(options, **changes)
    assert records(out) == before


def test_other_versions_are_refused(run_sweep, monkeypatch):
    run_sweep()
    monkeypatch.setattr(summary, "version", lambda name: "0.0")
    with pytest.raises(UserError, match=r"versions\.torch"):
        run_sweep()


def test_a_folder_of_something_else_is_refused(run_sweep, out):
    (out / "one" / "seed-1").mkdir(parents=True)
    (out / "one" / "seed-1" / "precious").touch()
    with pytest.raises(UserError, match="must be free or a run of this sweep"):
        run_sweep()


def test_a_dry_run_prints_what_is_left_to_do(run_sweep, out, capsys):
    run_sweep(seeds=[1])
    capsys.readouterr()
    run_sweep({"dry_run": True})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("--run_dir=")[1] for line in lines] == [f"{out}/one/seed-2", f"{out}/two/seed-2"]
    assert lines[0].startswith("OMP_NUM_THREADS=1 ")
    assert len(records(out)) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_stops_the_runs_and_they_go_on_later(run_sweep, out, number):
    at_work = out / "one" / "seed-1" / "metrics.csv"
    thread = when(at_work.exists, lambda: os.kill(os.getpid(), number))
    assert not run_sweep(variants=LINGER)
    thread.join()
    assert json.loads((out / "one" / "seed-1" / "summary.json").read_text())["status"] == "interrupted"
    assert json.loads((out / "one" / "seed-1.json").read_text())["exit"] is None
    assert not (out / "two").exists(), "nothing is started any more"
    (out / "go").touch()
    assert run_sweep(variants=LINGER)
    assert (out / "one" / "seed-1" / "begun").read_text() == "newagain"
    assert (out / "two" / "seed-1" / "begun").read_text() == "new"


def test_a_run_that_was_cut_off_and_is_made_otherwise_now_starts_anew(run_sweep, out, tmp_path):
    at_work = out / "one" / "seed-1" / "metrics.csv"
    thread = when(at_work.exists, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert not run_sweep(variants=LINGER, seeds=[1])
    thread.join()
    (out / "go").touch()
    assert run_sweep({"threads": 2}, variants=LINGER, seeds=[1])
    assert (out / "one" / "seed-1" / "begun").read_text() == "new"
    assert (out / ".unfinished" / "one-seed-1-1" / "seed-1" / "summary.json").exists()


def test_asked_twice_runs_are_killed(run_sweep, out):
    deaf = {"one": {"behave": "deaf"}}
    path = out / "one" / "seed-1" / "metrics.csv"

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = when(path.exists, twice)
    assert not run_sweep(variants=deaf, seeds=[1])
    thread.join()
    assert not (path.parent / "summary.json").exists()


def test_runs_that_outlive_a_killed_sweep_are_waited_for(run_sweep, setup_of, write, out):
    path = write(variants=LINGER)
    plan = read_experiment(path)
    run = plan.runs(out)[0]
    left = process.start(run, setup_of(out))
    soon((run.folder / "metrics.csv").exists)
    with pytest.raises(BlockingIOError):
        process.start(run, setup_of(out))
    thread = when((out / "sweep.json").exists, (out / "go").touch)
    assert run_sweep(variants=LINGER)
    thread.join()
    assert left.wait() == 0
    assert not (out / ".unfinished").exists()


def test_two_sweeps_do_not_share_a_folder(run_sweep, out):
    at_work = out / "one" / "seed-1" / "metrics.csv"
    errors = []

    def second():
        with pytest.raises(UserError, match="another sweep is at work") as refused:
            run_sweep(variants=LINGER)
        errors.append(refused.value)
        (out / "go").touch()

    thread = when(at_work.exists, second)
    run_sweep(variants=LINGER)
    thread.join()
    assert errors


def test_configs_must_not_change_while_a_sweep_runs(write, setup_of, out, tmp_path):
    plan = read_experiment(write())
    setup = setup_of(out, configs={path: path.read_text() for path in plan.files()})
    (tmp_path / "base.yaml").write_text("a: 2\n")
    with pytest.raises(UserError, match=r"base\.yaml has changed"):
        process.start(plan.runs(out)[0], setup)


@pytest.mark.parametrize(("options", "message"), [({"threads": 0}, "threads must"), ({"memory": 0.0}, "memory must")])
def test_impossible_bounds_are_refused(run_sweep, options, message):
    with pytest.raises(UserError, match=message):
        run_sweep(options)


@pytest.mark.parametrize(
    ("cores", "threads", "memory", "at_a_time"),
    [(4, 1, 8.0, 4), (4, 2, 8.0, 2), (4, 8, 8.0, 1), (4, 1, 2.5, 2), (4, 1, 0.5, 1)],
)
def test_cores_and_memory_bound_the_runs_at_a_time(
    write, setup_of, out, monkeypatch, cores, threads, memory, at_a_time
):
    monkeypatch.setattr(executors, "cores", lambda: cores)
    monkeypatch.setattr(executors, "start", lambda run, setup: None)
    runs = read_experiment(write(seeds=list(range(8)))).runs(out)
    local = executors.Local(runs, setup_of(out, threads), memory)
    local.start(runs[0])
    assert not local.room(), "nobody knows yet what a run needs"
    finished(runs[0], peak=2**30)
    count = 1
    while local.room():
        local.start(runs[count])
        count += 1
    assert count == at_a_time


def finished(run, peak):
    """Leave what a finished run leaves."""
    run.folder.mkdir(parents=True)
    state.write_json(state.beside(run, "json"), {"exit": 0})
    state.write_json(run.folder / "summary.json", {"status": "finished", "peak_memory_bytes": peak})
