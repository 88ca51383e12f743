"""Whether a server samples from the model that our own engine samples from: greedy tokens, and log-probabilities.

    vllm serve FOLDER --served-model-name m --dtype float32
    python -m benchmarks.served --url http://localhost:8000/v1 --model m --folder FOLDER [--server vllm]

Prompts are random letters and digits. Greedy responses must have the same tokens; where they part, the first token that
differs is printed with our log-probabilities of both. Of sampled tokens the log-probabilities that the server told are
compared with those that the training pass computes. Writes benchmarks/results/served.json, and exits with 1 where they
disagree.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from benchmarks import record
from lightning_rlvr.models import Policy, Pretrained
from lightning_rlvr.models.forward import response_logp
from lightning_rlvr.rollout import Served, ServedEngine, TransformersEngine
from lightning_rlvr.types import Sampling

TOLERANCE = 1e-3  # nats, in float32: kernels differ


def prompts_of(policy: Policy, number: int, length: int) -> list[list[int]]:
    """Return prompts whose text is read as the same tokens again, for servers that take text."""
    letters = policy.tokenizer("0123456789+-*/=abcdefgh", add_special_tokens=False)["input_ids"]
    drawn = torch.randint(len(letters), (number, length), generator=torch.Generator().manual_seed(0))
    texts = [policy.tokenizer.decode([letters[i] for i in row]) for row in drawn.tolist()]
    return [list(policy.tokenizer(text)["input_ids"]) for text in texts]


@torch.no_grad()
def greedy(policy: Policy, server: ServedEngine, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Compare greedy responses; print where they part."""
    sampling, seeds = Sampling(tokens, temperature=0.0), [0] * len(prompts)
    ours = TransformersEngine.of(policy).generate(prompts, seeds, 1, sampling)
    theirs = server.generate(prompts, seeds, 1, sampling)
    same = 0
    for row in range(len(prompts)):
        a, b = ours.response_ids[row][ours.mask[row]].tolist(), theirs.response_ids[row][theirs.mask[row]].tolist()
        at = next((t for t, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        same += a == b
        if at is not None:  # else one is the other's beginning
            logp = policy.model(torch.tensor([prompts[row] + a[:at]])).logits[0, -1].log_softmax(-1)
            chosen = [f"{policy.tokenizer.decode([x])!r} ({float(logp[x]):.4f} nats)" for x in (a[at], b[at])]
            print(f"prompt {row}, token {at}: ours {chosen[0]}, the server's {chosen[1]}")
    return {"responses": len(prompts), "same": same, "tokens": int(ours.mask.sum())}


@torch.no_grad()
def sampled(
    policy: Policy, server: ServedEngine, prompts: list[list[int]], tokens: int, samples: int
) -> dict[str, Any]:
    """Compare the log-probabilities of sampled tokens, where the server tells them."""
    start = time.perf_counter()
    rollouts = server.generate(prompts, list(range(len(prompts))), samples, Sampling(tokens))
    seconds = time.perf_counter() - start
    gap = (response_logp(policy.model, rollouts, 1.0).logp - rollouts.logp)[rollouts.mask].abs()
    told = gap[~gap.isnan()]
    return {
        "tokens": len(gap),
        "tokens_per_second": round(len(gap) / seconds, 1),
        "logp_told": len(told),
        "greatest_gap": float(told.max()) if len(told) else None,
        "mean_gap": float(told.mean()) if len(told) else None,
    }


def main() -> None:
    """Compare and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True, help="its name at the server")
    parser.add_argument("--folder", required=True, help="of the same model, in Hugging Face format")
    parser.add_argument("--server", default="vllm", choices=["vllm", "transformers", "openai"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    policy = Pretrained(args.folder).load()
    served = Served(args.url, args.model, args.folder, args.server)
    server, prompts = ServedEngine(served, policy.tokenizer), prompts_of(policy, args.prompts, 12)
    found = {
        "greedy": greedy(policy, server, prompts, args.tokens),
        "sampled": sampled(policy, server, prompts, args.tokens, args.samples),
    }
    print(found)
    kept = {**record.read("served").get("servers", {}), args.server: found}
    record.keep("served", {**record.about("served", ("torch", "transformers", "openai")), "servers": kept})
    agree = found["greedy"]["same"] == len(prompts) and (found["sampled"]["greatest_gap"] or 0.0) <= TOLERANCE
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
