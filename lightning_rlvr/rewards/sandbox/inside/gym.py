"""Scores answers by scorers of reasoning_gym that evaluate them as Python.

Only plain arithmetic gets as far as a scorer: no attribute, text, index or call but of the functions named here, so an
answer can take long or fill the memory, and then it ends this process; it cannot do anything else.
"""

from __future__ import annotations

import ast
import json
import os
import signal
from types import CodeType
from typing import Any

_PLAIN = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Load, ast.Name)
_FUNCTIONS = {"sin", "cos", "tan", "exp", "log", "ln", "sqrt", "asin", "acos", "atan", "sinh", "cosh", "tanh", "Abs"}


def is_arithmetic(text: str) -> bool:
    """Say whether the text is numbers, names, operators and calls of mathematical functions only.

    >>> is_arithmetic("x**2 / 2 + sin(2*x) + C"), is_arithmetic("(1).real"), is_arithmetic("exit()")
    (True, False, False)
    """
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_is_plain(node) for node in nodes)


def _is_plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords
    return isinstance(node, _PLAIN) and "_" not in getattr(node, "id", "")


def main(code: CodeType, setup: dict[str, Any]) -> None:
    """Print a line for each item: its score, null if the answer is no arithmetic. The alarm ends a slow one."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # its threads' stacks would count as memory
    from reasoning_gym.factory import DATASETS

    report = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for text in setup["items"]:
        item = json.loads(text)
        signal.setitimer(signal.ITIMER_REAL, setup["timeout_s"])
        dataset, settings = DATASETS[item["name"]]
        plain = is_arithmetic(item["answer"])
        scorer = dataset(config=settings(**item["config"])).score_answer
        score = float(scorer(item["answer"], item["entry"])) if plain else None
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(report, json.dumps(score).encode() + b"\n")
