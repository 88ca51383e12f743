"""Where the time of scoring goes: 1,000 questions of the quickstart with 8 samples each.

    python -m benchmarks.score [--questions 1000] [--reward exact|math]

Scores as `python -m lightning_rlvr score` does, with the quickstart's policy (made if it is not cached), and prints the
seconds spent sampling, decoding text, judging, clustering and the rest (entropies, writing). Writes
benchmarks/results/score_{exact,math}.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from lightning_rlvr.curriculum.score import Scoring, score_questions
from lightning_rlvr.models import Embedded, PromptFormat
from lightning_rlvr.rewards import ExactMatch, MathAnswer
from lightning_rlvr.rollout import TransformersEngine
from lightning_rlvr.store import Store
from lightning_rlvr.tasks import ReasoningGym, WorkedChainSum
from lightning_rlvr.types import Prompt, Response, Reward, Verdict


class Parts:
    """Adds up seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, its time counted under a name."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

        return call


class Timed(Reward):
    """A reward whose judging and comparing are timed."""

    def __init__(self, reward: Reward, parts: Parts) -> None:
        self._judge = parts.timed("judge", reward.__call__)
        self._equivalent = parts.timed("cluster", reward.equivalent)

    def __call__(self, responses: Sequence[Response], prompts: Sequence[Prompt]) -> list[Verdict]:
        """Judge, timed."""
        verdicts: list[Verdict] = self._judge(responses, prompts)
        return verdicts

    def equivalent(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Compare, timed."""
        same: list[bool] = self._equivalent(pairs)
        return same


def main() -> None:
    """Score once and write where the time went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--reward", choices=["exact", "math"], default="exact")
    args = parser.parse_args()
    terms = {"min_terms": 5, "max_terms": 5, "min_digits": 1, "max_digits": 1}
    prompts = ReasoningGym("chain_sum", args.questions, config=terms, prompt_template="{expression} =").load()
    source = Embedded(WorkedChainSum(), seed=1)
    source.prepare()
    policy = source.load()
    engine = TransformersEngine.of(policy)
    judge = ExactMatch(answer_pattern=r"#(-?\d+)$") if args.reward == "exact" else MathAnswer()
    judge(*zip(*[(Response(p.answer), p) for p in prompts[:64]], strict=True))  # starts its processes

    parts = Parts()
    reward = Timed(judge, parts)
    engine.generate = parts.timed("generate", engine.generate)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "scores.parquet", {})
        start = time.perf_counter()
        score_questions(
            prompts,
            lambda text: PromptFormat().encode(policy.tokenizer, text),
            parts.timed("decode", policy.decode),
            engine,
            reward,
            Scoring(),
            40,
            store,
            set(),
        )
        store.finish([prompt.uid for prompt in prompts])
        total = time.perf_counter() - start
    judge.close()
    seconds = {**parts.seconds, "rest": total - sum(parts.seconds.values()), "total": total}
    result = {
        **record.about("score", ("torch", "transformers")),
        "questions": args.questions,
        "samples": Scoring().samples,
        "seconds": seconds,
        "share_generating": parts.seconds["generate"] / total,
    }
    for name, value in seconds.items():
        print(f"{name:9} {value:7.2f} s  {value / total:6.1%}")
    record.keep(f"score_{args.reward}", result)


if __name__ == "__main__":
    main()
