"""Where the final answer stands in a response. Model output is untrusted: every function takes linear time
and looks only at the last TAIL characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

TAIL = 20_000  # characters: a final answer further from the end than that is not found
JOINT = 40  # characters between two boxes of one answer
_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[\s\S]|[{}]")
_JOINED = re.compile(r"[\s$]*(?:,|;|,?[\s$]*(?:\\text ?\{)?\s*\b(?:and|or)\b\s*\}?)[\s$]*")


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last \boxed{...} (or \fbox) whose braces close, None if there is none.

    Of nested boxes the inner one counts: it opens last. Boxes that nothing but a comma, `and` or `or` joins are the
    parts of one answer.

    >>> last_boxed(r"first \boxed{1}, then \boxed{\frac{1}{2}} and \boxed{3")
    '\\frac{1}{2}'
    >>> last_boxed(r"Not \boxed{7}: $x = \boxed{1}$ or $x = \boxed{2}$, hence $\boxed{1}$ and $\boxed{2}$.")
    '1, 2'
    """
    tail = text[-TAIL:]
    parts: list[str] = []
    following = None
    for opens, start, end in sorted(_closed_boxes(tail), reverse=True):
        between = tail[end + 1 : following]
        if parts and (len(between) > JOINT or not _JOINED.fullmatch(between)):
            break
        parts.append(tail[start:end].strip())
        following = opens
    return ", ".join(dict.fromkeys(reversed(parts))) if parts else None


def _closed_boxes(text: str) -> Iterator[tuple[int, int, int]]:
    """Yield where each box whose braces close begins, and where its content begins and ends."""
    open_braces: list[tuple[int, int] | None] = []  # a box, None for a plain brace
    for token in _TOKEN.finditer(text):
        piece = token.group()
        if len(piece) > 2:
            open_braces.append(token.span())
        elif piece == "{":
            open_braces.append(None)
        elif piece == "}" and open_braces:
            box = open_braces.pop()
            if box is not None:
                yield *box, token.start()


def after_hashes(text: str) -> str | None:
    r"""Return what follows #### on the last line that is not blank, as in GSM8K; None if nothing does.

    Elsewhere #### is a heading of Markdown.

    >>> after_hashes("so 5 apples a day. #### 1,234")
    '1,234'
    >>> after_hashes("#### Final answer\nThe answer is 42.") is None
    True
    """
    last_line = text[-TAIL:].rstrip().rpartition("\n")[2]
    _, hashes, found = last_line.rpartition("####")
    return found.strip() or None if hashes else None


def marked_answer(text: str) -> str | None:
    r"""Return the last \boxed{...}, else what follows #### on the last line, else None."""
    boxed = last_boxed(text)
    return after_hashes(text) if boxed is None else boxed


def last_lines(text: str, characters: int) -> str:
    """Return the end of the text, from the start of a line where one begins in the last `characters`."""
    if len(text) <= characters:
        return text
    tail = text[-characters:]
    _, newline, rest = tail.partition("\n")
    return rest if newline and rest.strip() else tail
