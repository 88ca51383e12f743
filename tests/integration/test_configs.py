"""Every config parses into objects, and overrides reach what interpolates them."""

import pandas as pd
import pytest
import yaml
from support import QUICKSTART, ROOT

from lightning_rlvr.cli import fit_config, main
from lightning_rlvr.sweep.experiment import check, read_experiment

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))
OVERLAYS = sorted((ROOT / "configs" / "objectives").glob("*.yaml"))


def printed(capsys, *flags: str) -> dict:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *flags, "--print_config"])
    assert exit_.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_config_parses(config, capsys):
    parsed = printed(capsys, "--config", str(config))
    assert parsed["model"]["objective"]["class_path"].startswith("lightning_rlvr.objectives.")


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_run_of_an_experiment_has_a_config(experiment):
    check(read_experiment(experiment), fit_config)


def test_an_override_reaches_what_interpolates_it(capsys):
    parsed = printed(capsys, "--config", str(QUICKSTART), "--seed_everything", "7")
    seeds = {parsed["model"]["seed"], parsed["data"]["seed"], parsed["model"]["policy"]["init_args"]["seed"]}
    assert seeds == {7}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_every_objective_trains_on_top_of_the_quickstart(overlay, cli, tmp_path):
    run = cli("fit", tmp_path / "run", overlay, trainer__max_steps=2, data__val="null")
    objective = yaml.safe_load(overlay.read_text())["model"]["objective"]["class_path"]
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["objective"]["class_path"] == objective
    metrics = pd.read_csv(run / "metrics.csv")
    assert len(metrics) >= 1
    assert metrics[["train/loss", "train/grad_norm", "train/entropy"]].notna().all(axis=None)


def test_defaults_of_a_class_survive_the_command_line(capsys):
    flags = ["--config", str(QUICKSTART), "--config", str(ROOT / "configs" / "objectives" / "dapo.yaml")]
    settings = printed(capsys, *flags)["model"]["objective"]["init_args"]
    assert settings["surrogate"]["init_args"] == {"low": 0.2, "high": 0.28}
    assert settings["aggregation"] == "token_mean"
