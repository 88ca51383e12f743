"""Chains of running results, `8*3=24-5=19+2=21`, checked step by step."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_rlvr.types import Prompt, Response, Reward, Status, UserError, Verdict

DIGITS = 6  # the most of a number that is looked at
_CHAIN = re.compile(rf"\s*(\d{{1,{DIGITS}}})((?:[+*-]\d{{1,{DIGITS}}}=-?\d{{1,{DIGITS}}})+)\s*", re.ASCII)
_STEP = re.compile(r"([+*-])(\d+)=(-?\d+)", re.ASCII)


@dataclass(frozen=True)
class ChainAnswer(Reward):
    """Score 1.0 if the response is a chain of running results that reaches the target and keeps to the puzzle's rule.

    Every step must be right, the last must come to metadata["target"], and the numbers must be those of
    metadata["numbers"], each used once; or, without those, metadata["terms"] different ones from 1 to
    metadata["largest"] that begin with metadata["start"]. Tasks Countdown and MakeNumber say so of their puzzles.

    The final answer is the chain's formula in one form for all orders of its sums and products, whatever the chain says
    that it comes to: `8*3=24+2=26` and `3*8=24+2=26` mean the same.
    """

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError if a prompt does not say what its chain must come to and be made of."""
        for prompt in prompts:
            known = prompt.metadata
            if "target" not in known or not ("numbers" in known or {"start", "terms", "largest"} <= known.keys()):
                raise UserError(
                    f"metadata must hold target, and numbers or start, terms and largest, got {sorted(known)} for "
                    f"question {prompt.uid!r}: the reward checks chains by them. Use the tasks Countdown or MakeNumber."
                )

    def __call__(self, responses: Sequence[Response], prompts: Sequence[Prompt]) -> list[Verdict]:
        """Judge responses[i] as an answer to prompts[i]; UNPARSABLE where it is no chain."""
        return [_judge(r.text, p.metadata) for r, p in zip(responses, prompts, strict=True)]


def _judge(text: str, rule: Mapping[str, Any]) -> Verdict:
    match = _CHAIN.fullmatch(text)
    if match is None:
        return Verdict(0.0, Status.UNPARSABLE)
    result, holds = int(match[1]), True
    numbers, operators = [result], list[str]()
    for operator, number, said in _STEP.findall(match[2]):
        numbers.append(int(number))
        operators.append(operator)
        result = _apply(operator, result, int(number))
        holds = holds and result == int(said)
    right = holds and result == rule["target"] and _allowed(numbers, rule)
    return Verdict(float(right), Status.CORRECT if right else Status.WRONG, formula(numbers, operators))


def _allowed(numbers: Sequence[int], rule: Mapping[str, Any]) -> bool:
    if "numbers" in rule:
        return sorted(numbers) == sorted(rule["numbers"])
    distinct = len(set(numbers)) == len(numbers) == rule["terms"]
    return distinct and numbers[0] == rule["start"] and all(1 <= number <= rule["largest"] for number in numbers)


def formula(numbers: Sequence[int], operators: Sequence[str]) -> str:
    """Return a chain's formula in one form for all orders of its sums and products.

    Runs of + and - are a sum, runs of * a product, each with what came before as one of its parts.

    >>> formula([2, 8, 3], ["*", "+"]), formula([3, 2, 8, 1], ["+", "*", "-"])
    ('(2*8)+3', '((2+3)*8)-1')
    >>> formula([8, 2, 3], ["*", "+"]) == formula([2, 8, 3], ["*", "+"])
    True
    """
    parts, run = [("+", str(numbers[0]))], ""  # of the run under way, each with its sign
    for operator, number in zip(operators, numbers[1:], strict=True):
        kind = "*" if operator == "*" else "+"
        if run and kind != run:
            parts = [("+", f"({_joined(parts, run)})")]
        run = kind
        parts.append((operator, str(number)))
    return _joined(parts, run)


def _joined(parts: Sequence[tuple[str, str]], run: str) -> str:
    if run == "*":
        return "*".join(sorted(text for _, text in parts))
    return "".join(sign + text for sign, text in sorted(parts)).removeprefix("+")


def _apply(operator: str, a: int, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[operator]
