"""Runs as jobs, by submitit's executor for this machine."""

import builtins
import json

import pytest

from lightning_rlvr.types import UserError

JOBS = {"submit": "local", "submit_parameters": {"timeout_min": 2}}


def test_every_run_is_a_job(run_sweep, tmp_path):
    out = tmp_path / "out"
    assert run_sweep(JOBS, seeds=[1])
    records = [json.loads(path.read_text()) for path in out.glob("*/seed-*.json")]
    assert [record["exit"] for record in records] == [0, 0]
    assert len(list((out / ".jobs").glob("*_result.pkl"))) == 2
    assert run_sweep(JOBS, seeds=[1])
    assert len(list((out / ".jobs").glob("*_result.pkl"))) == 2


def test_a_job_that_fails_is_a_run_that_failed(run_sweep, tmp_path, capsys):
    assert not run_sweep(JOBS, variants={"bad": {"behave": "fail"}}, seeds=[1])
    assert "nothing works" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "bad" / "seed-1.json").read_text())["exit"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"submit": "local"}, "time limit in minutes"),
        ({"submit": "local", "submit_parameters": {"timeout_min": 2, "slurm_ntasks_per_node": 4}}, "must be 1, got 4"),
        ({"submit": "nowhere", "submit_parameters": {"timeout_min": 2}}, "submitit refuses.*nowhere"),
        ({"submit": "local", "submit_parameters": {"timeout_min": 2, "slurm_nix": 1}}, "submitit refuses.*nix"),
    ],
)
def test_what_submitit_needs_is_said(run_sweep, options, message):
    with pytest.raises(UserError, match=message):
        run_sweep(options)


def test_without_submitit_one_is_told_how_to_get_it(run_sweep, monkeypatch):
    real = builtins.__import__

    def no_submitit(name, *args, **kwargs):
        if name == "submitit":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_submitit)
    with pytest.raises(UserError, match=r"pip install 'lightning_rlvr\[slurm\]'"):
        run_sweep(JOBS)
