"""Checkpoint files: whole or not there, checked when read, never unpickled."""

import os
import resource

import pytest
import torch

from lightning_rlvr.training.checkpoint import CheckpointFiles, damage, newest_checkpoint
from lightning_rlvr.types import UserError

files = CheckpointFiles()


def contents(done):
    weights = {"policy.w": torch.arange(5000.0) + done}
    return {"state_dict": weights, "optimizer_states": [], "rollouts_done": done, "log_lines": {"metrics.csv": done}}


@pytest.fixture
def two(tmp_path):
    """A folder with last.ckpt of batch 2 and previous.ckpt of batch 1."""
    for done in (1, 2):
        files.save_checkpoint(contents(done), tmp_path / "last.ckpt")
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "previous.ckpt"]
    return tmp_path


def spoil(path):
    """Turn one bit in the weights, which stand in the middle of the file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-2000])


def test_the_newest_is_found(two):
    assert newest_checkpoint(two) == (two / "last.ckpt", 2, {"metrics.csv": 2})
    assert files.load_checkpoint(two / "previous.ckpt")["rollouts_done"] == 1
    assert newest_checkpoint(two / "nowhere") is None


@pytest.mark.parametrize("break_it", [spoil, cut_short])
def test_a_damaged_one_is_noticed_and_the_one_before_it_taken(two, break_it):
    break_it(two / "last.ckpt")
    assert damage(two / "last.ckpt")
    with pytest.raises(UserError, match=r"cannot be read.*ckpt_path"):
        files.load_checkpoint(two / "last.ckpt")
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged.*previous\.ckpt"):
        assert newest_checkpoint(two).rollouts_done == 1
    break_it(two / "previous.ckpt")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        newest_checkpoint(two)


def test_a_full_disk_leaves_what_was_there(two):
    before = {path.name: path.read_bytes() for path in two.iterdir()}
    bounds = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, bounds[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written: .*File too large.* GiB are free.*--ckpt_path last"):
            files.save_checkpoint(contents(3), two / "last.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, bounds)
    assert {path.name: path.read_bytes() for path in two.iterdir()} == before


def test_what_is_cut_off_in_the_writing_leaves_what_was_there(two, monkeypatch):
    before = {path.name: path.read_bytes() for path in two.iterdir()}

    def half(stored, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        files.save_checkpoint(contents(3), two / "last.ckpt")
    assert {path.name: path.read_bytes() for path in two.iterdir()} == before


class Stranger:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_no_stranger_is_unpickled(tmp_path):
    torch.save({**contents(1), "callbacks": Stranger(tmp_path / "made")}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="cannot be read"):
        files.load_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    with pytest.raises(UserError, match="no checkpoint"):
        newest_checkpoint(tmp_path)
    assert not (tmp_path / "made").exists()
