"""Every config parses into objects, and overrides reach what interpolates them."""

import pytest
import yaml
from support import QUICKSTART, ROOT

from lightning_rlvr.cli import main

CONFIGS = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "experiments").glob("*.yaml")])


def printed(capsys, *flags: str) -> dict:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *flags, "--print_config"])
    assert exit_.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_config_parses(config, capsys):
    parsed = printed(capsys, "--config", str(config))
    assert parsed["model"]["objective"]["class_path"].startswith("lightning_rlvr.objectives.")


def test_an_override_reaches_what_interpolates_it(capsys):
    parsed = printed(capsys, "--config", str(QUICKSTART), "--seed_everything", "7")
    seeds = {parsed["model"]["seed"], parsed["data"]["seed"], parsed["model"]["policy"]["init_args"]["seed"]}
    assert seeds == {7}
