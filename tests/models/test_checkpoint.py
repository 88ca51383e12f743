"""Policies from the checkpoints of fit."""

import pytest
import torch
import yaml
from support import TinyPolicy

from lightning_rlvr.models import Checkpoint, Embedded
from lightning_rlvr.types import UserError


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with the weights of another seed, and a frozen reference beside them."""
    state = TinyPolicy(7).load().model.state_dict()
    weights = {f"policy.{name}": weight for name, weight in state.items()}
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": weights, "rollouts_done": 3}, path)
    return path


def test_it_has_the_checkpoints_weights(saved):
    loaded = Checkpoint(str(saved), TinyPolicy(0)).load()
    for name, weight in TinyPolicy(7).load().model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight), name
    assert not loaded.model.training
    assert len(loaded.tokenizer) == len(TinyPolicy().tokenizer())


def test_source_and_weights_decide_the_fingerprint(saved):
    first = Checkpoint(str(saved), TinyPolicy(0)).fingerprint()
    assert Checkpoint(str(saved), TinyPolicy(0)).fingerprint() == first
    assert Checkpoint(str(saved), TinyPolicy(1)).fingerprint() != first
    stored = torch.load(saved, weights_only=True)
    stored["state_dict"]["policy.lm_head.weight"] += 1
    torch.save(stored, saved)
    assert Checkpoint(str(saved), TinyPolicy(0)).fingerprint() != first


def test_the_source_is_read_from_the_runs_config(saved):
    teacher = {"class_path": "lightning_rlvr.tasks.WorkedChainSum", "init_args": {"min_terms": 3}}
    policy = {"class_path": "lightning_rlvr.models.Embedded", "init_args": {"teacher": teacher, "steps": 9}}
    (saved.parents[1] / "config.yaml").write_text(yaml.safe_dump({"model": {"policy": policy, "micro_batch_size": 4}}))
    source = Checkpoint(str(saved))._origin()
    assert isinstance(source, Embedded)
    assert (source.steps, source.teacher.min_terms) == (9, 3)


def test_what_is_no_checkpoint_of_a_run(saved, tmp_path):
    with pytest.raises(UserError, match=r"no folder above it has a config\.yaml"):
        Checkpoint(str(saved)).fingerprint()
    (saved.parents[1] / "config.yaml").write_text("data: {}")
    with pytest.raises(UserError, match=r"policy under model\.policy.*Set the checkpoint's source"):
        Checkpoint(str(saved)).fingerprint()
    with pytest.raises(UserError, match="there is none"):
        Checkpoint(str(tmp_path / "none.ckpt"), TinyPolicy()).load()
    for content in (b"", b"no zip", b"PK\x03\x04 cut short"):
        (tmp_path / "bad.ckpt").write_bytes(content)
        with pytest.raises(UserError, match="must be a checkpoint that `fit` wrote"):
            Checkpoint(str(tmp_path / "bad.ckpt"), TinyPolicy()).load()
    torch.save({"weights": 1}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="must be a checkpoint that `fit` wrote"):
        Checkpoint(str(tmp_path / "bad.ckpt"), TinyPolicy()).load()


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("ran",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="must be a checkpoint that `fit` wrote"):
        Checkpoint(str(tmp_path / "evil.ckpt"), TinyPolicy()).load()


def test_another_policys_weights_are_refused(saved):
    stored = torch.load(saved, weights_only=True)
    del stored["state_dict"]["policy.model.norm.weight"]
    torch.save(stored, saved)
    with pytest.raises(UserError, match=r"model.norm.weight"):
        Checkpoint(str(saved), TinyPolicy()).load()
