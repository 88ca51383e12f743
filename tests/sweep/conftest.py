"""Experiments whose runs are done by a stand-in for `fit`."""

import sys
from pathlib import Path

import pytest
import yaml

from lightning_rlvr.sweep import command, process

FAKE = Path(__file__).with_name("fake_fit.py")


@pytest.fixture
def resolve():
    """Return the config that the stand-in writes."""

    def resolve(arguments):
        trainer = {"max_epochs": 1, "max_steps": -1}
        return {"arguments": list(arguments), "trainer": trainer, "model": {"updates_per_rollout": 1}}

    return resolve


@pytest.fixture
def write(tmp_path):
    """Write an experiment file, from what differs from one of two variants with two seeds."""

    def write(**changes):
        (tmp_path / "base.yaml").write_text("a: 1\n")
        contents = {"base": "base.yaml", "variants": {"one": {}, "two": {"lr": 0.1}}, "seeds": [1, 2], **changes}
        path = tmp_path / "trial.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in contents.items() if v is not None}, sort_keys=False))
        return path

    return write


@pytest.fixture
def setup_of(monkeypatch):
    """Return what the runs of a sweep have in common."""
    monkeypatch.setattr(process, "PROGRAM", (sys.executable, str(FAKE)))

    def setup_of(out, threads=1, configs=None):
        return process.Setup(out, threads, configs or {}, None, out / "cache", command.versions())

    return setup_of


@pytest.fixture
def run_sweep(write, resolve, tmp_path, monkeypatch):
    """Sweep an experiment, given what differs from the usual one, into tmp_path / "out"."""
    monkeypatch.setattr(process, "PROGRAM", (sys.executable, str(FAKE)))
    monkeypatch.setattr(command, "POLL", 0.02)
    (tmp_path / "out").mkdir()

    def run_sweep(options=None, **changes):
        return command.sweep(write(**changes), resolve, tmp_path / "out", **(options or {}))

    return run_sweep
