"""`fit` on two processes trains what it trains on one."""

import json
import os
import subprocess
import sys

import pandas as pd
import torch
from support import arguments

from lightning_rlvr.__main__ import main
from lightning_rlvr.training.replay import load_replay

SAME = [
    "train/loss",
    "train/entropy",
    "train/reward",
    "train/grad_norm",
    "train/share/high",
    "train/kl/low",
    "train/kl/high",
]


def fit(run, cache, processes):
    settings = {
        "data__curriculum__order": "shuffled",
        "ledger__every_n_batches": 2,
        "save_rollouts__every_n_batches": 2,
        "model__micro_batch_size": 4,
        "model__objective__init_args__high_cov_fraction": 0.2,
        "model__sampling__max_new_tokens": 12,
        "model__reward": "lightning_rlvr.rewards.FormatMatch",
        "model__reward__init_args__pattern": ".*[aeiou5].*",
        "trainer__devices": processes,
        "trainer__strategy": "ddp" if processes > 1 else "auto",
    }
    words = arguments("fit", run, **settings)
    if processes == 1:
        main(words)
    else:
        command = [sys.executable, "-m", "lightning_rlvr", *words]  # which starts the other process itself
        environment = {**os.environ, "LIGHTNING_RLVR_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True), pd.read_csv(run / "metrics.csv")


def tokens(run):
    """The last batch in the ledger."""
    keys = ["uid", "response", "position"]
    return pd.read_parquet(max((run / "ledger").glob("*.parquet"))).sort_values(keys).reset_index(drop=True)


def rows(run):
    """The last of the rollout batches that were kept, without the order of its rows."""
    replay = load_replay(max((run / "rollouts").iterdir()))
    return sorted(zip(replay.row_id.tolist(), replay.score.tolist(), replay.rollouts.mask.sum(1).tolist(), strict=True))


def test_parameters_and_metrics_agree(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("LIGHTNING_RLVR_CACHE", str(cache))
    one, two = (fit(tmp_path / str(n), cache, n) for n in (1, 2))
    assert one[0]["global_step"] == two[0]["global_step"] == 4
    for name, weight in one[0]["state_dict"].items():
        torch.testing.assert_close(two[0]["state_dict"][name], weight, rtol=0, atol=1e-5, msg=name)
    assert one[1]["train/reward"].dropna().between(0.05, 0.95).all(), "else nothing was learned from"
    pd.testing.assert_frame_equal(one[1][SAME], two[1][SAME], rtol=1e-3, atol=1e-6)
    # What is written is of both processes.
    pd.testing.assert_frame_equal(tokens(tmp_path / "1"), tokens(tmp_path / "2"), rtol=1e-3, atol=1e-5)
    assert rows(tmp_path / "1") == rows(tmp_path / "2")
    assert len(rows(tmp_path / "1")) == 16
    samples = [[json.loads(line) for line in (tmp_path / n / "samples.jsonl").open()] for n in "12"]
    assert [s["response"] for s in samples[0]] == [s["response"] for s in samples[1]] != []
