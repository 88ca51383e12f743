"""The folder of a small sweep whose numbers are known."""

import csv
import json
import math

BASE = {"val/avg@4": 0.2, "val/pass@1": 0.2, "val/pass@4": 0.5, "val/entropy": 1.0, "val/response_length": 9.0}
VARIANTS = {"grpo": (0.6, 0.1), "sent": (0.8, 0.5), "mask": (0.7, 0.3)}  # held-out avg@4 and entropy after training


def write_run(folder, after, entropy, seed, classes=False):
    """Leave what a run of four rollout batches leaves."""
    folder.mkdir(parents=True)
    change = {1: 0.0, 2: 0.01, 3: -0.01}[seed]
    entropies = [1.0 + (entropy - 1.0) * k / 3 + change for k in range(4)]
    ends = [BASE, {**BASE, "val/avg@4": after + change, "val/pass@4": 0.9, "val/entropy": entropy}]
    rows = [{"step": 0, **ends[0]}]
    for step, h in enumerate(entropies):
        accuracy = 3.0 - math.exp(h)
        row = {"step": step, "train/entropy": h, "train/accuracy": accuracy, "train/reward": accuracy}
        row |= {"train/response_length": 9.0 + step, "train/kl/old": 0.0}
        # a batch lowers the entropy of the next by 100 lr Cov
        row |= {"train/lr": 0.01, "train/covariance": (1.0 - entropy) / 3, "seconds/step": 1.0}
        rows.append(row | ({"train/share/low": 0.8, "train/kl/low": 0.1 * step} if classes else {}))
    rows.append({"step": 3, **ends[1]})
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    summary = {
        "status": "finished",
        "before": {"step": 0, **ends[0]},
        "after": {"step": 4, **ends[1]},
        "train_entropy": {"first": entropies[0], "last": entropies[-1]},
        "seconds": {"total": 60.0},
        "peak_memory_bytes": 2**30,
        "optimizer_steps": 4,
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def write_study(folder):
    """Three variants with three seeds each, one of them unfinished, and what else lies about."""
    for name, (after, entropy) in VARIANTS.items():
        for seed in (1, 2, 3):
            write_run(folder / name / f"seed-{seed}", after, entropy, seed, classes=name == "sent")
    cut_off = folder / "mask" / "seed-3" / "summary.json"
    cut_off.write_text(json.dumps({**json.loads(cut_off.read_text()), "status": "interrupted"}))
    write_run(folder / ".unfinished" / "mask-seed-3-1" / "seed-3", 0.0, 0.0, 3)
    versions = {"lightning_rlvr": "0.1.0", "torch": "2.13.0", "transformers": "5.0"}
    manifest = {"variants": list(VARIANTS), "versions": versions, "commit": "abc123", "threads": 1}
    (folder / "sweep.json").write_text(json.dumps(manifest))
