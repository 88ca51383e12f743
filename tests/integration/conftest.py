"""Runs of the cut-down quickstart."""

from pathlib import Path

import pytest
from support import arguments

from lightning_rlvr.__main__ import main


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cli(cache, monkeypatch):
    """Run a subcommand of the cut-down quickstart in this process."""
    monkeypatch.setenv("LIGHTNING_RLVR_CACHE", str(cache))

    def run(subcommand: str, run_dir: Path, overlay: Path | None = None, **changes: object) -> Path:
        main(arguments(subcommand, run_dir, overlay, **changes))
        return run_dir

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of one finished fit that found nothing cached."""
    run_dir = tmp_path_factory.mktemp("runs") / "fit"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_RLVR_CACHE", str(tmp_path_factory.mktemp("empty_cache")))
        main(arguments("fit", run_dir))
    return run_dir
