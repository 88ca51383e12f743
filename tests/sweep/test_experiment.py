"""What an experiment file says, and which files are refused."""

from pathlib import Path

import pytest
import yaml
from support import ROOT

from lightning_rlvr.sweep.experiment import check, read_experiment
from lightning_rlvr.types import UserError


def test_every_combination_is_a_run_and_neighbours_differ_in_their_seed(write):
    runs = read_experiment(write()).runs(Path("out"))
    assert [run.name for run in runs] == ["one/seed-1", "one/seed-2", "two/seed-1", "two/seed-2"]
    assert runs[2].folder == Path("out/two/seed-1")
    assert runs[3].arguments[-1] == "--seed_everything=2"


def test_a_variant_has_the_last_word(write, tmp_path):
    (tmp_path / "top.yaml").write_text("b: 2\n")
    variants = {"v": {"config": "top.yaml", "lr": 0.5, "adaptive": {"every": 4}, "none": None, "sort": "-length"}}
    plan = read_experiment(write(variants=variants, overrides={"lr": 1.0, "size": 3}))
    base, top = f"--config={tmp_path / 'base.yaml'}", f"--config={tmp_path / 'top.yaml'}"
    values = ["--lr=0.5", "--size=3", '--adaptive={"every": 4}', "--none=null", "--sort=-length"]
    assert list(plan.arguments("v")) == [base, top, *values]
    assert plan.files() == [tmp_path / "base.yaml", tmp_path / "top.yaml"]


def test_configs_below_here_are_named_relative_to_it(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_experiment(write()).arguments("one") == ("--config=base.yaml",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": None}, "must have the keys base, variants and seeds"),
        ({"sedes": [1]}, "must have the keys"),
        ({"seeds": []}, r"seeds must be a list of different whole numbers from 0 on, got \[\]"),
        ({"seeds": [1, 1]}, "seeds must"),
        ({"seeds": [-1]}, "seeds must"),
        ({"seeds": [True]}, "seeds must"),
        ({"seeds": 3}, "seeds must"),
        ({"variants": {}}, "variants must"),
        ({"variants": {"a/b": {}}}, "a/b.*names a folder"),
        ({"variants": {".hidden": {}}}, "names a folder"),
        ({"variants": {"a": [1]}}, r"variants\.a must be a mapping"),
        ({"variants": {"a": {"run_dir": "x"}}}, r"variants\.a must leave run_dir alone"),
        ({"overrides": {"seed_everything": 1}}, "overrides must leave seed_everything alone"),
        ({"overrides": {3: 1}}, "overrides must be a mapping of dotted keys"),
        ({"base": "missing.yaml"}, r"base must name configs relative to the experiment's folder, got missing\.yaml"),
        ({"base": 3}, "base must be a config or a list"),
    ],
)
def test_what_is_wrong_is_named(write, changes, message):
    with pytest.raises(UserError, match=message):
        read_experiment(write(**changes))


def test_a_missing_overlay_is_named(write):
    with pytest.raises(UserError, match=r"variants\.a\.config must name configs"):
        check(read_experiment(write(variants={"a": {"config": "missing.yaml"}})), lambda arguments: {})


def test_no_experiment_at_all_is_refused(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [")
    for name in ("bad.yaml", "missing.yaml"):
        with pytest.raises(UserError, match="cannot read"):
            read_experiment(tmp_path / name)
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(UserError, match="list"):
        read_experiment(tmp_path / "list.yaml")


def test_a_config_that_is_refused_names_its_variant(write):
    def resolve(arguments):
        if "--lr=0.1" in arguments:
            raise UserError("lr is wrong")
        return {}

    with pytest.raises(UserError, match=r"variants\.two: lr is wrong"):
        check(read_experiment(write()), resolve)


def objective_settings(plan, variant):
    """What the configs and keys of a variant set of its objective, one on top of the other."""
    settings, prefix = {}, "model.objective.init_args."
    for argument in plan.arguments(variant):
        key, value = argument.removeprefix("--").split("=", 1)
        if key == "config":
            model = yaml.safe_load(Path(value).read_text())["model"]
            settings |= model.get("objective", {}).get("init_args", {})
        elif key.startswith(prefix):
            settings[key.removeprefix(prefix)] = yaml.safe_load(value)
    return settings


@pytest.mark.parametrize("name", ["paper_table", "paper_table_make_number", "paper_table_1.5b"])
def test_the_kl_on_high_entropy_tokens_is_as_strong_as_sents(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = read_experiment(ROOT / "experiments" / f"{name}.yaml")
    assert objective_settings(plan, "high_entropy_kl") == objective_settings(plan, "sent")
