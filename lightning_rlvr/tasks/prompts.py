"""What every source does with its finished list of prompts."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_rlvr.types import Prompt


def drop_repeats(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Keep the first prompt of each text, in order. Texts are compared as they are, answers are not.

    >>> [p.uid for p in drop_repeats([Prompt("a", "1+1", "2"), Prompt("b", "1+1", "2")])]
    ['a']
    """
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.text, prompt)
    return list(first.values())
