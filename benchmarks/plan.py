"""Time and memory of `plan` for a large rollout batch: 256 questions x 8 responses x 2048 tokens (4.2 M tokens).

    python -m benchmarks.plan [--rows 2048] [--tokens 2048]

Each objective runs in a process of its own. Prints seconds (median of 3) and the memory that planning added to that of
its inputs, and writes benchmarks/results/plan.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time

from benchmarks import record

OBJECTIVES = [
    *("GRPO", "DAPO", "GSPO", "CISPO", "EntropyBonus", "AdaptiveEntropy", "EntropyAdvantage"),
    *("HighEntropyMask", "ClipCov", "KLCov", "HighEntropyKL", "SENT"),
]


def measure(name: str, rows: int, tokens: int) -> dict[str, float]:
    """Plan three times in this process; return seconds and GiB added."""
    import torch

    from lightning_rlvr import objectives
    from lightning_rlvr.types import TokenStats

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(tokens // 2, tokens + 1, (rows,), generator=generator)
    stats = TokenStats(
        logp=-torch.rand(rows, tokens, generator=generator),
        entropy=torch.rand(rows, tokens, generator=generator),
        advantage=torch.randn(rows, generator=generator),
        mask=torch.arange(tokens) < lengths[:, None],
        row_id=torch.randperm(rows, generator=generator),
        update=torch.arange(rows) * 2 // rows,
        state={"entropy_coef": 0.01},
    )
    objective = getattr(objectives, name)()
    objective.plan(_cut(stats, 8))  # imports and first allocations
    before = record.peak_bytes()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        objective.plan(stats)
        seconds.append(time.perf_counter() - start)
    added = record.peak_bytes() - before
    return {"seconds": statistics.median(seconds), "added_gib": added / 2**30}


def _cut(stats: object, rows: int) -> object:
    import dataclasses

    parts = {f.name: getattr(stats, f.name) for f in dataclasses.fields(stats)}
    return type(stats)(**{k: v if isinstance(v, dict) else v[:rows] for k, v in parts.items()})


def main() -> None:
    """Measure every objective and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    result = {
        **record.about("plan", ("torch",)),
        "rows": args.rows,
        "tokens": args.tokens,
    }
    context = multiprocessing.get_context("spawn")
    for name in OBJECTIVES:
        with context.Pool(1) as pool:
            result[name] = pool.apply(measure, (name, args.rows, args.tokens))
        print(f"{name:18} {result[name]['seconds']:6.2f} s  {result[name]['added_gib']:5.2f} GiB")
    record.keep("plan", result)


if __name__ == "__main__":
    main()
