"""Time and memory of the vocabulary head, forward and backward: ours, all logits at once, and TRL's.

    pip install trl==1.16.0                # the only extra requirement, and of this script alone
    python -m benchmarks.head [--tokens 4096] [--rounds 5]

Each head gets the hidden states of rows of 128 tokens at the sizes of SmolLM2-135M (vocabulary 49,152, hidden 576,
float32), gives log-probability and entropy of each token, and the gradient of a weighted sum of the log-probabilities
with respect to hidden states and weight. The entropy is recorded without a gradient, as TRL's GRPOTrainer does without
an entropy bonus.

    one_pass   linear_logprob_loss        recompute  linear_logprob
    plain      ops.logprob on all logits
    trl        the function that GRPOTrainer's model calls, with the vocabulary tile that it is called with
    trl_cut    the same, 8 rows a call: micro-batches of this size are GRPOTrainer's fastest with this model on CPU

The heads take turns. Prints and adds to benchmarks/results/head.json: seconds (median, least, most), extra memory
(peak resident set over that before the call, gradients included), ratios to one_pass by round, and how far gradients
are from the plain ones. Linux only: the peak is reset through /proc.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import record
from lightning_rlvr.ops.linear_logprob import linear_logprob, linear_logprob_loss
from lightning_rlvr.ops.logprob import entropy, log_softmax, token_logp

VOCABULARY, HIDDEN, ROW, CUT = 49152, 576, 128, 8 * 128

# (hidden, weight, target, coefficient of each log-probability) -> entropy; adds gradients to hidden and weight.
Head = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def one_pass(hidden: Tensor, weight: Tensor, target: Tensor, coefficient: Tensor) -> Tensor:
    """Gradient formed in the forward pass."""
    rows = torch.full((len(target) // ROW,), ROW)

    def loss_of(logp: Tensor, entropy: Tensor | None, rows: slice) -> Tensor:
        return logp @ coefficient[rows.start * ROW : rows.stop * ROW]

    loss, values = linear_logprob_loss(hidden, weight, target, rows, loss_of)
    loss.backward()
    return values.entropy


def recompute(hidden: Tensor, weight: Tensor, target: Tensor, coefficient: Tensor) -> Tensor:
    """Logits computed again in the backward pass."""
    values = linear_logprob(hidden, weight, target)
    (values.logp @ coefficient).backward()
    return values.entropy.detach()


def plain(hidden: Tensor, weight: Tensor, target: Tensor, coefficient: Tensor) -> Tensor:
    """All logits at once."""
    logp = log_softmax(torch.nn.functional.linear(hidden, weight))
    with torch.no_grad():
        recorded = entropy(logp)
    (token_logp(logp, target) @ coefficient).backward()
    return recorded


def trl(hidden: Tensor, weight: Tensor, target: Tensor, coefficient: Tensor) -> Tensor:
    """TRL's fused head, called as its add_fused_lm_head does for GRPOTrainer."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    logp, recorded, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, None, target, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs", "entropy")
    )
    (logp @ coefficient).backward()
    return recorded.detach()


def trl_cut(hidden: Tensor, weight: Tensor, target: Tensor, coefficient: Tensor) -> Tensor:
    """TRL's fused head on micro-batches."""
    parts = zip(*(x.split(CUT) for x in (hidden, target, coefficient)), strict=True)
    return torch.cat([trl(h, weight, t, c) for h, t, c in parts])


HEADS: dict[str, Head] = {f.__name__: f for f in (one_pass, recompute, plain, trl, trl_cut)}


def problem(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states, weight (logits have a standard deviation of 2.4), targets and coefficients."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN, generator=generator) / 10).requires_grad_()
    target = torch.randint(VOCABULARY, (tokens,), generator=generator)
    return hidden, weight, target, torch.randn(tokens, generator=generator)


def measure(head: Head, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """Run a head once, leaving its gradients in the inputs; return seconds and extra GiB."""
    inputs[0].grad = inputs[1].grad = None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    start = time.perf_counter()
    head(*inputs)
    return time.perf_counter() - start, (resident("VmHWM") - before) / 2**20


def resident(field: str) -> int:
    """Return the resident set, or its peak, in KiB."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def distance(got: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest relative distance of tensors, in norm."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))


def compare(tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Run the heads in turn; return the figures of each."""
    small, inputs = problem(CUT), problem(tokens)
    for head in HEADS.values():  # imports and first allocations
        measure(head, small)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in HEADS}
    gradients: dict[str, list[Tensor]] = {}
    for _ in range(rounds):
        for name, head in HEADS.items():
            runs[name].append(measure(head, inputs))
            gradients[name] = [x.grad for x in inputs[:2]]
    seconds = {name: [run[0] for run in of] for name, of in runs.items()}
    figures = {}
    for name, of in seconds.items():
        ratios = [a / b for a, b in zip(of, seconds["one_pass"], strict=True)]
        figures[name] = {
            "seconds": statistics.median(of),
            "seconds_range": [min(of), max(of)],
            "times_one_pass": statistics.median(ratios),
            "times_one_pass_range": [min(ratios), max(ratios)],
            "extra_gib": max(run[1] for run in runs[name]),
            "gradient_distance": distance(gradients[name], gradients["plain"]),
        }
    return figures


def main() -> None:
    """Measure at one number of tokens and write the result beside those of others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help=f"a multiple of {ROW}")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    figures = compare(args.tokens, args.rounds)
    for name, of in figures.items():
        print(
            f"{args.tokens:6} tokens  {name:10} {of['seconds']:6.2f} s  {of['extra_gib']:5.2f} GiB  "
            f"{of['times_one_pass']:5.2f} x one_pass  gradient off by {of['gradient_distance']:.0e}"
        )
    result = record.read("head")
    result[f"{args.tokens} tokens"] = {
        **record.about("head", ("torch", "transformers", "trl"), torch.get_num_threads()),
        "rounds": args.rounds,
        **figures,
    }
    record.keep("head", result)


if __name__ == "__main__":
    main()
