"""Number puzzles with many right answers, and worked solutions from which the embedded policy learns to try.

A solution is a chain of running results, each step one operation on the last: `8*3=24-5=19+2=21`. The reward
ChainAnswer checks every step of it.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, NamedTuple

from lightning_rlvr.tasks.template import Template
from lightning_rlvr.types import Prompt, Task, Teacher, UserError

HELD_OUT_SHARE = 8  # one puzzle in so many is held out
MOST_TRIES = 10_000  # draws in a row without a new puzzle, after which there are none left


class Chain(NamedTuple):
    """Numbers joined by operators, evaluated from left to right."""

    numbers: tuple[int, ...]
    operators: tuple[str, ...]
    results: tuple[int, ...]  # the first number, then what each step comes to

    def __str__(self) -> str:
        """Write it as a solution.

        >>> str(Chain((8, 3, 5), ("*", "-"), (8, 24, 19)))
        '8*3=24-5=19'
        """
        steps = zip(self.operators, self.numbers[1:], self.results[1:], strict=True)
        return str(self.numbers[0]) + "".join(f"{operator}{number}={result}" for operator, number, result in steps)


@dataclass(frozen=True)
class Puzzles(Task, Teacher):
    """What the puzzles have in common; a task and the teacher of it are the same class with the same settings.

    A puzzle is made from a random chain of `terms` numbers from 1 to `largest` with the operators, all of whose
    results lie in 0 to `limit`, so each can be solved. A hash of itself says whether it is held out: no training
    question and no example of the teacher is ever a held-out one.

    Args:
        size: how many questions.
        split: train, or held_out.
        terms: the numbers of a solution.
        largest: the largest number.
        operators: those a solution may use, out of + - *.
        limit: the largest result of a step.
        prompt_template: text with the values that the puzzle has.
        seed: decides the questions.
    """

    size: int = 1024
    split: Literal["train", "held_out"] = "train"
    terms: int = 4
    largest: int = 9
    operators: str = "+-*"
    limit: int = 99
    prompt_template: str = "{target}"
    seed: int = 0

    def __post_init__(self) -> None:
        Template.parse(self.prompt_template)
        for key, least in (("size", 1), ("terms", 2), ("largest", 1), ("limit", self.largest)):
            if getattr(self, key) < least:
                raise UserError(
                    f"{key} must be at least {least}, got {getattr(self, key)}: it shapes the puzzles. Set {key} of "
                    "the task's init_args."
                )
        if not self.operators or set(self.operators) - set("+-*"):
            raise UserError(f"operators must be some of + - *, got {self.operators!r}. Set the task's operators.")

    def load(self) -> list[Prompt]:
        """Return `size` different questions. Raises UserError if there are not as many."""
        template, rng = Template.parse(self.prompt_template), random.Random(f"questions {self.seed}")
        found: dict[str, Prompt] = {}
        tries = 0
        while len(found) < self.size:
            chain, tries = self._chain(rng), tries + 1
            values = self._values(chain)
            key = " ".join(values.values())
            if key not in found and self._belongs(key, self.split):
                metadata = {"target": chain.results[-1], **self._rule(chain)}
                found[key] = Prompt(f"{self._name()}/{key}", template.render(values), str(chain), metadata)
                tries = 0
            if tries == MOST_TRIES:
                raise UserError(
                    f"size must be at most the number of different puzzles, got {self.size} where {MOST_TRIES} draws "
                    f"gave none beyond {len(found)}. Lower the task's size, or raise terms, largest or limit."
                )
        return list(found.values())

    def examples(self, seed: int) -> Iterator[tuple[str, str]]:
        """Yield (prompt text, solution) without end, determined by `seed`; none of a puzzle that is held out."""
        template, rng = Template.parse(self.prompt_template), random.Random(f"examples {seed}")
        while True:
            chain = self._chain(rng)
            values = self._values(chain)
            if self._belongs(" ".join(values.values()), "train"):
                yield template.render(values), str(chain)

    def _chain(self, rng: random.Random) -> Chain:
        """Draw a chain: numbers, then an operator for each step that keeps the result in range, or all anew."""
        while True:
            numbers = self._numbers(rng)
            results, operators = [numbers[0]], list[str]()
            for number in numbers[1:]:
                operator = rng.choice(self.operators)
                operators.append(operator)
                results.append(apply(operator, results[-1], number))
            if all(0 <= result <= self.limit for result in results):
                return Chain(tuple(numbers), tuple(operators), tuple(results))

    @staticmethod
    def _belongs(key: str, split: str) -> bool:
        held_out = blake2b(key.encode(), digest_size=4).digest()[0] % HELD_OUT_SHARE == 0
        return held_out == (split == "held_out")

    def _name(self) -> str:
        return type(self).__name__.lower()

    @abstractmethod
    def _numbers(self, rng: random.Random) -> Sequence[int]:
        """Draw the numbers of a chain."""

    @abstractmethod
    def _values(self, chain: Chain) -> dict[str, str]:
        """Return what the prompt may say of the puzzle that a chain solves."""

    @abstractmethod
    def _rule(self, chain: Chain) -> dict[str, object]:
        """Return what a solution must keep to, for ChainAnswer."""


@dataclass(frozen=True)
class Countdown(Puzzles):
    """Reach a target with given numbers, each used once: `2 3 5 8>21:`, solved by `8*3=24-5=19+2=21`.

    Its prompt_template has {numbers}, in ascending order, and {target}. See Puzzles for the arguments.
    """

    prompt_template: str = "{numbers}>{target}:"

    def _numbers(self, rng: random.Random) -> Sequence[int]:
        return [rng.randint(1, self.largest) for _ in range(self.terms)]

    def _values(self, chain: Chain) -> dict[str, str]:
        return {"numbers": " ".join(map(str, sorted(chain.numbers))), "target": str(chain.results[-1])}

    def _rule(self, chain: Chain) -> dict[str, object]:
        return {"numbers": sorted(chain.numbers)}


@dataclass(frozen=True)
class MakeNumber(Puzzles):
    """Get from a number to a target in some steps, with numbers of one's own choice: `8>21/3:`, solved as above.

    The numbers must all differ, the first included; `terms` is the most of them that a solution takes, 3 the least. Its
    prompt_template has {start}, {target} and {steps}. See Puzzles for the arguments.
    """

    prompt_template: str = "{start}>{target}/{steps}:"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, value, least, of in (("terms", self.terms, 3, "3"), ("largest", self.largest, self.terms, "terms")):
            if value < least:
                raise UserError(
                    f"{key} must be at least {of}, got {value}: a solution takes 3 to {self.terms} different numbers "
                    f"from 1 to {self.largest}. Set {key} of the task's init_args."
                )

    def _numbers(self, rng: random.Random) -> Sequence[int]:
        return rng.sample(range(1, self.largest + 1), rng.randint(3, self.terms))

    def _values(self, chain: Chain) -> dict[str, str]:
        start, *steps = chain.numbers
        return {"start": str(start), "target": str(chain.results[-1]), "steps": str(len(steps))}

    def _rule(self, chain: Chain) -> dict[str, object]:
        return {"start": chain.numbers[0], "terms": len(chain.numbers), "largest": self.largest}


def apply(operator: str, a: int, b: int) -> int:
    """Return a operator b.

    >>> apply("*", 8, 3)
    24
    """
    return {"+": a + b, "-": a - b, "*": a * b}[operator]
