"""The notebooks, run from top to bottom on one small finished run, and kept without outputs."""

import json
import os

import pytest
from support import ROOT, arguments

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIGURES = {"compare_objectives": 2, "semantic_entropy": 1, "token_level": 3, "training_dynamics": 4}
KEPT = {"ledger__every_n_batches": 2, "save_rollouts__every_n_batches": 2}
REWARD = {"model__reward": "support.ManyVowels"}  # a policy of four steps earns nothing else


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, cache):
    """The folder of a run of a few batches with ledger, rollouts and the scores it was ordered by."""
    from lightning_rlvr.__main__ import main

    folder = tmp_path_factory.mktemp("notebooks")
    scores = folder / "scores.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_RLVR_CACHE", str(cache))
        main(arguments("score", folder / "score", output=scores, **REWARD))
        main(arguments("fit", folder / "run", data__scoring__file=scores, data__curriculum__epochs=2, **KEPT, **REWARD))
    return folder


def test_there_is_a_notebook_for_each_subject():
    assert [path.stem for path in NOTEBOOKS] == sorted(FIGURES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_its_figures(path, small_run, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    monkeypatch.setenv("RUN", str(small_run / "run"))
    monkeypatch.setenv("SCORES", str(small_run / "scores.parquet"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    NotebookClient(
        notebook, timeout=600, startup_timeout=300, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= FIGURES[path.stem]
    said = "".join(output["text"] for output in outputs if output.output_type == "stream" and output.name == "stderr")
    assert "Warning" not in said.replace("TqdmWarning: IProgress not found", "")  # no widgets needed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs"), f"run nbstripout notebooks/{path.name}"
        assert cell.get("execution_count") is None
