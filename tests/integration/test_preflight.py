"""`preflight` says what a config takes, and loads nothing."""

import json

import pytest
from support import arguments

from lightning_rlvr.__main__ import main


@pytest.fixture
def before(tmp_path, capsys, monkeypatch):
    """Run it on the cut-down quickstart; return the exit status, the file and what was printed."""
    monkeypatch.setattr("lightning_rlvr.models.Embedded.load", lambda self: pytest.fail("loads a model"))
    monkeypatch.setattr("lightning_rlvr.models.Embedded.prepare", lambda self: pytest.fail("makes a model"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*flags, **changes):
        words = arguments("preflight", tmp_path / "run", **changes)
        file = tmp_path / "said.json"
        with pytest.raises(SystemExit) as exit_:
            main([*words, "--output", str(file), *flags])
        assert not (tmp_path / "run").exists()
        return exit_.value.code, json.loads(file.read_text()) if file.exists() else None, capsys.readouterr()

    return run


def test_a_small_config_fits(before):
    status, said, printed = before()
    assert (status, said["fits"]) == (0, True)
    assert said["step"]["responses"] == 16
    assert said["prompts"]["questions"] == 16
    assert said["memory"]["parts"]["reference"] == said["model"]["weights bytes"] == 4 * said["model"]["parameters"]
    assert said["disk"]["a checkpoint bytes"] == 3 * said["model"]["weights bytes"]
    assert said["memory"]["peak"] == max(said["memory"]["totals"].values())
    assert "It fits" in printed.out
    assert said["refused"] is None


def test_a_gpu_that_is_too_small_is_said(before):
    status, said, printed = before("--gpu_memory", "0.5", trainer__accelerator="gpu", trainer__devices=2)
    assert (status, said["fits"], said["step"]["processes"]) == (1, False, 2)
    assert "It does not fit" in printed.out


def test_terms_that_cannot_act_and_prompts_that_are_too_long_are_said(before):
    release = {"model__objective__init_args__variant": "release", "data__max_prompt_tokens": 5}
    _, said, _ = before(**release)
    assert "updates_per_rollout" in said["terms that cannot act"]["1"]
    assert said["prompts"]["share over max_prompt_tokens (5)"] == 1.0


def test_checkpoints_are_counted_while_one_is_written(before):
    _, said, _ = before()
    one, export = said["disk"]["a checkpoint bytes"], said["disk"]["export bytes"]
    assert said["disk"]["checkpoints at most"] == 3
    assert said["disk"]["all bytes"] == 3 * one + export
    best = {"checkpoint__monitor": "val/avg@2"}
    _, said, _ = before(**best, checkpoint__save_top_k=2, checkpoint__save_last="false")
    assert said["disk"]["checkpoints at most"] == 2 + 1 + 1
    _, said, printed = before(**best, checkpoint__save_top_k=-1)
    assert "all bytes" not in said["disk"]
    assert "no bound" in printed.out


@pytest.mark.parametrize(("key", "of"), [("model__sampling", "sampling"), ("model__eval_sampling", "eval_sampling")])
def test_responses_beyond_the_models_positions_are_said(before, key, of):
    status, said, printed = before(**{f"{key}__max_new_tokens": 1024})
    assert (status, said["fits"]) == (1, True)
    assert "at most 1024 tokens" in said["refused"]
    assert f"Set model.{of}.max_new_tokens" in said["refused"]
    assert "fit would refuse it" in printed.out


def test_a_model_out_of_reach_is_an_error_that_names_its_key(before):
    hub = {"class_path": "lightning_rlvr.models.Pretrained", "init_args": {"name": "nobody/nothing"}}
    status, _, printed = before("--model.policy", json.dumps(hub))
    assert status == 2
    assert "Set model.policy.init_args.name" in printed.err


def test_vllm_takes_its_share_of_a_gpu_while_it_samples(before):
    gpu = ["--gpu_memory", "10", "--trainer.accelerator", "gpu", "--model.vllm.memory", "0.4"]
    _, asleep, _ = before(*gpu)
    assert asleep["memory"]["moments"]["rollout"] == {"vLLM": 4 * 2**30}
    assert "vLLM" not in asleep["memory"]["parts"]
    _, awake, _ = before(*gpu, "--model.vllm.sleep", "false")
    assert awake["memory"]["parts"]["vLLM"] == 4 * 2**30
    _, cpu, _ = before("--model.vllm.memory", "0.4")
    assert cpu["memory"]["parts"]["vLLM"] == cpu["model"]["weights bytes"]
