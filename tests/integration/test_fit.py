"""What a run of `fit` leaves behind."""

import json
import logging
import math

import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

LOGGED = {
    "train": """entropy share/low share/high kl/low kl/high kl/all response_length clip_fraction grad_share/kl
        grad_share/policy reward accuracy loss grad_norm lr tokens_per_second tied_groups logp_gap truncated
        skipped_rows status/unparsable""",
    "seconds": "rollout reward statistics reference update logging step",
    "tokens_per_second": "rollout reward statistics reference update logging",
    "val": "avg@2 pass@1 pass@2 entropy response_length truncated unparsable",
}


@pytest.fixture(scope="session")
def metrics(finished_run):
    return pd.read_csv(finished_run / "metrics.csv")


def test_metrics_hold_what_the_method_needs_to_be_seen(metrics):
    wanted = {f"{group}/{name}" for group, names in LOGGED.items() for name in names.split()}
    assert wanted <= set(metrics.columns)


def test_each_step_is_logged_once(metrics):
    steps = metrics.loc[metrics["train/entropy"].notna(), "step"]
    assert steps.tolist() == [0, 1, 2, 3]


def test_values_lie_where_they_must(metrics):
    train = metrics[metrics["train/entropy"].notna()]
    assert train["train/entropy"].between(0, math.log(100)).all()
    assert train["train/share/low"].between(0.8, 0.85).all()
    assert (train["train/share/high"] > 0).all()
    assert (train["train/share/high"] < train["train/share/low"]).all()
    assert (train["train/clip_fraction"] == 0).all(), "one update a rollout is on-policy"
    assert train["train/grad_share/kl"].iloc[0] == 0, "at the start the policy is the reference"
    assert train["train/kl/all"].iloc[0] == pytest.approx(0, abs=1e-9)
    assert (train["train/logp_gap"] < 1e-4).all()


def test_the_profiler_of_lightning_works(cli, tmp_path, caplog, monkeypatch):
    for name in ("lightning", "lightning.pytorch"):  # which keep to themselves what nobody asked for when they began
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    caplog.set_level(logging.INFO)  # also where a verifier's process, imported here, has disabled logging
    cli("fit", tmp_path / "fit", trainer__profiler="simple", trainer__max_steps=1)
    assert "FIT Profiler Report" in caplog.text
    assert "run_training_batch" in caplog.text


def test_held_out_questions_are_judged_before_during_and_after(metrics):
    assert metrics.loc[metrics["val/avg@2"].notna(), "step"].tolist() == [0, 1, 3]  # Lightning counts steps from 0


def test_the_config_left_behind_repeats_the_run(finished_run):
    config = yaml.safe_load((finished_run / "config.yaml").read_text())
    assert config["model"]["seed"] == config["seed_everything"] == 1
    assert config["model"]["policy"]["init_args"]["steps"] == 4


def test_the_summary_is_whole(finished_run):
    summary = json.loads((finished_run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert {"val/avg@2", "val/pass@2", "val/entropy"} <= summary["before"].keys() == summary["after"].keys()
    assert summary["train_entropy"].keys() == {"first", "last"}
    assert {"warm_start", "score", "rollout", "update", "evaluation", "total"} <= summary["seconds"].keys()
    assert summary["seed"] == 1
    assert summary["optimizer_steps"] == 4
    assert summary["tokens_per_second"] > 0
    assert summary["peak_memory_bytes"] > 1e7
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0] or summary["versions"]["torch"]


def test_samples_show_question_response_and_verdict(finished_run):
    samples = [json.loads(line) for line in (finished_run / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 2, 4}
    assert all(sample["prompt"].endswith("=") for sample in samples)
    assert {sample["status"] for sample in samples} <= {"correct", "wrong", "unparsable"}


def test_tensorboard_has_the_scalars(finished_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished_run)).Reload()
    assert {"train/entropy", "val/avg@2"} <= set(events.Tags()["scalars"])


def test_the_exported_policy_loads_and_generates(finished_run):
    folder = finished_run / "policy"
    assert list(folder.glob("*.safetensors"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("1 + 2 =", return_tensors="pt")
    output = model.generate(prompt["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert output.shape[1] > prompt["input_ids"].shape[1]


def test_the_checkpoint_holds_the_policy_and_not_the_reference(finished_run):
    checkpoint = torch.load(finished_run / "checkpoints" / "last.ckpt", weights_only=True)
    assert any(key.startswith("policy.") for key in checkpoint["state_dict"])
    assert not any(key.startswith("reference.") for key in checkpoint["state_dict"])
    assert checkpoint["rollouts_done"] == 4


def test_a_second_run_takes_a_folder_of_its_own(finished_run, cli):
    before = (finished_run / "metrics.csv").read_bytes()
    cli("fit", finished_run)
    again = finished_run.with_name(f"{finished_run.name}-2")
    assert (finished_run / "metrics.csv").read_bytes() == before
    first, second = pd.read_csv(finished_run / "metrics.csv"), pd.read_csv(again / "metrics.csv")
    same = [name for name in first.columns if "seconds/" not in name and "tokens_per_second" not in name]
    pd.testing.assert_frame_equal(first[same], second[same])


def test_continuing_from_a_checkpoint_ends_where_the_whole_run_ends(cli, tmp_path):
    whole = cli("fit", tmp_path / "whole", trainer__max_steps=3)
    half = cli("fit", tmp_path / "half", trainer__max_steps=1)
    rest = cli("fit", tmp_path / "rest", trainer__max_steps=3, ckpt_path=half / "checkpoints" / "last.ckpt")
    ends = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, rest)]
    for name, weight in ends[0].items():
        assert torch.equal(weight, ends[1][name]), name


def test_the_config_left_behind_runs_again_in_a_folder_of_its_own(cli, cache, tmp_path):
    from lightning_rlvr.__main__ import main

    run = cli("fit", tmp_path / "run", trainer__max_steps=1)
    before = (run / "metrics.csv").read_bytes()
    main(["fit", "--config", str(run / "config.yaml")])
    assert (run / "metrics.csv").read_bytes() == before
    again = tmp_path / "run-2"
    first, second = (pd.read_csv(folder / "metrics.csv") for folder in (run, again))
    assert first["train/loss"].equals(second["train/loss"])


def test_the_last_checkpoint_is_the_exported_policy(finished_run):
    stored = torch.load(finished_run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    model = AutoModelForCausalLM.from_pretrained(finished_run / "policy")
    for name, weight in model.state_dict().items():
        assert torch.equal(stored[f"policy.{name}"], weight), name


def test_the_learning_rate_logged_is_the_one_used(cli, tmp_path):
    settings = {
        "model__lr_scheduler": "torch.optim.lr_scheduler.LinearLR",
        "model__lr_scheduler__init_args__start_factor": 0.5,
        "model__lr_scheduler__init_args__total_iters": 2,
    }
    run = cli("fit", tmp_path / "run", trainer__max_steps=3, data__val="null", **settings)
    rates = pd.read_csv(run / "metrics.csv")["train/lr"]
    assert rates.tolist() == pytest.approx([1e-4, 1.5e-4, 2e-4], rel=1e-5)


def test_stages_are_logged(metrics):
    assert metrics["train/stage"].dropna().tolist() == [0, 0, 1, 1]


def test_a_resumed_run_knows_how_the_run_began(cli, tmp_path):
    half = cli("fit", tmp_path / "half", trainer__max_steps=2)
    rest = cli("fit", tmp_path / "rest", ckpt_path=half / "checkpoints" / "last.ckpt")
    began, resumed = (json.loads((run / "summary.json").read_text()) for run in (half, rest))
    assert resumed["before"] == began["before"]
    assert resumed["train_entropy"]["first"] == began["train_entropy"]["first"]


def test_repeating_the_curriculum_survives_a_resume(cli, tmp_path):
    whole = cli("fit", tmp_path / "whole", trainer__max_epochs=2, data__val="null")
    half = cli("fit", tmp_path / "half", trainer__max_epochs=2, trainer__max_steps=6, data__val="null")
    checkpoint = half / "checkpoints" / "last.ckpt"
    rest = cli("fit", tmp_path / "rest", trainer__max_epochs=2, data__val="null", ckpt_path=checkpoint)
    ends = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, rest)]
    assert ends[0]["rollouts_done"] == ends[1]["rollouts_done"] == 8
    assert all(torch.equal(w, ends[1]["state_dict"][k]) for k, w in ends[0]["state_dict"].items())


def test_bf16_weights_train(cli, tmp_path):
    run = cli("fit", tmp_path / "run", trainer__precision="bf16-true", trainer__max_steps=1)
    assert pd.read_csv(run / "metrics.csv")["train/loss"].notna().any()


def test_a_fast_dev_run_works(cli, tmp_path):
    cli("fit", tmp_path / "run", trainer__fast_dev_run="true")
