"""What runs leave, read back."""

import json

import pandas as pd
import pytest

from lightning_rlvr import analysis
from lightning_rlvr.types import UserError


def test_finished_runs_are_read_in_the_order_of_the_sweep(study):
    runs = analysis.read_runs(study)
    assert runs.index.tolist() == [("grpo", s) for s in (1, 2, 3)] + [("sent", s) for s in (1, 2, 3)] + [
        ("mask", 1),
        ("mask", 2),
    ]
    assert runs.loc[("sent", 2), "after/avg@4"] == pytest.approx(0.81)
    assert runs.loc[("sent", 2), "before/avg@4"] == 0.2
    assert analysis.held_out_metrics(runs) == ["avg@4", "pass@1", "pass@4", "entropy", "response_length"]


def test_without_a_manifest_variants_are_sorted(study):
    (study / "sweep.json").unlink()
    assert analysis.variants_of(analysis.read_runs(study)) == ["grpo", "mask", "sent"]


def test_a_folder_without_finished_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="must hold finished runs"):
        analysis.read_runs(tmp_path)


def test_batches_are_counted_as_trained(study):
    training, held_out = analysis.read_training(study), analysis.read_held_out(study)
    assert training.groupby(["variant", "seed"])["batch"].apply(list).tolist() == [[1, 2, 3, 4]] * 8
    assert held_out.groupby(["variant", "seed"])["batch"].apply(list).tolist() == [[0, 4]] * 8
    assert held_out.loc[held_out["batch"] == 0, "val/avg@4"].eq(0.2).all()
    assert not [column for column in training if column.startswith("val/")]


def test_a_validation_after_the_first_batch_is_not_the_one_before_it(study):
    path = study / "grpo" / "seed-1" / "metrics.csv"
    table = pd.read_csv(path)
    early = table.iloc[[0]].assign(**{"val/avg@4": 0.33})
    pd.concat([table.iloc[:2], early, table.iloc[2:]]).to_csv(path, index=False)
    mine = analysis.read_held_out(study).query("variant == 'grpo' and seed == 1")
    assert mine["batch"].tolist() == [0, 1, 4]
    assert mine["val/avg@4"].tolist() == [0.2, 0.33, 0.6]


def test_a_run_alone_is_a_variant_of_its_name(study):
    folder = study / "sent" / "seed-2"
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"seed": 7}))
    runs = analysis.read_runs(folder)
    assert runs.index.tolist() == [("seed-2", 2)], "the folder of a sweep names the seed"
    alone = folder.rename(study.parent / "first_try")
    assert analysis.read_runs(alone).index.tolist() == [("first_try", 7)]
    assert analysis.read_training(alone)["batch"].tolist() == [1, 2, 3, 4]


@pytest.fixture
def kept(study, tmp_path):
    """What is kept of the study."""
    (tmp_path / "kept").mkdir()
    tables = [read(study) for read in (analysis.read_runs, analysis.read_training, analysis.read_held_out)]
    manifest = {**analysis.read_manifest(study), "commands": {"run": str(study)}, "baseline": "mask"}
    analysis.keep(tmp_path / "kept", *tables, manifest)
    return tmp_path / "kept"


def test_what_is_kept_reads_like_the_study(kept, study):
    assert analysis.is_kept(kept)
    assert not analysis.is_kept(study)
    pd.testing.assert_frame_equal(analysis.read_runs(kept), analysis.read_runs(study))
    pd.testing.assert_frame_equal(analysis.read_held_out(kept), analysis.read_held_out(study))
    curves, all_of = analysis.read_training(kept), analysis.read_training(study)
    assert set(all_of) - set(curves) == {"seconds/step"}
    pd.testing.assert_frame_equal(curves, all_of[list(curves)], check_like=True)


def test_what_is_kept_says_nothing_of_the_machine(kept, study):
    manifest = analysis.read_manifest(kept)
    assert manifest["baseline"] == "mask"
    assert set(manifest) == {"commit", "threads", "versions", "variants", "baseline"}
    assert str(study) not in "".join((kept / name).read_text() for name in ("runs.csv", "sweep.json"))


def test_kept_runs_without_their_curves_are_refused(kept):
    (kept / "training.parquet").unlink()
    with pytest.raises(UserError, match=r"must hold training\.parquet beside runs\.csv"):
        analysis.read_training(kept)


READERS = (analysis.read_runs, analysis.read_training, analysis.read_held_out, analysis.read_manifest)


@pytest.mark.parametrize(
    ("file", "contents"),
    [
        ("grpo/seed-1/summary.json", '{"status": "fini'),
        ("grpo/seed-1/summary.json", "[1]"),
        ("grpo/seed-1/summary.json", '{"status": "finished", "after": null}'),
        ("grpo/seed-1/metrics.csv", None),
        ("grpo/seed-1/metrics.csv", ""),
        ("sweep.json", "{"),
        ("sweep.json", "[1]"),
    ],
)
def test_a_damaged_file_of_a_study_is_named(study, file, contents):
    if contents is None:
        (study / file).unlink()
    else:
        (study / file).write_text(contents)
    with pytest.raises(UserError, match=file):
        [read(study) for read in READERS]


@pytest.mark.parametrize("file", ["runs.csv", "training.parquet", "validations.parquet", "sweep.json"])
def test_a_damaged_file_of_what_was_kept_is_named(kept, file):
    (kept / file).write_bytes((kept / file).read_bytes()[:4])
    with pytest.raises(UserError, match=file):
        [read(kept) for read in READERS]
