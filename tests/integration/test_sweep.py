"""A sweep of real runs, and its report."""

import json

import pandas as pd
import pytest
import yaml
from support import QUICKSTART, ROOT, SMALL

from lightning_rlvr.__main__ import main


@pytest.fixture(scope="session")
def swept(tmp_path_factory):
    """A sweep of two cut-down runs that found nothing cached."""
    folder = tmp_path_factory.mktemp("sweep")
    overrides = {key: yaml.safe_load(value) if isinstance(value, str) else value for key, value in SMALL.items()}
    grpo = str(ROOT / "configs" / "objectives" / "grpo.yaml")
    variants = {"grpo": {"config": grpo}, "shuffled": {"data.curriculum": {"order": "shuffled", "stages": 1}}}
    experiment = {"base": str(QUICKSTART), "overrides": overrides, "variants": variants, "seeds": [3]}
    (folder / "trial.yaml").write_text(yaml.safe_dump(experiment))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_RLVR_CACHE", str(folder / "cache"))
        main(["sweep", str(folder / "trial.yaml"), "--output", str(folder / "out")])
    return folder


def test_each_run_is_what_its_variant_and_seed_say(swept):
    configs = {p.parts[-3]: yaml.safe_load(p.read_text()) for p in (swept / "out").glob("*/seed-3/config.yaml")}
    assert {name: config["model"]["seed"] for name, config in configs.items()} == {"grpo": 3, "shuffled": 3}
    assert configs["grpo"]["model"]["objective"]["class_path"].endswith("GRPO")
    assert configs["shuffled"]["data"]["curriculum"]["order"] == "shuffled"
    assert configs["grpo"]["data"]["curriculum"]["order"] == "ascending"


def test_runs_of_one_seed_share_their_warm_start(swept):
    (cache,) = (swept / "cache").iterdir()
    assert cache.name == "threads-1"
    assert len(list(cache.glob("embedded-*"))) == 1
    before = [
        json.loads((swept / "out" / variant / "seed-3" / "summary.json").read_text())["before"]
        for variant in ("grpo", "shuffled")
    ]
    assert before[0] == before[1]


def test_a_finished_sweep_is_left_alone(swept, monkeypatch, capsys):
    monkeypatch.setenv("LIGHTNING_RLVR_CACHE", str(swept / "cache"))
    command = ["sweep", str(swept / "trial.yaml"), "--output", str(swept / "out")]
    capsys.readouterr()
    main([*command, "--dry_run"])
    assert capsys.readouterr().out.strip() == ""
    main(command)
    assert "2 of 2 runs finished" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, "--threads", "2"])
    assert "threads: the file has 1, this run 2" in capsys.readouterr().err


def test_the_sweep_is_reported(swept, tmp_path):
    main(["report", str(swept / "out"), "--output", str(tmp_path)])
    assert pd.read_csv(tmp_path / "runs.csv")["variant"].tolist() == ["grpo", "shuffled"]
    assert (tmp_path / "classes.png").exists()
    assert "Against grpo" in (tmp_path / "report.md").read_text()


def test_what_a_variant_gets_wrong_is_said_before_anything_runs(swept, tmp_path, capsys):
    plan = yaml.safe_load((swept / "trial.yaml").read_text())
    plan["variants"]["typo"] = {"data.curriculum.stagse": 2}
    (tmp_path / "trial.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(SystemExit):
        main(["sweep", str(tmp_path / "trial.yaml"), "--output", str(tmp_path / "out")])
    assert "variants.typo: " in (said := capsys.readouterr().err)
    assert "stagse" in said
    assert not (tmp_path / "out").exists()
