"""validate, test, predict and score."""

import json

import pandas as pd
import pytest
from support import arguments


def test_test_judges_a_checkpoint(cli, tmp_path, finished_run):
    run = cli("test", tmp_path / "test", ckpt_path=finished_run / "checkpoints" / "last.ckpt")
    after = json.loads((finished_run / "summary.json").read_text())["after"]
    tested = pd.read_csv(run / "metrics.csv").iloc[-1]
    assert tested["test/avg@2"] == pytest.approx(after["val/avg@2"])
    assert tested["test/entropy"] == pytest.approx(after["val/entropy"], rel=1e-5)


def test_validate_judges_an_exported_model(tmp_path, finished_run, capsys):
    from lightning_rlvr.__main__ import main

    flags = arguments("validate", tmp_path / "validate")
    kept = [(k, v) for k, v in zip(flags[5::2], flags[6::2], strict=True) if "policy" not in k]
    policy = ["--model.policy", "lightning_rlvr.models.Pretrained", "--model.policy.init_args.name"]
    main([*flags[:5], *policy, str(finished_run / "policy"), *(text for pair in kept for text in pair)])
    after = json.loads((finished_run / "summary.json").read_text())["after"]
    seen = pd.read_csv(tmp_path / "validate" / "metrics.csv").iloc[-1]
    assert seen["val/avg@2"] == pytest.approx(after["val/avg@2"])


def test_predict_writes_every_generation(cli, tmp_path, capsys):
    run = cli("predict", tmp_path / "predict")
    records = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(records) == 4 * 2
    assert not list(run.glob(".*.partial"))
    assert f"predictions: {run.resolve() / 'predictions.jsonl'}\n" in capsys.readouterr().out
    assert {"uid", "prompt", "gold", "response", "answer", "status", "reward", "tokens"} <= records[0].keys()


def test_score_writes_scores_that_fit_reads(cli, tmp_path):
    file = tmp_path / "scores.parquet"
    cli("score", tmp_path / "score", output=file)
    scores = pd.read_parquet(file)
    assert len(scores) == 16
    assert (scores["clusters"] <= 2).all()
    cli("fit", tmp_path / "fit", data__scoring__file=file, trainer__max_steps=1)


def test_scores_of_another_model_are_refused_with_what_differs(cli, tmp_path, capsys):
    file = tmp_path / "scores.parquet"
    cli("score", tmp_path / "score", output=file)
    with pytest.raises(SystemExit, match="2"):
        cli("fit", tmp_path / "fit", data__scoring__file=file, model__policy__init_args__steps=3)
    error = capsys.readouterr().err
    assert "policy" in error
    assert "data.scoring.file" in error
    assert "max_new_tokens" not in error


def test_score_does_not_overwrite(cli, tmp_path, capsys):
    file = tmp_path / "scores.parquet"
    file.write_text("precious")
    with pytest.raises(SystemExit, match="2"):
        cli("score", tmp_path / "score", output=file)
    assert file.read_text() == "precious"
    assert "output" in capsys.readouterr().err
