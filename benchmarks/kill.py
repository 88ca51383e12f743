"""Runs of a cut-down quickstart, killed at random and continued, end bit for bit as the one left alone.

    OMP_NUM_THREADS=1 python -m benchmarks.kill --times 50

Half of them on one process, half on two (of which one or both are killed), each from an empty cache: a kill may fall
into the making of the policy, the scoring, a validation, between two updates of a rollout batch, into the writing of a
checkpoint. One in five falls before the first rollout batch, the others after it; the moment is uniform over the CPU
time of that part in a run left alone. Each run is then started again with `--ckpt_path last`. Processes are forked from
one that has all modules loaded. Writes benchmarks/results/kill.json.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

TIMES = ("seconds/", "tokens_per_second/", "train/tokens_per_second")  # the columns that no two runs agree in
CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
SETTINGS = {
    "model.policy.init_args.hidden_size": 32,
    "model.policy.init_args.layers": 1,
    "model.policy.init_args.heads": 2,
    "model.policy.init_args.steps": 4,
    "model.sampling.max_new_tokens": 8,
    "model.reward": "lightning_rlvr.rewards.FormatMatch",
    "model.reward.init_args.pattern": ".*[aeiou5].*",
    "model.updates_per_rollout": 2,
    "model.pass_at": "[1, 2]",
    "data.train.init_args.size": 24,
    "data.val.init_args.size": 4,
    "data.group_size": 4,
    "data.prompts_per_batch": 4,
    "data.eval_samples": 2,
    "data.scoring.samples": 2,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
    "trainer.val_check_interval": 3,
    "checkpoint.every_n_train_steps": 4,
}
PATIENCE = 600.0  # seconds, for a run to end
GRACE = 20.0  # seconds, for the other process of one that was killed: a launcher ends it if it has not seen that itself


def outcome(run: Path) -> dict[str, Any]:
    """Return all that a finished run came to, but for the time it took."""
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in csv.DictReader(file)]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {
        "weights": hashlib.sha256((run / "policy" / "model.safetensors").read_bytes()).hexdigest(),
        "metrics": rows,
        **{path.name: path.read_text(encoding="utf-8") for path in sorted(run.glob("*.jsonl"))},
        **{key: summary[key] for key in ("status", "before", "after", "train_entropy", "optimizer_steps")},
    }


def start(words: Sequence[str], cache: Path, ranks: int, log: Path) -> list[int]:
    """Fork the processes of a run; return their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spread = [*words, "--trainer.devices", str(ranks), *(["--trainer.strategy", "ddp"] if ranks > 1 else [])]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if not pid:
            _become(spread, cache, rank, ranks, port, log)
        pids.append(pid)
    return pids


def _become(words: list[str], cache: Path, rank: int, ranks: int, port: int, log: Path) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    from lightning_rlvr.__main__ import main

    os.environ["LIGHTNING_RLVR_CACHE"] = str(cache)
    if ranks > 1:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_RANK": rank}
        os.environ |= {name: str(value) for name, value in place.items()}
        rank_zero_only.rank = rank
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code: object = 1
    try:
        main(words)
        code = 0
    except SystemExit as error:
        code = error.code
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def wait(
    pids: Sequence[int],
    run: Path,
    kill_at: float = float("inf"),
    victims: Sequence[int] = (),
    *,
    training: bool = False,
) -> tuple[float, float]:
    """Wait for the processes of a run to end; kill the victims once the first process has used so much CPU time.

    With `training` the time counts from the first rollout batch. Returns the CPU seconds of the first process when that
    began and when it ended. Raises: TimeoutError if they do not end.
    """
    left, used, begun = list(pids), 0.0, 0.0
    killed, deadline = False, time.monotonic() + PATIENCE
    while left:
        if pids[0] in left:
            used = _cpu_seconds(pids[0])
        begun = begun or (used if (run / "order.jsonl").exists() else 0.0)
        if not killed and ((begun and used - begun >= kill_at) if training else used >= kill_at):
            for pid in set(victims) & set(left):
                os.kill(pid, signal.SIGKILL)
            killed, deadline = True, time.monotonic() + GRACE
        left = [pid for pid in left if os.waitpid(pid, os.WNOHANG)[0] == 0]
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            if not killed:
                raise TimeoutError(f"processes {left} of {list(pids)} did not end")
        time.sleep(0.002)
    return begun, used


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def fit(run: Path) -> list[str]:
    """Return the command line of a run."""
    settings = [text for key, value in SETTINGS.items() for text in (f"--{key}", str(value))]
    return ["fit", "--config", str(CONFIG), "--run_dir", str(run), *settings]


def measure(times: int, processes: Sequence[int], seed: int, folder: Path) -> dict[str, Any]:
    """Kill and continue `times` runs; return what was found, by number of processes."""
    import lightning_rlvr.cli  # noqa: F401 - loaded once for all that are forked

    rng, found = random.Random(seed), {}
    for ranks in processes:
        whole = folder / f"whole-{ranks}"
        begun, length = wait(start(fit(whole), folder / f"cache-{ranks}", ranks, folder / f"whole-{ranks}.log"), whole)
        wanted = outcome(whole)
        moments, same, steps = [], 0, []
        while len(moments) < times // len(processes):
            run, cache, log = (folder / f"{kind}-{ranks}-{len(moments)}" for kind in ("run", "cache", "log"))
            training = len(moments) % 5 > 0
            moment = rng.uniform(0, length - begun if training else begun)
            pids = start(fit(run), cache, ranks, log)
            wait(pids, run, moment, pids if rng.random() < 0.5 else [rng.choice(pids)], training=training)
            if (run / "policy").exists():  # it was done before the kill
                shutil.rmtree(run)
                continue
            order = run / "order.jsonl"
            steps.append(len(order.read_text().splitlines()) if order.exists() else 0)
            wait(start([*fit(run), "--ckpt_path", "last"], cache, ranks, log), run)
            agrees = (run / "policy").exists() and outcome(run) == wanted
            moments.append(round(moment + begun * training, 2))
            same += agrees
            at = f"kill {len(moments)} at {moments[-1]:.2f} of {length:.2f} s, after {steps[-1]} batches"
            verdict = "same" if agrees else f"DIFFERS, see {run} and {log}"
            print(f"{ranks} ranks, {at}: {verdict}", flush=True)
            if agrees:
                shutil.rmtree(run)
        found[f"{ranks}_processes"] = {
            "kills": len(moments),
            "bit_identical": same,
            "cpu_seconds_until_training_and_end": [round(begun, 2), round(length, 2)],
            "killed_at": moments,
            "batches_begun_when_killed": steps,
        }
    return found


def main() -> None:
    """Measure and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for runs; those that differ are kept there")
    chosen = parser.parse_args()
    folder = chosen.folder or Path(tempfile.mkdtemp())
    found = measure(chosen.times, chosen.processes, chosen.seed, folder)
    record.keep("kill", {**record.about("kill", ("lightning", "torch", "transformers"), threads=1), **found})
    if any(part["bit_identical"] < part["kills"] for part in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
