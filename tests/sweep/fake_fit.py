"""Stands in for `fit`: leaves behind what a run does, at once, and does as --behave says."""

import csv
import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml


def main():
    assert sys.argv[1] == "fit"
    if any(name.startswith("SLURM_") for name in os.environ):
        sys.exit("Lightning would wait for processes that Slurm started")
    values = dict(text.removeprefix("--").split("=", 1) for text in sys.argv[2:])
    run, behave = Path(values["run_dir"]), values.get("behave", "finish")
    goes_on = values.pop("ckpt_path", None) == "last"
    run.mkdir(exist_ok=goes_on)  # else it must not be there
    with (run / "begun").open("a") as file:
        file.write("again" if goes_on else "new")
    if behave == "deaf":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    arguments = [text for text in sys.argv[2:] if not text.startswith(("--run_dir=", "--ckpt_path="))]
    trainer = {"max_epochs": 1, "max_steps": -1, "default_root_dir": str(run)}
    config = {"arguments": arguments, "trainer": trainer, "model": {"updates_per_rollout": 1}, "run_dir": str(run)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "curriculum.json").write_text(json.dumps({"batches": 3}))
    with (run / "metrics.csv").open("w", newline="") as file:
        rows = [("0", "", "0.25"), ("0", "1.0", ""), ("1", "1.0", ""), ("1", "", "0.5")]
        csv.writer(file).writerows([("step", "train/reward", "val/avg@2"), *rows])
    print("progress 1\rprogress 2\nat work", flush=True)
    status, code = "finished", 0
    if behave == "fail" and not (run.parents[1] / "mended").exists():
        sys.exit("nothing works")
    if behave == "deaf":
        time.sleep(30)
    if behave == "linger":
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            deadline = time.monotonic() + 60
            while not (run.parents[1] / "go").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        except KeyboardInterrupt:
            status, code = "interrupted", 1
    peak = int(values.get("peak", 2**30))
    summary = {"status": status, "peak_memory_bytes": peak, "seconds": {"total": 42.0}}
    (run / "summary.json").write_text(json.dumps(summary))
    sys.exit(code)


if __name__ == "__main__":
    main()
