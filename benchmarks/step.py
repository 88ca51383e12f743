"""A whole training step, rollout and update, against TRL's GRPOTrainer: same weights, prompts and response lengths.

    python -m benchmarks.step --workload W1 --lengths full|geometric [--reference] [--updates 2] [--rounds 5]
    python -m benchmarks.step --workload W1 --growth          # ours alone: a quarter of the prompts against all

TRL is needed for this alone: pip install trl. Each side is a process of its own; they take turns, step by step, after
one uncounted step each, so that both see the same machine and each has its own memory. Both train in float32 with
DAPO's loss and a fused AdamW, and nothing logged. TRL has no checkpointing, sdpa attention, a dynamic cache, and the
rows in a pass that were found fastest for it on two cores. Ours are fewer, which takes less memory: on W1 more would be
faster, on W2 as fast (a prompt's 8 rows share a pass).

The arithmetic floor is 2 operations for each parameter and token that is read forward, and 6 in the update, the head's
included and each prompt counted once for its responses, over the rate of a product of 1024 x 1024 matrices, measured in
turns with the steps. Prints medians with their spread, and writes benchmarks/results/step_*.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace

import torch

from benchmarks import record
from benchmarks.sides import PARTS, Settings

MICRO_BATCH = {"ours": {"W1": 16, "W2": 6}, "trl": {"W1": 32, "W2": 8}}  # rows in a pass
SIZE = 1024  # of the matrices whose product tells the machine's rate


class Side:
    """A process that steps when told to."""

    def __init__(self, name: str, settings: Settings) -> None:
        command = [sys.executable, "-m", "benchmarks.sides", name, json.dumps(asdict(settings))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> dict[str, float]:
        """Do one step; return its seconds, and the most memory held so far."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print("go", file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError(f"a side ended before its steps did: {self.process.args}")

    def close(self) -> None:
        """End the process."""
        self.process.communicate(timeout=60)


def in_turns(sides: dict[str, Settings], rounds: int) -> tuple[dict[str, list[dict[str, float]]], list[float]]:
    """Step all sides in turns; return what each said of each step, and the matmul rates between them (1/s)."""
    running = {name: Side(name.split()[0], settings) for name, settings in sides.items()}
    said: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    rates = []
    for number in range(rounds + 1):
        order = list(running) if number % 2 else list(reversed(running))
        for name in order:
            answer = running[name].step()
            if number:  # the first is warm-up
                said[name].append(answer)
        rates.append(matmul_rate())
    for side in running.values():
        side.close()
    return said, rates


def matmul_rate() -> float:
    """Return floating-point operations a second of a product of two square matrices."""
    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * SIZE**3 / statistics.median(seconds)


def floor_operations(settings: Settings) -> tuple[int, int]:
    """Return the operations that a step needs at least, and the tokens that it samples and trains."""
    work = settings.work()
    parameters = sum(p.numel() for p in work.model.parameters())  # tied: the embedding's are the head's
    response = int(settings.response_lengths(work).sum())
    tokens = response + sum(map(len, work.prompts))
    return parameters * tokens * (2 + 6 + 2 * settings.reference), response


def against_trl(settings: Settings, rounds: int) -> dict[str, object]:
    """Compare a step of ours with one of TRL's."""
    sides = {side: replace(settings, micro_batch=MICRO_BATCH[side][settings.workload]) for side in MICRO_BATCH}
    said, rates = in_turns(sides, rounds)
    seconds = {name: [answer["seconds"] for answer in answers] for name, answers in said.items()}
    operations, tokens = floor_operations(settings)
    floor = operations / statistics.median(rates)
    peak = {name: answers[-1]["peak_gib"] for name, answers in said.items()}
    return {
        "response_tokens": tokens,
        "gflops": record.spread([rate / 1e9 for rate in rates], 4),
        "floor_seconds": round(floor, 3),
        "seconds": {name: record.spread(values, 4) for name, values in seconds.items()},
        "times_as_fast": record.spread([b / a for a, b in zip(seconds["ours"], seconds["trl"], strict=True)], 4),
        "over_floor": {name: record.spread([value / floor for value in values], 4) for name, values in seconds.items()},
        "our_seconds": {part: record.spread([answer[part] for answer in said["ours"]], 4) for part in PARTS},
        "peak_gib": {name: round(value, 3) for name, value in peak.items()},
        "peak_ratio": round(peak["ours"] / peak["trl"], 3),
    }


def growth(settings: Settings, rounds: int) -> dict[str, object]:
    """Compare the time of a token at a quarter of the prompts and at all of them."""
    quarter = replace(settings, prompts=settings.prompts // 4)
    said, _ = in_turns({"ours quarter": quarter, "ours whole": settings}, rounds)
    tokens = [floor_operations(s)[1] for s in (quarter, settings)]
    each = [[a["seconds"] / n for a in answers] for n, answers in zip(tokens, said.values(), strict=True)]
    return {
        "rows": [quarter.prompts * 8, settings.prompts * 8],
        "milliseconds_a_token": [record.spread([1e3 * value for value in values], 4) for values in each],
        "ratio": record.spread([b / a for a, b in zip(*each, strict=True)], 4),
    }


def main() -> None:
    """Measure one setting and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=["W1", "W2"], default="W1")
    parser.add_argument("--lengths", choices=["full", "geometric"], default="full")
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--updates", type=int, default=1)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, help="fewer prompts than the workload has")
    parser.add_argument("--tokens", type=int, help="fewer tokens than the workload samples")
    args = parser.parse_args()
    most = {"W1": (32, 64), "W2": (4, 128)}[args.workload]
    settings = Settings(
        workload=args.workload,
        lengths=args.lengths,
        reference=args.reference,
        updates=args.updates,
        micro_batch=MICRO_BATCH["ours"][args.workload],
        steps=args.rounds + 1,
        prompts=args.prompts or most[0],
        tokens=args.tokens or most[1],
    )
    result = {
        **record.about("step", ("torch", "transformers", "trl", "lightning"), torch.get_num_threads()),
        **asdict(settings),
        **(growth if args.growth else against_trl)(settings, args.rounds),
    }
    print(json.dumps(result, indent=2))
    parts = (
        args.workload,
        args.lengths,
        "growth" if args.growth else "",
        "reference" if args.reference else "",
        f"updates{args.updates}" if args.updates > 1 else "",
        f"tokens{args.tokens}" if args.tokens else "",
        f"prompts{args.prompts}" if args.prompts else "",
    )
    record.keep("_".join(["step", *filter(None, parts)]).lower(), result)


if __name__ == "__main__":
    main()
