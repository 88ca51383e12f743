"""What verdicts depend on, as manifests name it: the same in every process."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from lightning_rlvr.types import Prompt, UserError

_ADDRESS = re.compile(r" at 0x[0-9a-f]+(?=>)")  # of an object without a __repr__ of its own, at any depth


def shown(part: object, setting: str) -> str:
    """Return the repr of a reward or a prompt format: results are kept by it.

    Raises: UserError if it shows an address in memory, which is another in each process; it names the setting.
    """
    text = repr(part)
    found = _ADDRESS.search(text)
    if found is not None:
        raise UserError(
            f"{type(part).__name__} must have a __repr__ that shows its settings, and so must all that it is made of: "
            f"results are kept by it, but {text[: found.end() + 1][-200:]} names an address in memory. Add one to that "
            f"class, or set {setting}."
        )
    return text


def questions_digest(questions: Sequence[Prompt]) -> str:
    """Hash questions in their order, with all that verifiers read: gold answers and metadata.

    What has no text of its own there, such as a picture, counts by its kind alone.
    """
    rows = "\n".join(repr((p.uid, p.text, p.answer, dict(p.metadata))) for p in questions)
    return hashlib.sha256(_ADDRESS.sub("", rows).encode()).hexdigest()
