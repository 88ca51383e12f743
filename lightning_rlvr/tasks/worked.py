"""Worked solutions of reasoning_gym's chain sums, from which the embedded policy learns to answer at all."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_rlvr.tasks.template import Template
from lightning_rlvr.types import Teacher, UserError


@dataclass(frozen=True)
class WorkedChainSum(Teacher):
    """Sums like `3 + 4 - 2 =`, each answered in one of three valid ways.

    | style | solution to `3 + 4 - 2 =` |
    |---|---|
    | direct | `#5` |
    | in_order | `3+4=7-2=5#5`: running totals from left to right |
    | any_order | `-2+3=1+4=5#5`: running totals over a random order of the terms |

    The style is drawn anew for each example and cannot be read off the question, so a policy taught by it
    spreads its probability over all of them. The styles differ in how often a small model gets them right:
    that is what reinforcement learning can find out.

    A task built as `ReasoningGym(name="chain_sum", prompt_template="{expression} =", ...)` with the same
    terms and digits asks the same kind of question. reasoning_gym seeds an item with seed + index, so
    neighbouring seeds overlap; examples here come from the indices `first_index` to `last_index`, to be kept
    clear of those of the tasks.

    Args:
        min_terms, max_terms, min_digits, max_digits: difficulty, as in reasoning_gym.
        direct, in_order, any_order: shares of the styles; they sum to 1.
        prompt_template: text with keys of the reasoning_gym entry's metadata, as in tasks.ReasoningGym.
        marker: what precedes the final answer.
        question_seed: seed of the reasoning_gym data set; the order of examples has its own.
        first_index, last_index: range of the data set's indices to draw from, the last one excluded.
    """

    min_terms: int = 5
    max_terms: int = 5
    min_digits: int = 1
    max_digits: int = 1
    direct: float = 0.35
    in_order: float = 0.35
    any_order: float = 0.3
    prompt_template: str = "{expression} ="
    marker: str = "#"
    question_seed: int = 0
    first_index: int = 100_000_000
    last_index: int = 200_000_000

    def __post_init__(self) -> None:
        Template.parse(self.prompt_template)
        shares = {key: getattr(self, key) for key in ("direct", "in_order", "any_order")}
        if min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
            raise UserError(
                f"The shares of the styles must be 0 or more and sum to 1, got {shares}: each example is "
                "answered in one style. Set direct, in_order and any_order of the teacher's init_args."
            )
        if not 0 <= self.first_index < self.last_index:
            raise UserError(
                f"first_index must lie in [0, last_index), got {self.first_index} and {self.last_index}: "
                "examples are drawn from that range. Set first_index of the teacher's init_args."
            )

    def examples(self, seed: int) -> Iterator[tuple[str, str]]:
        """Yield (prompt text, solution text) without end, determined by `seed`.

        Raises: UserError if the template names a key that the entries' metadata lacks, or the difficulty is
        none that reasoning_gym accepts.
        """
        rng = random.Random(seed)
        questions, template = self._questions(), Template.parse(self.prompt_template)
        styles, shares = (direct, in_order, any_order), (self.direct, self.in_order, self.any_order)
        while True:
            metadata = questions[rng.randrange(self.first_index, self.last_index)]["metadata"]
            (style,) = rng.choices(styles, shares)
            terms = parse_terms(metadata["expression"])
            yield template.render(metadata), f"{style(terms, rng)}{self.marker}{sum(map(int, terms))}"

    def _questions(self) -> Any:
        import reasoning_gym

        try:
            return reasoning_gym.create_dataset(
                "chain_sum",
                min_terms=self.min_terms,
                max_terms=self.max_terms,
                min_digits=self.min_digits,
                max_digits=self.max_digits,
                seed=self.question_seed,
                size=self.last_index,
            )
        except AssertionError as error:
            raise UserError(
                f"chain_sum must have 1 <= min <= max for terms and digits, got {self}: {error}. "
                "Set them in the teacher's init_args."
            ) from error


def parse_terms(expression: str) -> list[str]:
    """Read the terms of a sum, each with its sign (a zero keeps its own).

    >>> parse_terms("3 + 4 - 0")
    ['+3', '+4', '-0']
    """
    first, *rest = expression.split()
    return [f"+{first}", *(sign + value for sign, value in zip(rest[::2], rest[1::2], strict=True))]


def direct(terms: Sequence[str], rng: random.Random) -> str:
    """Return no derivation."""
    return ""


def in_order(terms: Sequence[str], rng: random.Random) -> str:
    """Write the running totals from left to right.

    >>> in_order(["+3", "+4", "-2"], random.Random(0))
    '3+4=7-2=5'
    """
    total, text = int(terms[0]), terms[0].removeprefix("+")
    for term in terms[1:]:
        total += int(term)
        text += f"{term}={total}"
    return text


def any_order(terms: Sequence[str], rng: random.Random) -> str:
    """Write the running totals over a random order of the terms."""
    return in_order(rng.sample(terms, len(terms)), rng)
