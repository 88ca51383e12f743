"""Scores and order survive kill -9, and do not depend on the number of processes."""

import json
import signal

import pandas as pd
import pytest
import torch
from support import ROOT, arguments, two_ranks

from benchmarks.kill import outcome
from lightning_rlvr.__main__ import main

MORTAL = {"model__reward": "support.Mortal", "data__prompts_per_batch": 4}
TWO = {"trainer__devices": 2, "trainer__strategy": "ddp"}
THREE_STAGES = {
    "data__scoring__samples": 4,
    "data__curriculum__stages": 3,
    "data__curriculum__epochs": 2,
    "data__curriculum__adaptive": "{every: 1, weight: 0.5}",
    "data__curriculum__at_boundary": "restart",
    "data__train__init_args__size": 12,
    "data__prompts_per_batch": 2,
    "data__val": "null",
    "checkpoint__save_top_k": -1,
}


def order(run):
    return [json.loads(line) for line in (run / "order.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def vowels(tmp_path_factory):
    """A cache with the policy made, and a score file of one process that lived."""
    cache, folder = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("whole")
    settings = {**MORTAL, "data__scoring__prompts_per_batch": 3, "output": folder / "a.parquet"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_RLVR_CACHE", str(cache))
        main(arguments("score", folder / "run", **settings))
    return cache, folder / "a.parquet"


def test_scores_of_a_killed_run_of_two_ranks_are_those_of_one_that_lived(vowels, tmp_path):
    cache, whole = vowels
    file = tmp_path / "a.parquet"
    settings = {**MORTAL, **TWO, "data__scoring__prompts_per_batch": 3, "output": file}
    words = arguments("score", tmp_path / "run", **settings)
    code, _ = two_ranks(cache, *words, die_at=3)
    assert code == -signal.SIGKILL
    assert not file.exists()
    kept = sorted(p.name for p in (tmp_path / "a.parquet.parts").glob("*.parquet"))
    assert kept == [f"{rank:04d}-{part:06d}.parquet" for rank in (0, 1) for part in (0, 1)]
    code, said = two_ranks(cache, *words, die_at=2)  # one batch is left for each rank
    assert code == 0, said
    assert file.read_bytes() == whole.read_bytes()
    assert "semantic entropy" in file.with_suffix(".html").read_text()


def test_a_crash_in_the_second_stage_changes_neither_order_nor_result(vowels, tmp_path):
    cache, _ = vowels
    words = arguments("fit", tmp_path / "whole", **{**MORTAL, **TWO, **THREE_STAGES})
    code, said = two_ranks(cache, *words)
    assert code == 0, said
    whole = order(tmp_path / "whole")
    assert [(line["stage"], line["epoch"]) for line in whole] == [(i // 4, i % 4 // 2) for i in range(12)]
    uids = [uid for line in whole for uid in line["uids"]]
    stages = json.loads((tmp_path / "whole" / "curriculum.json").read_text())["stages"]
    assert sorted(uids) == sorted([uid for stage in stages for uid in stage] * 2)
    assert len(set(uids)) == 12
    consumed = [{uid for line in whole if line["stage"] == s for uid in line["uids"]} for s in range(3)]
    assert consumed != [set(stage) for stage in stages], "never re-ordered"

    words = arguments("fit", tmp_path / "dead", **{**MORTAL, **TWO, **THREE_STAGES})
    assert two_ranks(cache, *words, die_at=6)[0] == -signal.SIGKILL
    assert order(tmp_path / "dead")[-1]["stage"] == 1
    words = ["fit", "--config", str(tmp_path / "dead" / "config.yaml"), "--ckpt_path", "last"]
    code, said = two_ranks(cache, *words)
    assert code == 0, said
    assert outcome(tmp_path / "dead") == outcome(tmp_path / "whole")
    results = [torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True) for run in ("whole", "dead")]
    for name, weight in results[0]["state_dict"].items():
        assert torch.equal(results[1]["state_dict"][name], weight), name
    assert any(name.startswith("reference.") for name in results[0]["state_dict"])


def test_a_boundary_restarts_optimizer_and_reference(cli, tmp_path):
    settings = {
        "data__curriculum__order": "shuffled",
        "data__prompts_per_batch": 8,
        "data__val": "null",
        "model__reward": "support.ManyVowels",
        "checkpoint__save_top_k": -1,
        "model__lr_scheduler": "{class_path: torch.optim.lr_scheduler.LinearLR, init_args: {total_iters: 2}}",
    }
    runs = {
        name: cli("fit", tmp_path / name, data__curriculum__at_boundary=name, **settings)
        for name in ("carry_over", "restart")
    }
    ends = {name: torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for name, run in runs.items()}
    steps = {name: end["optimizer_states"][0]["state"][0]["step"].item() for name, end in ends.items()}
    assert steps == {"carry_over": 2, "restart": 1}
    moved = {name: any(key.startswith("reference.") for key in end["state_dict"]) for name, end in ends.items()}
    assert moved == {"carry_over": False, "restart": True}
    first = torch.load(next((runs["restart"] / "checkpoints").glob("*step=1.ckpt")), weights_only=True)["state_dict"]
    for name, weight in first.items():
        assert torch.equal(ends["restart"]["state_dict"][name.replace("policy.", "reference.")], weight)
    rates = {name: pd.read_csv(run / "metrics.csv")["train/lr"].dropna().tolist() for name, run in runs.items()}
    assert rates["restart"][0] == rates["restart"][1] == rates["carry_over"][0] < rates["carry_over"][1]


def test_score_reports_also_where_the_filters_leave_nothing(cli, tmp_path):
    with pytest.warns(UserWarning, match="the report shows no stages: stages must be at most"):
        cli(
            "score",
            tmp_path / "run",
            output=tmp_path / "a.parquet",
            data__curriculum__all_wrong="drop",
            data__curriculum__all_right="drop",
            data__curriculum__stages=16,
        )
    assert "semantic entropy" in (tmp_path / "a.html").read_text()
    cli("score", tmp_path / "again", output=tmp_path / "a.parquet", report=False)


def test_what_filters_drop_is_counted(cli, tmp_path):
    run = cli("fit", tmp_path / "fit", data__curriculum__all_wrong="drop", data__curriculum__stages=1, **MORTAL)
    about = json.loads((run / "curriculum.json").read_text())
    trained = {uid for line in order(run) for uid in line["uids"]}
    assert about["dropped"]["all_wrong"] == 16 - len(trained)
    assert 0 < about["dropped"]["all_wrong"] < 16
    assert set(about["stages"][0]) == trained


def test_a_run_resumed_without_its_scores_makes_those_of_the_initial_policy_again(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("LIGHTNING_RLVR_CACHE", str(cache))
    here = {"data__cache_dir": tmp_path / "scores", "data__val": "null", **MORTAL}
    main(arguments("fit", tmp_path / "whole", **here, checkpoint__save_top_k=-1))
    (file,) = (tmp_path / "scores").glob("*.parquet")
    whole = file.read_bytes()
    file.unlink()
    middle = next((tmp_path / "whole" / "checkpoints").glob("*step=2.ckpt"))
    main(arguments("fit", tmp_path / "rest", **here, ckpt_path=middle))
    assert file.read_bytes() == whole
    assert order(tmp_path / "whole")[2:] == order(tmp_path / "rest")


def test_scores_that_are_there_need_no_folder_to_write_to(cli, tmp_path, monkeypatch):
    settings = {"data__cache_dir": tmp_path / "scores", "trainer__max_steps": 1, **MORTAL}
    cli("fit", tmp_path / "first", **settings)

    def refuse(store):
        raise AssertionError("the file is there already")

    monkeypatch.setattr("lightning_rlvr.store.Store.try_claim", refuse)
    cli("fit", tmp_path / "second", **settings)


def test_adaptive_or_not_is_part_of_the_order_that_a_resumed_run_continues(cli, tmp_path, capsys):
    settings = {"data__curriculum__epochs": 2, "data__curriculum__order": "pass_rate", "data__val": "null", **MORTAL}
    adaptive = {"data__curriculum__adaptive": "{every: 1}"}
    run = cli("fit", tmp_path / "adaptive", trainer__max_steps=2, **settings, **adaptive)
    with pytest.raises(SystemExit, match="2"):
        cli("fit", tmp_path / "plain", **settings, ckpt_path=run / "checkpoints" / "last.ckpt")
    assert "another order of questions" in capsys.readouterr().err


def test_a_reference_that_moved_but_was_not_kept_is_missed(cli, tmp_path, capsys):
    settings = {
        "data__curriculum__order": "shuffled",
        "data__curriculum__at_boundary": "restart",
        "data__prompts_per_batch": 8,
        "data__val": "null",
    }
    grpo = cli("fit", tmp_path / "grpo", ROOT / "configs/objectives/grpo.yaml", **settings)
    with pytest.raises(SystemExit, match="2"):
        cli("fit", tmp_path / "sent", **settings, ckpt_path=grpo / "checkpoints" / "last.ckpt")
    assert "the reference that this objective reads is lost" in capsys.readouterr().err
