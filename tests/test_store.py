import contextlib
import errno
import math
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import ROOT

from lightning_rlvr.store import Store, compare_manifests, read_manifest, read_records, user_path, whole_file
from lightning_rlvr.types import UserError

MANIFEST = {"policy": "tiny", "sampling": {"temperature": 1.0}, "ks": [1, 2]}
ORDER = [f"q{i}" for i in range(6)]


def record(uid):
    number = int(uid[1:])
    return {"uid": uid, "answers": [None, str(number)], "score": number / 3, "note": None if number < 3 else "late"}


def finished(path, parts, ranks=(0,)):
    for i, part in enumerate(parts):
        Store(path, MANIFEST, rank=ranks[i % len(ranks)]).append([record(uid) for uid in part])
    Store(path, MANIFEST).finish(ORDER)
    return path.read_bytes()


def test_one_part_or_many_by_one_rank_or_two_give_the_same_file(tmp_path):
    whole = finished(tmp_path / "a.parquet", [ORDER])
    assert finished(tmp_path / "b.parquet", [ORDER[3:5], ORDER[:1], ORDER[5:], ORDER[1:3]]) == whole
    assert finished(tmp_path / "c.parquet", [[uid] for uid in ORDER], ranks=(0, 1)) == whole
    table = read_records(tmp_path / "c.parquet", MANIFEST)
    assert table["uid"].tolist() == ORDER
    assert table["note"].isna().tolist() == [True] * 3 + [False] * 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "b.parquet", "c.parquet"]


def test_done_is_what_was_appended_by_any_rank(tmp_path):
    path = tmp_path / "deep" / "a.parquet"
    assert Store(path, MANIFEST).done() == set()
    Store(path, MANIFEST).append([record("q1")])
    Store(path, MANIFEST, rank=1).append([record("q3"), record("q0")])
    assert Store(path, MANIFEST).done() == {"q0", "q1", "q3"}
    Store(path, MANIFEST).append([record(uid) for uid in ("q2", "q4", "q5")])
    Store(path, MANIFEST).finish(ORDER)
    assert Store(path, MANIFEST).done() == set(ORDER)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([ORDER[:5]], "missing ['q5']"),
        ([ORDER, [{**record("q2"), "score": 0.5}]], "twice and not the same ['q2']"),
        ([ORDER, ["q9"]], "unknown ['q9']"),
    ],
)
def test_a_record_missing_twice_or_unknown_is_an_error_and_nothing_is_lost(tmp_path, parts, said):
    store = Store(tmp_path / "a.parquet", MANIFEST)
    for part in parts:
        store.append([record(uid) if isinstance(uid, str) else uid for uid in part])
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is what is tested
        store.finish(ORDER)
    assert said in str(error.value)
    assert not store.path.exists()
    assert len(list(store.parts.iterdir())) == len(parts)


def test_killed_between_the_file_and_the_removal_of_its_parts(tmp_path):
    whole = finished(tmp_path / "a.parquet", [ORDER])
    store = Store(tmp_path / "a.parquet", MANIFEST)
    store.append([record("q2")])
    store.finish(ORDER)
    assert store.path.read_bytes() == whole
    assert not store.parts.exists()


def test_a_rank_that_outlived_its_run_does_no_harm(tmp_path):
    whole = finished(tmp_path / "a.parquet", [ORDER])
    orphan, fresh = (Store(tmp_path / "b.parquet", MANIFEST, rank=1) for _ in range(2))
    fresh.append([record("q1")])
    orphan.append([record("q0"), record("q1")])  # under the same rank, and would have the same name
    fresh.append([record(uid) for uid in ORDER[2:]])
    fresh.finish(ORDER)
    assert (tmp_path / "b.parquet").read_bytes() == whole


def test_a_record_with_nan_may_be_there_twice_as_well(tmp_path):
    untold = {"uid": "q0", "entropy": math.nan, "logp": [math.nan, -1.0], "by": {"part": math.nan}}
    for change, same in (({}, True), ({"logp": [math.nan, -2.0]}, False), ({"by": {"part": 0.0}}, False)):
        store = Store(tmp_path / f"{change}.parquet", MANIFEST)
        store.append([untold])
        store.append([{**untold, **change}])
        with contextlib.nullcontext() if same else pytest.raises(ValueError, match="twice and not the same"):
            store.finish(["q0"])
        assert store.path.exists() == same


def test_what_a_killed_writer_left_half_done_is_not_read(tmp_path):
    store = Store(tmp_path / "a.parquet", MANIFEST)
    store.append([record("q0")])
    part = next(store.parts.iterdir())
    (store.parts / f".{part.name}.123").write_bytes(part.read_bytes()[:50])
    assert Store(tmp_path / "a.parquet", MANIFEST).done() == {"q0"}
    store.append([record(uid) for uid in ORDER[1:]])
    store.finish(ORDER)
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_another_manifest_is_refused_with_what_differs(tmp_path):
    Store(tmp_path / "a.parquet", MANIFEST).append([record("q0")])
    Store(tmp_path / "a.parquet", MANIFEST).check()
    other = Store(tmp_path / "a.parquet", {**MANIFEST, "policy": "other", "new": 1}, setting="data.scoring.file")
    with pytest.raises(UserError) as error:
        other.check()
    assert "policy: the file has 'tiny', this run 'other'" in str(error.value)
    assert "new: the file has None, this run 1" in str(error.value)
    assert "sampling" not in str(error.value)
    assert "Set data.scoring.file" in str(error.value)
    assert f"remove {other.parts}" in str(error.value)
    # also where only a later part is another's
    Store(tmp_path / "c.parquet", MANIFEST).append([record("q0")])
    Store(tmp_path / "c.parquet", {**MANIFEST, "policy": "other"}, rank=1).append([record("q1")])
    for act in (Store.check, lambda store: store.finish(ORDER[:2])):
        with pytest.raises(UserError, match="policy: the file has 'other'"):
            act(Store(tmp_path / "c.parquet", MANIFEST))
    finished(tmp_path / "b.parquet", [ORDER])
    with pytest.raises(UserError, match="temperature"):
        read_records(tmp_path / "b.parquet", {**MANIFEST, "sampling": {"temperature": 0.5}})


def test_manifests_are_compared_as_json_has_them():
    compare_manifests({"ks": [1, 2]}, {"ks": (1, 2)}, Path("x"))
    with pytest.raises(UserError, match="gone"):
        compare_manifests({"ks": [1, 2], "gone": 1}, {"ks": (1, 2)}, Path("x"))


def test_files_of_others_are_refused(tmp_path):
    (tmp_path / "text.parquet").write_text("precious")
    pq.write_table(pa.Table.from_pandas(pd.DataFrame({"a": [1]})), tmp_path / "other.parquet")
    for name in ("text.parquet", "other.parquet", "none.parquet"):
        with pytest.raises(UserError, match=f"cannot read .*{name}.* Set output"):
            read_manifest(tmp_path / name)


def test_a_full_disk_keeps_what_was_finished(tmp_path, monkeypatch):
    store = Store(tmp_path / "a.parquet", MANIFEST)
    store.append([record("q0")])

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lightning_rlvr.store.pq.write_table", full)
        with pytest.raises(UserError, match=r"No space left.*kept.*output"):
            store.append([record("q1")])
    assert len(list(store.parts.iterdir())) == 1
    assert store.done() == {"q0"}


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "a.parquet", MANIFEST, setting="data.cache_dir")
    with pytest.raises(UserError, match=r"Set data\.cache_dir"), store.claim():
        pass


CLAIMER = """
import sys, time
from pathlib import Path
from lightning_rlvr.store import Store
print("here", flush=True)
with Store(Path(sys.argv[1]), {}).claim():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_claim_ends_with_the_process_that_holds_it(tmp_path):
    path = tmp_path / "a.parquet"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CLAIMER, str(path)]
    holder = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert [holder.stdout.readline() for _ in range(2)] == ["here\n", "held\n"]
    waiter = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert waiter.stdout.readline() == "here\n"
        assert not select.select([waiter.stdout], [], [], 0.3)[0], "two hold the file"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert waiter.stdout.readline() == "held\n"
    finally:
        for process in (holder, waiter):
            process.kill()
            process.communicate()


def test_a_damaged_page_is_not_read_as_other_records(tmp_path):
    path = tmp_path / "a.parquet"
    data = finished(path, [ORDER])
    at = data.index(b"late")
    path.write_bytes(data[:at] + b"soon" + data[at + 4 :])
    with pytest.raises(UserError, match=r"a\.parquet is damaged.*Set output"):
        read_records(path, MANIFEST)


def test_a_damaged_part_names_the_folder_to_remove(tmp_path):
    path = tmp_path / "a.parquet"
    Store(path, MANIFEST).append([record(uid) for uid in ORDER])
    (part,) = (tmp_path / "a.parquet.parts").iterdir()
    data = part.read_bytes()
    at = data.index(b"late")
    part.write_bytes(data[:at] + b"soon" + data[at + 4 :])
    with pytest.raises(UserError, match=r"damaged.*remove .*a\.parquet\.parts"):
        Store(path, MANIFEST).finish(ORDER)


def test_a_file_is_there_whole_or_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"n%d" % (1 // 0))
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
    with whole_file(path) as file:
        file.write(b"new")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("name", ["x" * 300, "a\x00b", "~nobody_of_that_name/x", "\ud800"])
def test_a_name_that_no_file_can_have(name):
    with pytest.raises(UserError, match=r"output must be a path.*Set output"):
        user_path(name, "output")


def test_a_place_that_is_not_there_yet_is_a_path(tmp_path):
    assert user_path(tmp_path / "none" / "x", "output") == tmp_path / "none" / "x"
    assert user_path("~/x", "output") == Path.home() / "x"
