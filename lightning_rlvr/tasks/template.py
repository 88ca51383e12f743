"""Prompt templates that can only substitute: plain {names}, nothing of str.format's attribute access."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_rlvr.types import UserError

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True)
class Template:
    """A parsed template: pieces of literal text, each followed by the name of a value (None after the last).

    >>> Template.parse("Q: {question} Use {{}}.").render({"question": "1 + 1?"})
    'Q: 1 + 1? Use {}.'
    """

    pieces: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Parse `text`; {name} stands for a value, {{ and }} for braces.

        A name is taken whole and looked up as it stands, so "{question.__class__}" is an error.
        Raises: UserError for a lone brace, for anything but a plain name, and if no name occurs at all
        (all prompts would be the same).
        """
        pieces: list[tuple[str, str | None]] = []
        literal, end = "", 0
        for match in _TOKEN.finditer(text):
            literal += text[end : match.start()]
            end = match.end()
            token, name = match.group(), match.group(1)
            if token in ("{{", "}}"):
                literal += token[0]
                continue
            if name is None or not name.strip() or set(name) & set(".[]!:"):
                raise UserError(
                    f"prompt_template must hold plain {{names}} only, got {token!r} in {text!r}: values are "
                    "put in as they are. Write {{ and }} for braces, or change the task's prompt_template."
                )
            pieces.append((literal, name))
            literal = ""
        if not pieces:
            raise UserError(
                f"prompt_template must name a value such as {{question}}, got {text!r}: every prompt would "
                "read the same. Change the task's prompt_template."
            )
        return cls((*pieces, (literal + text[end:], None)))

    @property
    def names(self) -> tuple[str, ...]:
        """The names in the order of their first use."""
        return tuple(dict.fromkeys(name for _, name in self.pieces if name is not None))

    def check(self, available: Iterable[str]) -> None:
        """Raise UserError, listing what is available, if a name is not."""
        known = set(available)
        missing = [name for name in self.names if name not in known]
        if missing:
            raise UserError(
                f"prompt_template must use values that exist, got {missing[0]!r}: available are "
                f"{', '.join(sorted(known)) or 'none'}. Change the task's prompt_template."
            )

    def render(self, values: Mapping[str, Any]) -> str:
        """Return the text with str(value) in place of each name; braces inside values stay as they are.

        Raises: UserError if a value is missing.
        """
        self.check(values)
        return "".join(literal if name is None else literal + str(values[name]) for literal, name in self.pieces)
