"""Every config parses into objects, and overrides reach what interpolates them."""

import os
import subprocess

import pandas as pd
import pytest
import yaml
from support import QUICKSTART, ROOT

from lightning_rlvr.__main__ import main
from lightning_rlvr.cli import fit_config
from lightning_rlvr.sweep.experiment import read_experiment

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
def test_every_run_of_an_experiment_has_a_config_and_a_command(experiment, tmp_path, capsys):
    main(["sweep", str(experiment), "--dry_run", "--output", str(tmp_path)])
    commands = capsys.readouterr().out.splitlines()
    plan = read_experiment(experiment)
    assert len(commands) == len(plan.variants) * len(plan.seeds)


def test_the_papers_table_is_nine_methods_with_three_seeds_on_its_recipe():
    plan = read_experiment(ROOT / "experiments" / "paper_table_1.5b.yaml")
    words = [" ".join(plan.arguments(variant)) for variant in plan.variants]
    assert (len(words), len(plan.seeds)) == (9, 3)
    assert all("sent_1.5b.yaml" in each for each in words)
    assert sum("kl_cov.yaml" in each for each in words) == 1


RECIPES = sorted((ROOT / "configs").glob("sent_*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_the_settings_of_the_release(recipe):
    config = fit_config(
        ["--config", str(recipe), "--config", str(ROOT / "configs" / "objectives" / "sent_release.yaml")]
    )
    model, data = config["model"], config["data"]
    assert model["objective"]["init_args"]["variant"] == "release"
    assert model["optimizer"]["init_args"]["lr"] == 1e-6
    assert (model["sampling"]["max_new_tokens"], model["sampling"]["temperature"]) == (2048, 1.0)
    assert (data["prompts_per_batch"], data["group_size"], model["updates_per_rollout"]) == (256, 8, 2)
    assert (data["max_prompt_tokens"], data["curriculum"]["stages"], data["curriculum"]["epochs"]) == (1024, 2, 5)
    assert model["policy"]["init_args"]["dtype"] == "float32"  # a step of 1e-6 is lost in bfloat16 weights
    assert data["prompts_per_batch"] % config["trainer"]["devices"] == 0


STARTS = [
    ("torchrun", {"DEVICES": "4"}, ""),
    ("slurm", {"SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "1"}, " --ckpt_path last"),  # queued again, it goes on
]


@pytest.mark.parametrize(("script", "variables", "resumed"), STARTS)
def test_a_script_starts_fit_with_its_processes(script, variables, resumed, tmp_path):
    for name in ("torchrun", "srun"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$0 $*"\n')
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
    command = [str(ROOT / "scripts" / f"{script}.sh"), "configs/sent_1.5b.yaml", "--model.seed", "2"]
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    started = f"-m lightning_rlvr fit --config configs/sent_1.5b.yaml{resumed}"
    assert said.strip().endswith(f"{started} --trainer.devices 4 --trainer.num_nodes 1 --model.seed 2")


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
