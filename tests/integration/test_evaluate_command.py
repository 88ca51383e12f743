"""`evaluate` from the command line: runs and checkpoints, kill and resume, errors."""

import json
import signal
import time

import pytest
import yaml
from support import ROOT, start_warm, write_benchmark

from lightning_rlvr.__main__ import main
from lightning_rlvr.evaluation.benchmark import read_benchmarks
from lightning_rlvr.evaluation.command import command_line


def write_config(path, **settings):
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return ["evaluate", "--config", str(path)]


def embedded(**settings):
    teacher = {"class_path": "lightning_rlvr.tasks.WorkedChainSum"}
    size = {"hidden_size": 32, "layers": 1, "heads": 2, "steps": 4}
    return {"class_path": "lightning_rlvr.models.Embedded", "init_args": {"teacher": teacher, **size, **settings}}


def kept(folder):
    found = sorted(p for p in folder.rglob("*") if p.suffix in (".parquet", ".json", ".md", ".csv") and p.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_run_and_its_checkpoint_score_what_fit_said(finished_run, tmp_path, capsys):
    """The export and the last checkpoint are one policy, and sample what the run's own validation did."""
    command = write_config(
        tmp_path / "eval.yaml",
        output=str(tmp_path / "out"),
        models={"export": str(finished_run), "checkpoint": str(finished_run / "checkpoints" / "last.ckpt")},
        benchmarks=[write_benchmark(tmp_path / "val.yaml", 4)],
        samples=2,
        sampling={"max_new_tokens": 6},
        ks=[1, 2],
        resamples=20,
        device="cpu",
    )
    main(command)
    assert "## checkpoint - export" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    gains = results["differences_to_first"]["checkpoint"]["val"]
    assert {(gain["value"], gain["not_better"]) for gain in gains.values()} == {(0.0, 1.0)}
    summary = json.loads((finished_run / "summary.json").read_text())
    after, mine = summary["after"], results["responses"]["export"]["val"]
    assert results["results"]["export"]["val"]["avg@2"]["value"] == pytest.approx(after["val/avg@2"])
    assert mine["entropy"] == pytest.approx(after["val/entropy"], rel=1e-5)
    assert mine["length"] == pytest.approx(after["val/response_length"])


def test_kill_9_loses_and_repeats_nothing(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("LIGHTNING_RLVR_CACHE", str(cache))
    command = write_config(
        tmp_path / "eval.yaml",
        output=str(tmp_path / "whole"),
        models={"one": embedded(), "two": embedded(seed=2)},
        benchmarks=[write_benchmark(tmp_path / "a.yaml", 24), write_benchmark(tmp_path / "b.yaml", 8, start=50)],
        samples=4,
        sampling={"max_new_tokens": 30},
        resamples=20,
        prompts_per_batch=1,
        device="cpu",
    )
    main(command)
    again = [*command, "--output", str(tmp_path / "cut")]
    process = start_warm(again, tmp_path / "log", {"LIGHTNING_RLVR_CACHE": str(cache)})
    parts = tmp_path / "cut" / "samples" / "one" / "a.parquet.parts"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("0*.parquet"))) < 3 and time.monotonic() < deadline and process.is_alive():
        time.sleep(0.005)
    process.kill()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    done = list(parts.glob("0*.parquet"))
    assert 3 <= len(done) < 24, "killed in the midst of sampling"
    main(again)
    assert kept(tmp_path / "cut") == kept(tmp_path / "whole")


def test_a_folder_is_measured_anew_with_its_settings(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("LIGHTNING_RLVR_CACHE", str(cache))
    output = tmp_path / "out"
    command = write_config(
        tmp_path / "eval.yaml",
        output=str(output),
        models={"small": embedded()},
        benchmarks=[write_benchmark(tmp_path / "a.yaml", 3)],
        samples=4,
        sampling={"max_new_tokens": 6},
        ks=[2],
        level=0.5,
        resamples=30,
        device="cpu",
    )
    main(command)
    before = kept(output)
    main(["evaluate", "--output", str(output)])
    assert kept(output) == before
    main(["evaluate", f"--output={output}", "--ks", "[1, 4]"])
    results = json.loads((output / "results.json").read_text())
    assert list(results["results"]["small"]["a"]) == ["pass@1", "pass@4", "avg@4", "maj@1", "maj@4"]
    assert results["bootstrap"] == {"level": 0.5, "resamples": 30, "seed": 1}
    main(["evaluate", "--config", str(output / "config.yaml")])
    assert kept(output) == before
    with pytest.raises(SystemExit):
        main([*command, "--seed", "2"])  # refused: the samples are of seed 1
    main(["evaluate", "--output", str(output)])
    assert kept(output) == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ks", "[8]", "--samples", "4"], "ks must be numbers in [1, samples]"),
        (["--benchmarks", "[none.yaml]"], "no such file"),
        (["--models.x", "some.ckpt"], "a checkpoint must be a file"),
        (["--sampling.top_p", "2"], "top_p must be in (0, 1]"),
        (["--sample", "3"], "--sample"),  # not taken for --samples
        (["--seed", "x"], "seed"),
    ],
)
def test_errors_are_one_message_and_status_2(tmp_path, flags, said, capsys):
    command = write_config(
        tmp_path / "eval.yaml",
        output=str(tmp_path / "out"),
        models={"small": embedded()},
        benchmarks=[write_benchmark(tmp_path / "a.yaml", 3)],
    )
    with pytest.raises(SystemExit) as exit_:
        main([*command, *flags])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("error: ")
    assert said in error
    assert not (tmp_path / "out" / "samples").exists()


@pytest.mark.parametrize("config", sorted((ROOT / "configs" / "evaluate").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_parses_and_names_benchmarks_that_exist(config, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = command_line().parse_args(["--config", str(config)])
    assert len(read_benchmarks(settings.benchmarks)) == len(settings.benchmarks)
    assert max(settings.ks) <= settings.samples


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", "--help"])
    assert exit_.value.code == 0
    assert "--benchmarks" in capsys.readouterr().out
