"""Programs, judged by running their problem's tests in a sandbox."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from lightning_rlvr.rewards.code_problems import Calling, Printing, Problem, read_problem
from lightning_rlvr.rewards.sandbox import End, Limits, Program, Run, Sandbox
from lightning_rlvr.rewards.sandbox.process import START_S
from lightning_rlvr.types import Prompt, Response, Reward, Status, UserError, Verdict

MAX_CODE = 100_000  # characters: a longer response is looked at from there to its end
_FENCED = re.compile(r"^([ \t]*)```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_FUTURE = re.compile(r"^from __future__ import [\w, ]+(?:#.*)?$", re.MULTILINE)
_PYTHON = {"python", "py", "python3"}
_NUMBER = 60  # characters: longer tokens are compared as text


@dataclass(frozen=True)
class Code:
    """The program in a response, and whether it was marked as one."""

    text: str
    marked: bool


class CodeTests(Reward):
    """Score 1.0 if the program in the response passes all tests of its problem, else 0.0.

    The program is the last block marked ```python, else the last marked block, else the whole response. The tests
    are in the prompt's metadata, in the forms of HumanEval, MBPP, LiveCodeBench and APPS (see code_problems.py). A
    program only gets its input, or calls of its functions with plain values: expected values stay in other processes.
    Printed output is compared line by line, token by token (numbers as numbers, exactly: there is no tolerance for
    floats, as APPS' own grader has, so 0.333333 is not 0.3333333333); a program must end with exit status 0. Calls of
    APPS and TACO may give the value alone where a list of one is expected, and integer keys where JSON has texts.

    Statuses: UNPARSABLE if there is no program (an unmarked response that does not compile), TIMEOUT, ERROR if the
    sandbox failed. `Verdict.answer` says how many tests are passed, with a digest of what the program gave if it
    failed: wrong programs that did the same have the same answer.

    Args:
        level: how programs must be contained, isolated or limited; the reward refuses to work on a machine that
            gives less. See lightning_rlvr.rewards.sandbox for what the lower level cannot contain.
        workers: programs that run at a time.
        timeout_s: wall seconds for each test: an input, a call, an assert statement, HumanEval's check.
        memory_mb: MiB of address space of each process.
        prelude: Python put in front of every program, such as the imports that a data set's authors presume.
    """

    def __init__(
        self,
        level: Literal["limited", "isolated"] = "isolated",
        workers: int = 2,
        timeout_s: float = 5.0,
        memory_mb: int = 512,
        prelude: str = "",
    ) -> None:
        for ok, key, value, rule in (
            (level in ("limited", "isolated"), "level", level, "isolated or limited"),
            (workers >= 1, "workers", workers, "at least 1 program at a time"),
            (0 < timeout_s < math.inf, "timeout_s", timeout_s, "a finite number of seconds above 0"),
            (memory_mb >= 128, "memory_mb", memory_mb, "at least 128 MiB: Python needs as much"),
        ):
            if not ok:
                raise UserError(f"{key} must be {rule}, got {value}. Set reward.init_args.{key}.")
        self.workers, self.prelude = workers, prelude
        self.sandbox = Sandbox(level)
        self.limits = Limits(timeout_s, memory_mb)

    def __repr__(self) -> str:
        return (
            f"CodeTests(level={self.sandbox.level!r}, timeout_s={self.limits.wall_s}, "
            f"memory_mb={self.limits.memory_mb}, prelude={self.prelude!r}, Python {platform.python_version()})"
        )

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError if the machine gives no such level, or for the first prompt without tests."""
        self.sandbox.ground()
        for prompt in prompts:
            read_problem(prompt)

    def __call__(self, responses: Sequence[Response], prompts: Sequence[Prompt]) -> list[Verdict]:
        """Judge responses[i] as a solution of prompts[i]; equal programs for one prompt are run once."""
        self.sandbox.ground()
        unique = {id(prompt): prompt for prompt in prompts}
        problems = {key: read_problem(prompt) for key, prompt in unique.items()}
        codes = [find_code(response.text) for response in responses]
        keys = [(code, id(prompt)) for code, prompt in zip(codes, prompts, strict=True)]
        jobs = list(dict.fromkeys(keys))
        pool, stop = ThreadPoolExecutor(self.workers), threading.Event()
        try:
            verdicts = pool.map(lambda job: self._judge(job[0], problems[job[1]], stop), jobs)
            found = dict(zip(jobs, verdicts, strict=True))
        finally:
            stop.set()  # an interrupt waits for the tests that run, not for all of their programs
            pool.shutdown(cancel_futures=True)
        return [found[key] for key in keys]

    def _judge(self, code: Code, problem: Problem, stop: threading.Event) -> Verdict:
        if not code.text.strip():
            return Verdict(0.0, Status.UNPARSABLE)
        before = f"{self.prelude}\n" if self.prelude else ""
        try:
            if isinstance(problem, Printing):
                status, answer = self._print(in_front(before, code.text), problem, stop)
            else:
                status, answer = self._call(in_front(before + problem.before, code.text), problem)
        except OSError:  # out of processes, descriptors or memory
            return Verdict(0.0, Status.ERROR)
        if status is Status.UNPARSABLE and code.marked:
            status, answer = Status.WRONG, "it does not compile"
        return Verdict(float(status is Status.CORRECT), status, answer)

    def _print(self, code: str, problem: Printing, stop: threading.Event) -> tuple[Status, str | None]:
        """Run the program on every input, up to the first that takes too long, or until nobody waits any more."""
        passed, seen = 0, hashlib.sha256()
        for given, expected in problem.tests:
            if stop.is_set():
                return Status.ERROR, None
            run = self.sandbox.run(Program("script", code, stdin=given.encode("utf-8", "replace")), self.limits)
            if run.end in _ENDS:
                return _ENDS[run.end], None
            output = run.output.decode("utf-8", "replace")
            passed += run.end is End.EXIT and run.code == 0 and same_output(output, expected)
            seen.update(repr((run.end.value, run.code, [line.split() for line in output.splitlines()])).encode())
        return _judged(passed, len(problem.tests), seen.hexdigest()[:16])

    def _call(self, code: str, problem: Calling) -> tuple[Status, str | None]:
        """Let an examiner run the tests: a process of its own, with a pipe to and from the candidate's."""
        total_s = self.limits.wall_s * (len(problem.tests) + 1)
        with contextlib.ExitStack() as stack:
            with contextlib.ExitStack() as ours:
                (asks, asked), (tells, told) = _pipe(ours), _pipe(ours)
                program = Program("candidate", code, stdin=asks, stdout=told)
                candidate = stack.enter_context(self.sandbox.start(program, replace(self.limits, wall_s=total_s)))
                more = {
                    "pipe": (tells, asked),
                    "names": problem.names,
                    "tests": problem.tests,
                    "timeout_s": self.limits.wall_s,
                }
                program = Program("examiner", problem.setup, more, descriptors=(tells, asked))
                limits = replace(self.limits, wall_s=total_s + START_S)
                examiner = stack.enter_context(self.sandbox.start(program, limits))
            run = examiner.finish()
            return _reported(run, candidate.ready(), len(problem.tests))


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    """Return both ends of a pipe that the stack closes."""
    pair = os.pipe()
    for descriptor in pair:
        stack.callback(os.close, descriptor)
    return pair


_ENDS = {End.TIMEOUT: Status.TIMEOUT, End.NO_CODE: Status.UNPARSABLE, End.NO_START: Status.ERROR}


def find_code(response: str) -> Code:
    r"""Return the program in a response: its last block of Python, else its last block, else all of it.

    >>> find_code("So:\n```python\nprint(1)\n```\nprints 1.")
    Code(text='print(1)\n', marked=True)
    """
    response = response[-MAX_CODE:]
    blocks = [
        (language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE))  # a block in a list is indented with its fence
        for indent, language, text in _FENCED.findall(response)
    ]
    python = [text for language, text in blocks if language.lower() in _PYTHON]
    if blocks:
        return Code((python or [text for _, text in blocks])[-1], True)
    return Code(response, False)


def in_front(before: str, code: str) -> str:
    r"""Put a text in front of a program, but behind what Python wants at the very beginning.

    >>> in_front("import math\n", "from __future__ import annotations\nprint(1)")
    'from __future__ import annotations\nimport math\n\nprint(1)'
    """
    first = _FUTURE.findall(code) if before else []
    return "\n".join([*first, before + _FUTURE.sub("", code)]) if first else before + code


def same_output(output: str, expected: str) -> bool:
    r"""Say whether two texts have the same tokens in the same lines; numbers are compared by value.

    >>> same_output("1.0  a \n2\n\n", "1 a\n2"), same_output("1 2", "1\n2")
    (True, False)
    """
    lines = [[line.split() for line in text.rstrip().split("\n")] for text in (output, expected)]
    return len(lines[0]) == len(lines[1]) and all(
        len(a) == len(b) and all(map(_same_token, a, b)) for a, b in zip(*lines, strict=True)
    )


def _same_token(a: str, b: str) -> bool:
    if a == b or max(len(a), len(b)) > _NUMBER:
        return a == b
    try:
        return Decimal(a) == Decimal(b)
    except InvalidOperation:
        return False


def _judged(passed: int, total: int, seen: str) -> tuple[Status, str]:
    if passed == total:
        return Status.CORRECT, f"passes all of {total}"
    return Status.WRONG, f"passes {passed} of {total}: {seen}"


def _reported(run: Run, ready: bytes, total: int) -> tuple[Status, str | None]:
    """Judge by the examiner's report, in which nothing is the candidate's but the digest."""
    if ready != b"r" or run.end in (End.NO_START, End.NO_CODE):
        return (Status.UNPARSABLE if ready == b"s" else Status.ERROR), None
    if run.end is End.TIMEOUT:
        return Status.TIMEOUT, None
    try:
        report: dict[str, Any] = json.loads(run.output)
    except ValueError:  # killed for its memory, say
        return Status.ERROR, None
    if report["ended"] == "timeout":
        return Status.TIMEOUT, None
    return _judged(report["passed"], total, f"{report['seen']} {report['ended']}")
