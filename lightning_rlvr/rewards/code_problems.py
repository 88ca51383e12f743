"""The tests of a programming problem, read from the row that the problem came from.

| columns of the row | form |
|---|---|
| prompt, test, entry_point | HumanEval: a prompt to complete, a test that defines check(candidate) |
| test_list (test_imports or test_setup_code) | MBPP: assert statements |
| public_test_cases, private_test_cases, metadata | LiveCodeBench: standard input and output, or calls of a function |
| input_output: inputs, outputs (fn_name) | APPS, TACO: the same two kinds |

Rows are data of the user's choice, but not all of their making: nothing here runs or unpickles what they hold.
"""

from __future__ import annotations

import ast
import base64
import builtins
import io
import json
import pickle
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

from lightning_rlvr.types import Prompt, UserError

MAX_TESTS = 256 << 20  # bytes of unpacked private tests: a guard against zip bombs


@dataclass(frozen=True)
class Printing:
    """A program reads standard input and prints: (input, expected output) for each test."""

    tests: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Calling:
    """Functions are called.

    Each test is ("assertion", code that raises if it fails) or ("call", (function, arguments and expected value as
    JSON)), or ("lenient call", the same), which takes what the graders of APPS and TACO take: the value alone where a
    list of one is expected, and dicts whose keys are integers, which JSON has not.
    `setup` is code that assertions need around them, `names` are the candidate's functions in them, `before` is put in
    front of the candidate's code.
    """

    tests: tuple[tuple[str, Any], ...]
    setup: str = ""
    names: tuple[str, ...] = ()
    before: str = ""


Problem = Printing | Calling
Row = Mapping[str, Any]


def read_problem(prompt: Prompt) -> Problem:
    """Return the problem's tests. Raises UserError that names the question if its row has none that can be read."""
    row = prompt.metadata
    reader = next((reader for column, reader in _READERS.items() if row.get(column) not in (None, "")), None)
    if reader is None:
        raise UserError(
            f"a row must have tests in one of the columns {', '.join(_READERS)}, got "
            f"{', '.join(map(str, row)) or 'no columns'} for question {prompt.uid!r}: they judge the program. "
            "Choose another data set in the task's init_args, or another reward in reward.class_path."
        )
    try:
        problem = reader(row)
    except (ValueError, KeyError, TypeError, SyntaxError, pickle.UnpicklingError, zlib.error, RecursionError) as error:
        raise UserError(
            f"the tests of a row must be intact, got {type(error).__name__}: {str(error)[:200]} for question "
            f"{prompt.uid!r}: no program could be judged. Repair the row, or set the task's rows."
        ) from error
    if not problem.tests:
        raise UserError(
            f"every row must have at least one test, got none for question {prompt.uid!r}: any program would be "
            "right. Repair the row, or set the task's rows."
        )
    return problem


def _human_eval(row: Row) -> Problem:
    entry = str(row["entry_point"])
    test = _code(f"{row['test']}\n\ncheck({entry})\n")
    _code(row["prompt"])
    return Calling((("assertion", test),), row["prompt"], (entry,), row["prompt"])


def _mbpp(row: Row) -> Problem:
    setup = "\n".join(row.get("test_imports") or []) or row.get("test_setup_code") or ""
    tests = tuple(("assertion", _code(test)) for test in row["test_list"])
    names = free_names("\n".join([setup, *row["test_list"]]))
    return Calling(tests, setup, names)


def _live_code_bench(row: Row) -> Problem:
    cases = [*json.loads(row["public_test_cases"]), *_private(row.get("private_test_cases") or "[]")]
    name = json.loads(row.get("metadata") or "{}").get("func_name")
    if all(case["testtype"] == "stdin" for case in cases):
        return Printing(tuple((case["input"], case["output"]) for case in cases))
    if not name:
        raise ValueError("metadata names no func_name")
    arguments = [[json.loads(line) for line in case["input"].split("\n") if line.strip()] for case in cases]
    return Calling(_calls(name, arguments, [json.loads(case["output"]) for case in cases]))


def _input_output(row: Row) -> Problem:
    found = row["input_output"]
    found = json.loads(found) if isinstance(found, str) else found
    inputs, outputs = found["inputs"], found["outputs"]
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")
    if found.get("fn_name"):
        return Calling(_calls(found["fn_name"], inputs, outputs, "lenient call"))
    pairs = zip(map(_lines, inputs), map(_lines, outputs), strict=True)
    return Printing(tuple(pairs))


_READERS: dict[str, Callable[[Row], Problem]] = {
    "entry_point": _human_eval,
    "test_list": _mbpp,
    "public_test_cases": _live_code_bench,
    "input_output": _input_output,
}


def _calls(
    name: str, arguments: Sequence[Any], expected: Sequence[Any], kind: str = "call"
) -> tuple[tuple[str, Any], ...]:
    pairs = zip(arguments, expected, strict=True)
    return tuple((kind, (name, json.dumps(list(values)), json.dumps(value))) for values, value in pairs)


def _lines(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(map(str, value))


def _code(text: str) -> CodeType:
    return compile(text, "test.py", "exec", dont_inherit=True)


class _TextOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a packed text must hold no object, got {module}.{name}")


def _private(packed: str) -> list[Any]:
    """Read private tests: JSON, or base64 of zlib of a pickled JSON text, from which no class is ever loaded."""
    if not packed.lstrip().startswith("["):
        inflate = zlib.decompressobj()
        data = inflate.decompress(base64.b64decode(packed, validate=True), MAX_TESTS)
        if not inflate.eof:
            raise ValueError(f"private tests must unpack whole to at most {MAX_TESTS} bytes")
        packed = _TextOnly(io.BytesIO(data)).load()
        if not isinstance(packed, str):
            raise TypeError(f"private tests must hold a text, got a {type(packed).__name__}")
    cases: list[Any] = json.loads(packed)
    return cases


def free_names(code: str) -> tuple[str, ...]:
    """Return the names that the code uses but neither defines nor imports, and that Python does not know.

    >>> free_names("import math; assert area(2) == math.pi * 4; assert [f(x) for x in y]")
    ('area', 'f', 'y')
    """
    used: dict[str, None] = {}
    bound = set(dir(builtins))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            used[node.id] = None
        elif isinstance(node, ast.Name):
            bound.add(node.id)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    return tuple(sorted(name for name in used if name not in bound))
