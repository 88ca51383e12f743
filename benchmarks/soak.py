"""Whether memory, open files and processes stay level while the quickstart's loop goes round in small steps.

    python -m benchmarks.soak [--minutes 60] [--every 5]

Runs `fit` on the quickstart with small batches and hardly a warm start, a verifier with processes beside its own, a
checkpoint every 10 steps and a validation every 16, and looks at the process and its children every few seconds
(Linux). After a warm-up of a fifth of the time the least-squares line through resident memory must rise by at most 5 %
of it over the rest of the run, open files and the number of processes must not grow, and no process may be left at the
end. Writes benchmarks/results/soak.json; exits with 1 where something grew.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import record

ROOT = Path(__file__).parents[1]
GROWTH = 0.05  # of resident memory, from the end of the warm-up to the end of the run
START_S = 600.0  # for the imports and a short warm start, on a busy machine
GRACE_S = 120.0  # for the last step, the last validation and the export
MEBIBYTE = 1 << 20
OVERLAY = """
model:
  policy: {init_args: {steps: 20}}
  reward:
    class_path: lightning_rlvr.rewards.WeightedSum
    init_args:
      parts:
        answer: {reward: {class_path: lightning_rlvr.rewards.ExactMatch, init_args: {answer_pattern: '[#](-?\\d+)$'}}}
        math: {weight: 0.0, reward: {class_path: lightning_rlvr.rewards.MathAnswer}}
data:
  {group_size: 4, prompts_per_batch: 4, curriculum: {order: shuffled}, val: {init_args: {size: 8}}}
"""


Process = tuple[int, str]  # its number, and when it began: numbers are used again


def processes() -> dict[Process, int]:
    """Return all processes that live, with the number of the parent of each."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if fields[0] != "Z":
            found[int(folder.name), fields[19]] = int(fields[1])
    return found


def family(root: int) -> set[Process]:
    """Return the process and its descendants; the pools of verifiers have sessions of their own."""
    parents = processes()
    numbers, size = {root}, 0
    while size < len(numbers):
        size = len(numbers)
        numbers |= {process[0] for process, parent in parents.items() if parent in numbers}
    return {process for process in parents if process[0] in numbers}


def sample(root: int, members: set[Process]) -> dict[str, float]:
    """Return resident memory (MiB) and open files of the process, and memory and number of its family."""
    resident = {}
    for process, _ in members:
        try:
            pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        except OSError:
            continue
        resident[process] = pages * os.sysconf("SC_PAGE_SIZE") / MEBIBYTE
    files = len(os.listdir(f"/proc/{root}/fd"))
    return {"rss": resident[root], "family_rss": sum(resident.values()), "files": files, "processes": len(resident)}


def watch(
    command: list[str], limit: float, every: float, log: Path
) -> tuple[int, list[dict[str, float]], set[Process]]:
    """Run the command for at most `limit` seconds; return its status, the samples and the processes that were left."""
    samples: list[dict[str, float]] = []
    seen: set[Process] = set()
    start = time.monotonic()
    with log.open("w") as out:
        run = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    try:
        while run.poll() is None and time.monotonic() - start < limit:
            members = family(run.pid)
            seen |= members
            try:
                samples.append({"seconds": time.monotonic() - start, **sample(run.pid, members)})
            except (OSError, KeyError):  # it has just ended
                break
            time.sleep(every)
        status = run.wait(timeout=GRACE_S)
    finally:
        run.kill()
    time.sleep(2.0)
    left = seen & set(processes())
    for process, _ in left:
        os.kill(process, signal.SIGKILL)
    return status, samples, left


def judge(samples: list[dict[str, float]]) -> dict[str, Any]:
    """Return what was level and what grew, after the warm-up."""
    end = samples[-1]["seconds"]
    kept = [s for s in samples if end / 5 <= s["seconds"] <= end - 10]
    hours = [s["seconds"] / 3600 for s in kept]
    out: dict[str, Any] = {"samples": len(kept), "minutes": round((kept[-1]["seconds"] - kept[0]["seconds"]) / 60, 1)}
    for name in ("rss", "family_rss", "files", "processes"):
        values = [s[name] for s in kept]
        slope = statistics.linear_regression(hours, values).slope
        growth = slope * (hours[-1] - hours[0]) / statistics.mean(values)
        out[name] = {**record.spread(values, 1), "slope_per_hour": round(slope, 2), "growth": round(growth, 4)}
    half = len(kept) // 2
    level = {name: out[name]["growth"] <= GROWTH for name in ("rss", "family_rss")}
    for name in ("files", "processes"):
        level[name] = max(s[name] for s in kept[half:]) <= max(s[name] for s in kept[:half])
    return {**out, "level": level}


def main() -> None:
    """Run, watch, judge and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=5, help="seconds between samples")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overlay, run = Path(folder) / "overlay.yaml", Path(folder) / "run"
        overlay.write_text(OVERLAY)
        seconds = round(args.minutes * 60)
        limit = f"00:{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        configs = ["--config", "configs/quickstart.yaml", "--config", str(overlay), "--run_dir", str(run)]
        bounds = ["--trainer.max_epochs", "100000", "--trainer.max_time", limit, "--trainer.accelerator", "cpu"]
        command = [sys.executable, "-m", "lightning_rlvr", "fit", *configs, *bounds]
        status, samples, left = watch(command, seconds + START_S, args.every, Path(folder) / "log")
        if status != 0:
            print((Path(folder) / "log").read_text()[-3000:])
            sys.exit(f"fit ended with status {status}")
        steps = len(pd.read_csv(run / "metrics.csv")["train/reward"].dropna())
    found = judge(samples)
    level = {**found.pop("level"), "no_orphans": not left}
    print(f"{steps} steps, {found}, level: {level}")
    about = record.about("soak", ("torch", "lightning", "transformers"))
    record.keep("soak", {**about, "steps": steps, "orphans": len(left), "level": level, **found})
    sys.exit(0 if all(level.values()) else 1)


if __name__ == "__main__":
    main()
