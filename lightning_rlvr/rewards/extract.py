"""Where the final answer stands in a response. Model output is untrusted: every function takes linear time
and looks only at the last TAIL characters.
"""

from __future__ import annotations

import re

TAIL = 20_000  # characters: a final answer further from the end than that is not found
_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[\s\S]|[{}]")


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last \boxed{...} (or \fbox) whose braces close, None if there is none.

    Of nested boxes the inner one counts: it opens last.

    >>> last_boxed(r"first \boxed{1}, then \boxed{\frac{1}{2}} and \boxed{3")
    '\\frac{1}{2}'
    """
    open_braces: list[int | None] = []  # the content's start for a box, None for a plain brace
    best: tuple[int, int] | None = None
    tail = text[-TAIL:]
    for token in _TOKEN.finditer(tail):
        piece = token.group()
        if len(piece) > 2:
            open_braces.append(token.end())
        elif piece == "{":
            open_braces.append(None)
        elif piece == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, token.start())
    return None if best is None else tail[best[0] : best[1]].strip()


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
