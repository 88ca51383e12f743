"""Ctrl-C ends a run cleanly and keeps what it has."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import torch
from support import arguments


def test_ctrl_c_keeps_checkpoint_metrics_and_summary(tmp_path, cache):
    command = [
        sys.executable,
        "-m",
        "lightning_rlvr",
        *arguments("fit", tmp_path / "run", data__curriculum__epochs=5000),
    ]
    environment = {**os.environ, "LIGHTNING_RLVR_CACHE": str(cache)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "Traceback" not in output, output[-3000:]
    assert process.returncode == 1
    done = torch.load(checkpoint, weights_only=True)["rollouts_done"]
    steps = pd.read_csv(tmp_path / "run" / "metrics.csv")["step"]
    assert done >= 1
    assert steps.max() == done - 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["optimizer_steps"] == done
