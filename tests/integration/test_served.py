"""`evaluate` and `score` of a model that a real server runs, beside the same of its folder."""

import json

import pandas as pd
import pytest
import yaml
from support import serving, write_benchmark

from lightning_rlvr.__main__ import main
from lightning_rlvr.store import read_manifest


@pytest.fixture(scope="module")
def served(finished_run):
    """Serve the policy that a run exported; give the settings that name it."""
    folder = str(finished_run / "policy")
    with serving(finished_run / "policy") as url:
        yield {"url": url, "model": folder, "tokenizer_name": folder, "server": "transformers", "parallel": 2}


def test_a_served_model_is_evaluated_as_its_folder_is(served, finished_run, tmp_path):
    write_benchmark(tmp_path / "sums.yaml", 4)
    models = {
        "folder": str(finished_run / "policy"),
        "server": {"class_path": "lightning_rlvr.rollout.Served", "init_args": served},
    }
    config = {"output": str(tmp_path / "out"), "models": models, "benchmarks": [str(tmp_path / "sums.yaml")]}
    config |= {"samples": 1, "sampling": {"max_new_tokens": 6, "temperature": 0.0}, "ks": [1], "resamples": 20}
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(config))
    main(["evaluate", "--config", str(tmp_path / "evaluate.yaml")])
    of_folder, of_server = (
        pd.read_parquet(tmp_path / "out" / "samples" / name / "sums.parquet") for name in ("folder", "server")
    )
    pd.testing.assert_frame_equal(of_server, of_folder)
    config |= {"output": str(tmp_path / "drawn"), "sampling": {"max_new_tokens": 6}, "samples": 2}
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(config))
    main(["evaluate", "--config", str(tmp_path / "evaluate.yaml")])
    responses = json.loads((tmp_path / "drawn" / "results.json").read_text())["responses"]
    assert responses["folder"]["sums"]["entropy"] > 0
    assert responses["server"]["sums"]["entropy"] is None  # no server tells it
    assert "| server | sums |" in (tmp_path / "drawn" / "table.md").read_text()


def test_questions_are_scored_by_a_server(served, cli, tmp_path):
    settings = {"data__scoring__served": json.dumps(served), "output": tmp_path / "scores.parquet"}
    cli("score", tmp_path / "run", **settings)
    scores = pd.read_parquet(tmp_path / "scores.parquet")
    assert len(scores) == 16
    assert scores["semantic_entropy_discrete"].between(0, 0.7).all()
    assert scores[["semantic_entropy_likelihood", "mean_token_entropy"]].isna().all(axis=None)
    assert served["model"] in read_manifest(tmp_path / "scores.parquet")["served"]
    run = cli("fit", tmp_path / "fit", **{"data__scoring__file": tmp_path / "scores.parquet"}, **{
        "data__scoring__served": json.dumps(served), "trainer__max_steps": 1,
    })  # fmt: skip
    assert len((run / "order.jsonl").read_text().splitlines()) == 1
