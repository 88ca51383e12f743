"""Rollouts against `generate` of transformers, in useful tokens/s: on the same weights, prompts and response lengths.

    python -m benchmarks.generate [--workloads W1 W2] [--rounds 5]
    python -m benchmarks.generate --workloads W3 --device cuda    # W2 or W3, bfloat16

Lengths are given: all at the limit, or geometric. Ours is the training engine, log-probabilities and entropies
recorded; only its question whether a response has ended is answered by the lengths. `generate` runs at its best
setting: all rows in one batch, sdpa, dynamic cache, nothing returned but tokens, temperature 1 without any truncation
of the distribution; it stops when the longest response has its length. Both sides run in turns in one process; a token
is useful if it lies within its response's length. Prints medians and spread over the rounds, and writes
benchmarks/results/generate.json, or generate_cuda.json.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.workloads import WORKLOADS, Workload
from lightning_rlvr.rollout import TransformersEngine
from lightning_rlvr.rollout.transformers_engine import left_pad
from lightning_rlvr.types import Sampling


class GivenLengths(TransformersEngine):
    """The engine, with responses that end at lengths given beforehand."""

    lengths: Tensor  # on the model's device

    def _ends(self, token: Tensor, row: Tensor, length: Tensor) -> Tensor:
        return length >= self.lengths[row]


def ours(work: Workload, lengths: Tensor, seed: int) -> float:
    """Sample all responses; return seconds."""
    engine = GivenLengths(work.model, [work.eos_id], work.pad_id)
    engine.lengths = lengths.to(work.model.device)
    seeds = [seed * len(work.prompts) + i for i in range(len(work.prompts))]
    start = time.perf_counter()
    rollouts = engine.generate(work.prompts, seeds, work.group_size, Sampling(work.max_new_tokens))
    record.wait(work.model.device.type)
    seconds = time.perf_counter() - start
    assert torch.equal(rollouts.mask.sum(dim=1).cpu(), lengths)
    return seconds


def transformers(work: Workload, lengths: Tensor, seed: int) -> float:
    """Sample all responses with `generate`; return seconds."""
    from transformers import GenerationConfig, StoppingCriteriaList

    padded = left_pad(work.prompts, work.pad_id)
    ids, mask = (x.repeat_interleave(work.group_size, dim=0).to(work.model.device) for x in padded)
    width = ids.shape[1]
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=work.max_new_tokens,
        pad_token_id=work.pad_id,
        eos_token_id=None,
        use_cache=True,
    )

    def ended(input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        return input_ids.shape[1] - width >= lengths.to(input_ids.device)

    torch.manual_seed(seed)
    start = time.perf_counter()
    with torch.inference_mode():
        out = work.model.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([ended]),
        )
    record.wait(work.model.device.type)
    seconds = time.perf_counter() - start
    assert out.shape[1] == width + int(lengths.max())
    return seconds


def compare(work: Workload, lengths: Tensor, rounds: int) -> dict[str, object]:
    """Run both sides in turns, after one uncounted round of a few tokens; return useful tokens/s and their ratio."""
    warm = lengths.clamp(max=4)
    ours(work, warm, 0)
    transformers(work, warm, 0)
    useful = int(lengths.sum())
    rates: dict[str, list[float]] = {"ours": [], "generate": []}
    for seed in range(rounds):
        for name, run in (("ours", ours), ("generate", transformers))[:: 1 if seed % 2 else -1]:
            rates[name].append(useful / run(work, lengths, seed))
    ratios = [a / b for a, b in zip(rates["ours"], rates["generate"], strict=True)]
    summary = {name: record.spread(values) for name, values in (*rates.items(), ("ratio", ratios))}
    return {"useful_tokens": useful, **summary}


def main() -> None:
    """Measure the workloads and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["W1", "W2"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    kept = "generate" if args.device == "cpu" else "generate_cuda"
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    result = record.read(kept)
    for name in args.workloads:
        work = WORKLOADS[name]()
        if gpu:
            work.model.to(args.device, torch.bfloat16)
        result[name] = {
            **record.about("generate", ("torch", "transformers"), torch.get_num_threads(), gpu),
            "dtype": str(work.model.dtype).removeprefix("torch."),
            "rounds": args.rounds,
        }
        for kind, lengths in (("full", work.full_lengths()), ("geometric", work.geometric_lengths())):
            found = result[name][kind] = compare(work, lengths, args.rounds)
            shown = "  ".join(
                f"{key} {found[key]['median']:.5g} ({found[key]['least']:.5g} to {found[key]['most']:.5g})"
                for key in ("ours", "generate", "ratio")
            )
            print(f"{name} {kind:9} {shown}", flush=True)
    record.keep(kept, result)


if __name__ == "__main__":
    main()
