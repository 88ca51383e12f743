"""A whole training step, rollout and update, against TRL's GRPOTrainer: same weights, prompts and response lengths.

    python -m benchmarks.step --workload W1 --lengths full|geometric [--reference] [--updates 2] [--rounds 5]
    python -m benchmarks.step --workload W1 --growth          # ours alone: a quarter of the prompts against all
    python -m benchmarks.step --workload W3 --device cuda     # W2 or W3, bfloat16

TRL is needed for this alone: pip install trl. Each side is a process of its own; they take turns, step by step, after
one uncounted step each, so that both see the same machine and each has its own memory. Both train in float32 with
DAPO's loss and a fused AdamW, and nothing logged. TRL has no checkpointing, sdpa attention, a dynamic cache, and the
rows in a pass that were found fastest for it on two cores. On W1 ours are fewer, which takes less memory and as much
time; with geometric lengths fewer still, as each pass is then of more rows. On W2 they are the 8 that share a prompt.

The arithmetic floor is 2 operations for each parameter and token that is read forward, and 6 in the update, the head's
included and each prompt counted once for its responses, over the rate of a product of 1024 x 1024 matrices, measured in
turns with the steps. Prints medians with their spread, and writes benchmarks/results/step_*.json.

On a GPU it also says which share of that rate our update comes to, and which share of the memory's bandwidth, measured
by a copy, our rollout: each of its steps reads all weights, and the keys and values of what it has sampled so far.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from benchmarks import record
from benchmarks.sides import PARTS, Settings

# Rows in a pass, by device, side and workload.
MICRO_BATCH = {
    "cpu": {"ours": {"W1": 24, "W1 geometric": 16, "W2": 8}, "trl": {"W1": 32, "W2": 8}},
    "cuda": {"ours": {"W2": 32, "W3": 16}, "trl": {"W2": 32, "W3": 16}},
}
SIZE = {"cpu": 1024, "cuda": 8192}  # of the matrices whose product tells the machine's rate
COPIED = 2**30  # elements of the copy that tells a GPU's bandwidth


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


def in_turns(
    sides: dict[str, Settings], rounds: int, device: str
) -> tuple[dict[str, list[dict[str, float]]], list[float]]:
    """Step all sides in turns; return what each said of each step, and the matmul rates between them (1/s)."""
    running = {name: Side(name.split()[0], settings) for name, settings in sides.items()}
    said: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    rates = []
    for number in range(rounds + 1):
        order = list(running) if number % 2 else list(reversed(running))
        for name in order:
            answer = running[name].step()
            print(f"{name}: step {number} of {rounds}, {answer['seconds']:.2f} s", file=sys.stderr, flush=True)
            if number:  # the first is warm-up
                said[name].append(answer)
        rates.append(matmul_rate(device))
    for side in running.values():
        side.close()
    return said, rates


def matmul_rate(device: str) -> float:
    """Return floating-point operations a second of a product of two square matrices, in bfloat16 on a GPU."""
    size, dtype = SIZE[device], torch.float32 if device == "cpu" else torch.bfloat16
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, device)


def bandwidth() -> float:
    """Return bytes read and written a second by a large copy in a GPU's memory."""
    source = torch.randn(COPIED, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), "cuda")


def median_seconds(work: Callable[[], object], device: str) -> float:
    """Return how long something takes."""
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        work()
        record.wait(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def floor_operations(settings: Settings) -> tuple[int, int]:
    """Return the operations that a step needs at least, and the tokens that it samples and trains."""
    work = settings.work()
    parameters = sum(p.numel() for p in work.model.parameters())  # tied: the embedding's are the head's
    response = int(settings.response_lengths(work).sum())
    tokens = response + sum(map(len, work.prompts))
    return parameters * tokens * (2 + 6 + 2 * settings.reference), response


def against_trl(settings: Settings, rounds: int) -> dict[str, object]:
    """Compare a step of ours with one of TRL's."""
    trl = replace(settings, micro_batch=MICRO_BATCH[settings.device]["trl"][settings.workload])
    sides = {"ours": settings, "trl": trl}
    said, rates = in_turns(sides, rounds, settings.device)
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
        **(gpu_shares(settings, said["ours"], statistics.median(rates)) if settings.device == "cuda" else {}),
    }


def gpu_shares(settings: Settings, said: list[dict[str, float]], rate: float) -> dict[str, object]:
    """Say how near our update comes to the matmul rate, and our rollout to the memory's bandwidth."""
    work, most = settings.work(), bandwidth()
    weights = sum(p.numel() for p in work.model.parameters())
    lengths, prompts = settings.response_lengths(work), sum(map(len, work.prompts))
    config = work.model.config
    heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    key_values = int((lengths * (lengths + 1) // 2).sum()) + prompts * int(lengths.max())  # read, of tokens
    read = 2 * weights * int(lengths.max()) + 2 * 2 * config.num_hidden_layers * heads * key_values
    trained = 6 * weights * (int(lengths.sum()) + prompts)
    return {
        "terabytes_per_second": round(most / 1e12, 3),
        "update_share_of_rate": record.spread([trained / a["update"] / rate for a in said], 4),
        "rollout_share_of_bandwidth": record.spread([read / a["rollout"] / most for a in said], 4),
        "rollout_tokens_per_second": record.spread([int(lengths.sum()) / a["rollout"] for a in said], 1),
    }


def growth(settings: Settings, rounds: int) -> dict[str, object]:
    """Compare the time of a token at a quarter of the prompts and at all of them."""
    quarter = replace(settings, prompts=settings.prompts // 4)
    said, _ = in_turns({"ours quarter": quarter, "ours whole": settings}, rounds, settings.device)
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
    parser.add_argument("--workload", choices=["W1", "W2", "W3"], default="W1")
    parser.add_argument("--lengths", choices=["full", "geometric"], default="full")
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--updates", type=int, default=1)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, help="fewer prompts than the workload has")
    parser.add_argument("--tokens", type=int, help="fewer tokens than the workload samples")
    args = parser.parse_args()
    ours = MICRO_BATCH[args.device]["ours"]
    most = {"W1": (32, 64), "W2": (4, 128), "W3": (16, 512)}[args.workload]
    settings = Settings(
        workload=args.workload,
        lengths=args.lengths,
        reference=args.reference,
        updates=args.updates,
        micro_batch=ours.get(f"{args.workload} {args.lengths}") or ours[args.workload],
        steps=args.rounds + 1,
        prompts=args.prompts or most[0],
        tokens=args.tokens or most[1],
        device=args.device,
    )
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    result = {
        **record.about("step", ("torch", "transformers", "trl", "lightning"), torch.get_num_threads(), gpu),
        **asdict(settings),
        **(growth if args.growth else against_trl)(settings, args.rounds),
    }
    print(json.dumps(result, indent=2))
    parts = (
        args.workload,
        args.lengths,
        "" if args.device == "cpu" else args.device,
        "growth" if args.growth else "",
        "reference" if args.reference else "",
        f"updates{args.updates}" if args.updates > 1 else "",
        f"tokens{args.tokens}" if args.tokens else "",
        f"prompts{args.prompts}" if args.prompts else "",
    )
    record.keep("_".join(["step", *filter(None, parts)]).lower(), result)


if __name__ == "__main__":
    main()
