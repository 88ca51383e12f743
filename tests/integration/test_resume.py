"""A run that was cut off goes on as if nothing had happened, wherever that was, and with everything it had."""

import itertools
import json
import os
import shutil
import signal

import pytest
import torch
from lightning.pytorch.callbacks import Timer
from support import arguments

from benchmarks.kill import outcome
from lightning_rlvr.__main__ import main
from lightning_rlvr.training import RLVRModule
from lightning_rlvr.training.callbacks import ExportPolicy, SampleTable
from lightning_rlvr.training.metrics_file import MetricsFile

# Every piece of state matters: updates and batches, groups and re-orderings, schedule and coefficients.
ALL = {
    "model__objective": "lightning_rlvr.objectives.AdaptiveEntropy",
    "model__objective__init_args__target": 5,  # more than there is, so that the coefficient acts
    "model__reward": "support.Moody",
    "model__updates_per_rollout": 2,
    "model__dynamic_sampling": 2,
    "model__lr_scheduler": "{class_path: torch.optim.lr_scheduler.LinearLR, init_args: {total_iters: 20}}",
    "data__train__init_args__size": 10,
    "data__scoring__samples": 4,
    "data__curriculum__stages": 1,
    "data__curriculum__epochs": 2,
    "data__curriculum__adaptive": "{every: 1}",
    "trainer__val_check_interval": 3,
    "trainer__enable_progress_bar": "false",
}


class CrashError(Exception):
    """What ends a run in the tests."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """What the run left alone comes to."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_RLVR_CACHE", str(cache))
        main(arguments("score", folder / "score", output=folder / "scores.parquet", report=False, **ALL))
        patch.setitem(ALL, "data__scoring__file", folder / "scores.parquet")
        main(arguments("fit", folder / "run", **ALL))
        yield folder / "run"


def crash_at(patch, owner, name, number):
    """Have a method raise CrashError when it is called for the given time."""
    before, calls = getattr(owner, name), iter(range(1, 1000))

    def crashing(*args, **kwargs):
        if next(calls) == number:
            raise CrashError
        return before(*args, **kwargs)

    patch.setattr(owner, name, crashing)


def go_on(run, *more):
    main(["fit", "--config", str(run / "config.yaml"), "--ckpt_path", "last", *more])


def test_cut_off_anywhere_it_ends_as_the_run_left_alone(whole, cli, tmp_path, monkeypatch):
    run = tmp_path / "run"
    places = [
        (RLVRModule, "experience", 2),  # in the first step, groups collected: before any checkpoint
        (torch.optim.AdamW, "step", 4),  # between the two updates of the second step
        (MetricsFile, "log_metrics", 2),  # a step trained and not logged
        (SampleTable, "on_validation_end", 1),
        (torch, "save", 1),
        (ExportPolicy, "on_fit_end", 1),  # all is trained
    ]
    for number, place in enumerate(places):
        with monkeypatch.context() as patch:
            crash_at(patch, *place)
            with pytest.raises(CrashError):
                cli("fit", run, **ALL) if number == 0 else go_on(run)
    go_on(run)
    assert outcome(run) == outcome(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not list(run.glob("**/*.partial"))
    go_on(run)  # which has nothing left to do
    assert outcome(run) == outcome(whole)


@pytest.fixture(scope="module")
def half(whole, tmp_path_factory):
    """A run that was cut off in its midst."""
    run = tmp_path_factory.mktemp("half") / "run"
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, RLVRModule, "training_step", 4)
        with pytest.raises(CrashError):
            main(arguments("fit", run, **ALL))
    return run


def forget_moments(stored):
    stored["optimizer_states"][0]["state"] = {}


def forget_schedule(stored):
    stored["lr_schedulers"][0] |= {"last_epoch": 0, "_step_count": 1}


def forget_estimates(stored):
    sampler = stored["RLVRDataModule"]["sampler"]
    sampler["estimate"] = [0.0] * len(sampler["estimate"])


DROPPED = {
    "nothing": lambda stored: None,
    "moments": forget_moments,
    "schedule": forget_schedule,
    "coefficient": lambda stored: stored["objective_state"].update(entropy_coef=0.3),
    "rollouts done": lambda stored: stored.update(rollouts_done=stored["rollouts_done"] - 1),
    "random": lambda stored: stored.update(random=[]),
    "estimates": forget_estimates,
    "logs": lambda stored: stored.update(log_lines={**stored["log_lines"], "metrics.csv": 2}),
}


SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


@pytest.fixture
def queue(whole, tmp_path):
    """A Slurm job whose `scontrol` writes down what it is asked."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/queued\n')
    scontrol.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SLURM, "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}.items():
            patch.setenv(name, value)
        yield


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_preempted_saves_and_ends_as_if_it_had_not_been(number, queue, whole, tmp_path, monkeypatch):
    words = [*arguments("fit", tmp_path / "run", **ALL), "--ckpt_path", "last"]  # the same, begun or gone on with
    with monkeypatch.context() as patch:
        step, calls = RLVRModule.training_step, iter(range(1, 100))

        def asked(*args):
            if next(calls) == 3:
                os.kill(os.getpid(), number)
            return step(*args)

        patch.setattr(RLVRModule, "training_step", asked)
        with pytest.raises(SystemExit, match="143"):
            main(words)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
    assert (tmp_path / "queued").exists() == (number == signal.SIGUSR1)
    assert signal.getsignal(number) is signal.SIG_DFL
    main(words)
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_job_that_is_preempted_before_training_is_queued_again(queue, tmp_path, monkeypatch):
    def asked(*args):
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(RLVRModule, "validation_step", asked)
    with pytest.raises(SystemExit, match="143"):
        main(arguments("fit", tmp_path / "run", **ALL))
    assert (tmp_path / "queued").read_text() == "requeue 1234\n"
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


@pytest.mark.parametrize("piece", DROPPED)
def test_without_any_piece_of_its_state_it_ends_otherwise(piece, half, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(half, run)
    last = run / "checkpoints" / "last.ckpt"
    stored = torch.load(last, weights_only=True)
    DROPPED[piece](stored)
    torch.save(stored, last)
    (run / "checkpoints" / "previous.ckpt").unlink(missing_ok=True)
    go_on(run, "--run_dir", str(run))
    assert (outcome(run) == outcome(whole)) == (piece == "nothing")


def test_the_folder_of_another_config_or_of_no_run_is_refused(half, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    before = sorted(half.rglob("*"))
    for key, value in {"model.max_grad_norm": "2", "run_dir": str(tmp_path / "mine")}.items():
        with pytest.raises(SystemExit, match="2"):
            go_on(half, f"--{key}", value)
        assert key in capsys.readouterr().err
    assert sorted(half.rglob("*")) == before
    assert len(list((tmp_path / "mine").iterdir())) == 1


def test_time_that_is_up_ends_with_a_checkpoint_and_more_time_goes_on(cli, tmp_path, monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(Timer, "time_elapsed", lambda *_: next(seconds))
    shuffled = {"data__curriculum__order": "shuffled", "data__val": "null", "data__curriculum__epochs": 3}
    run = cli("fit", tmp_path / "run", trainer__max_time="00:00:00:05", **shuffled)
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["rollouts_done"] in range(1, 6)
    go_on(run, "--trainer.max_time", "null")
    assert len((run / "order.jsonl").read_text().splitlines()) == 12
    assert json.loads((run / "summary.json").read_text())["optimizer_steps"] == 12


def test_a_stop_while_groups_are_collected_waits_for_the_update_they_are_for(whole, tmp_path, monkeypatch):
    collected = []

    def asked(module, *args):
        out = step(module, *args)
        collected.append(module.groups.batches)
        module.trainer.should_stop |= collected[-1] > 0  # as a time limit does, whenever it is up
        return out

    alone, run = tmp_path / "alone", tmp_path / "run"
    settings = {**ALL, "data__val": "null"}  # the end of a run is validated, which draws random numbers
    main(arguments("fit", alone, **settings))
    with monkeypatch.context() as patch:
        step = RLVRModule.training_step
        patch.setattr(RLVRModule, "training_step", asked)
        main(arguments("fit", run, **settings))
    assert collected[-2:] == [1, 0]
    go_on(run)
    assert outcome(run) == outcome(alone)
    assert len(collected) < len((run / "order.jsonl").read_text().splitlines())
