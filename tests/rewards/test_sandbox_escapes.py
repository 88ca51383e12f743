"""At least 40 programs that try to get out of the sandbox, to harm the machine, or to forge their verdict."""

import ctypes
import os
import platform
import socket
import time
from pathlib import Path

import pytest
from escapes import ATTEMPTS, FLOODS, FORGERIES, PREAMBLE

from lightning_rlvr.rewards import CodeTests
from lightning_rlvr.rewards.sandbox import Level, Limits, Program, Sandbox, probe, process
from lightning_rlvr.rewards.sandbox.command import find_bwrap
from lightning_rlvr.rewards.sandbox.probe import _refusal
from lightning_rlvr.types import Prompt, Response

GROUND = probe()
isolated = pytest.mark.skipif(GROUND.level < Level.isolated, reason=f"no isolation here: {GROUND.missing}")
filtered = pytest.mark.skipif(not GROUND.seccomp, reason="no seccomp filter for this machine")
limited = pytest.mark.skipif(GROUND.level < Level.limited, reason=f"no limits here: {GROUND.missing}")
QUICK = {"timeout_s": 1.0, "memory_mb": 256}


def prompt(tests, **columns):
    return Prompt("u", "", "", {"input_output": tests} | columns)


def judge(code, question, **settings):
    return CodeTests(**(QUICK | settings))([Response(f"```python\n{code}\n```")], [question])[0]


def descendants():
    """All processes under this one."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(folder.name)] = int(fields[1])
    found = {os.getpid()}
    for _ in parents:
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {os.getpid()}


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """After each test no process is left, orphans included, and nothing outside was written."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans become our children
    monkeypatch.setenv("SANDBOX_SECRET", "1")
    (tmp_path / "secret").write_text("secret")
    before = descendants()
    yield
    deadline = time.monotonic() + 5
    while descendants() - before and time.monotonic() < deadline:
        time.sleep(0.01)  # the kernel takes its time to end a namespace
    assert not descendants() - before
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert (tmp_path / "secret").read_text() == "secret"
    places = ["/", "/dev", "/dev/shm", "/tmp", os.path.dirname(os.__file__)]
    assert not [name for place in places for name in os.listdir(place) if name.startswith("escaped")]
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_where_bubblewrap_starts_nothing_is_skipped():
    """A leak that the probe finds lowers the level, and would skip the tests that name it."""
    if any(not _refusal(bwrap) for bwrap in find_bwrap()):
        assert GROUND.level is Level.isolated, GROUND.missing


def test_there_are_at_least_40_programs():
    assert len(ATTEMPTS) + len(FLOODS) + len(FORGERIES) >= 100


here = [name for name, code in ATTEMPTS.items() if "syscall(" not in code or platform.machine() == "x86_64"]


@isolated
@filtered
@pytest.mark.parametrize("name", here)
def test_it_cannot(name, tmp_path, port):
    question = prompt({"inputs": [f"{tmp_path}\n{port}\n{__file__}\n"], "outputs": ["contained\n"]})
    verdict = judge(PREAMBLE.format(attempt=ATTEMPTS[name]), question)
    assert verdict.status.value == "correct", verdict


@isolated
@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_ends(name):
    code, status = FLOODS[name]
    start = time.monotonic()
    verdict = judge(code, prompt({"inputs": [""], "outputs": ["right\n"]}))
    assert verdict.status.value in status.split("|"), verdict
    assert verdict.score == 0
    assert time.monotonic() - start < 30


@isolated
@pytest.mark.parametrize("name", FORGERIES)
def test_a_verdict_cannot_be_forged(name):
    tests = ["assert f(3) == 103", "assert abs(f(4) - 104) < 1e-6", "assert all(map(lambda x: f(x) == 105, [5]))"]
    verdict = judge(FORGERIES[name], Prompt("u", "", "", {"test_list": tests}))
    assert verdict.status.value in ("wrong", "timeout", "error"), verdict
    assert verdict.score == 0
    assert verdict.answer is None or verdict.answer.startswith("passes 0 of 3"), verdict


@isolated
@pytest.mark.parametrize("name", ["equal to all", "a number equal to all", "ends the tests' iteration", "os._exit"])
def test_a_call_cannot_be_forged(name):
    question = prompt({"inputs": [[3], [4]], "outputs": [103, 104], "fn_name": "f"})
    assert judge(FORGERIES[name], question).answer.startswith("passes 0 of 2")


@isolated
def test_the_honest_solution_passes_the_same_tests():
    question = Prompt("u", "", "", {"test_list": ["assert f(3) == 103", "assert abs(f(4) - 104) < 1e-6"]})
    assert judge("def f(x): return x + 100", question).correct


SURVIVORS = """
import os, sys, time
for _ in range(20):
    if os.fork() == 0:
        {leave}
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
print("right", flush=True)
"""


@isolated
def test_the_namespace_alone_holds_survivors(monkeypatch):
    monkeypatch.setattr(process, "filter_program", lambda: b"")
    start = time.monotonic()
    code = SURVIVORS.format(leave="os.setsid()")
    assert judge(code, prompt({"inputs": [""], "outputs": ["right"]})).correct
    assert time.monotonic() - start < 20


@limited
def test_the_process_group_holds_survivors_that_stay_in_it(monkeypatch):
    monkeypatch.setattr(process, "filter_program", lambda: b"")
    start = time.monotonic()
    code = SURVIVORS.format(leave="pass")
    assert judge(code, prompt({"inputs": [""], "outputs": ["right"]}), level="limited").correct
    assert time.monotonic() - start < 20


REAL = [
    "tcp to a server on this machine",
    "udp",
    "fork",
    "spawn",
    "subprocess",
    "shell",
    "see processes",
    "read the tests",
]
REAL += ["read a file outside", "read passwords", "anonymous file"]


@limited
@pytest.mark.parametrize("name", REAL)
def test_the_attempts_are_real(name, tmp_path, port, monkeypatch):
    """Without namespaces and filter they succeed; most others would do harm."""
    monkeypatch.setattr(process, "filter_program", lambda: b"")
    question = prompt({"inputs": [f"{tmp_path}\n{port}\n{__file__}\n"], "outputs": ["escaped\n"]})
    assert judge(PREAMBLE.format(attempt=ATTEMPTS[name]), question, level="limited").correct


# nothing that would do harm if it were not held
LIMITED = ["fork", "double fork that holds the pipe", "subprocess", "tcp to a server on this machine", "udp"]
LIMITED += ["signal the parent", "read the environment", "memory flood", "anonymous file"]
LIMITED += ["any other descriptor", "disk flood in one file", "descriptor flood", "shared memory"]


@limited
@filtered
@pytest.mark.parametrize("name", LIMITED)
def test_the_lower_level_holds(name, tmp_path, port):
    question = prompt({"inputs": [f"{tmp_path}\n{port}\n{__file__}\n"], "outputs": ["contained\n"]})
    attempt = ATTEMPTS[name].replace("/tmp/", "./")
    assert judge(PREAMBLE.format(attempt=attempt), question, level="limited").correct


@limited
@pytest.mark.parametrize("name", ["output flood", "memory grows", "endless loop", "closes all descriptors and stays"])
def test_a_flood_ends_at_the_lower_level(name):
    code, status = FLOODS[name]
    verdict = judge(code, prompt({"inputs": [""], "outputs": ["right\n"]}), level="limited")
    assert verdict.status.value == status


@limited
@pytest.mark.parametrize("name", ["equal to all", "os._exit", "forged verdict on all descriptors", "searches memory"])
def test_pipes_are_forged_at_no_level(name):
    question = Prompt("u", "", "", {"test_list": ["assert f(3) == 103"]})
    assert not judge(FORGERIES[name], question, level="limited").correct


@limited
def test_the_working_folder_of_the_lower_level_goes(tmp_path):
    code = "import os; open('a', 'w').write('x'); print(os.getcwd())"
    run = Sandbox("limited").run(Program("script", code), Limits())
    assert run.code == 0
    assert not Path(run.output.decode().strip()).exists()
