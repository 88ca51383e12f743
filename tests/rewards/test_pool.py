import copy
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from lightning_rlvr.rewards.pool import WorkerPool
from lightning_rlvr.types import UserError

JUDGE = """
import os, signal, sys, time

def judge(item):
    if item == "hang":
        pow(7, 60_000_000 ** 2)          # holds the GIL
    if item == "sleep":
        time.sleep(60)
    if item == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "raise":
        raise KeyError("no such thing")
    if item == "memory":
        return len(bytearray(1 << 31))
    if item == "print":
        print("noise " * 10_000, flush=True)
        os.write(1, b"raw noise")
    if item == "environment":
        return sorted(os.environ)
    if item == "modules":
        return sorted(sys.modules)
    if item == "descriptors":
        return sorted(os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                      if os.path.exists(f"/proc/self/fd/{n}"))
    if item == "pid":
        return os.getpid()
    if item == "sigint":
        os.kill(os.getpid(), signal.SIGINT)
    return item
"""


@pytest.fixture
def judge(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text(JUDGE)
    return path


@pytest.fixture
def pool(judge):
    pool = WorkerPool(judge, "judge", workers=2, timeout_s=0.7, memory_mb=512)
    yield pool
    pool.close()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_order_is_kept_and_values_are_any_json(pool):
    items = [*range(200), None, [1, {"a": "\ud800\x00é"}], "x" * 300_000, True]
    assert [outcome.value for outcome in pool.map(items)] == items
    assert pool.map([]) == []


@pytest.mark.parametrize("bad", ["hang", "sleep", "die", "raise", "memory"])
def test_a_bad_item_costs_only_itself(pool, bad):
    items = [*range(10), bad, *range(10, 25)]
    found = pool.map(items)
    assert [o.value for o in found] == [None if i == bad else i for i in items]
    assert [o.timed_out for o in found] == [i == bad and bad in ("hang", "sleep") for i in items]
    expected = {"die": "status -9", "raise": "KeyError", "memory": "MemoryError"}.get(bad)
    errors = [(i, o.error) for i, o in zip(items, found, strict=True) if o.error is not None]
    assert [i for i, _ in errors] == ([bad] if expected else [])
    assert expected is None or expected in errors[0][1]
    assert [o.value for o in pool.map(list(range(50)))] == list(range(50))


def test_many_bad_items_in_one_chunk(pool):
    items = ["die", 1, "die", "die", 2, "raise", "die"]
    assert [o.value for o in pool.map(items)] == [None, 1, None, None, 2, None, None]


def test_the_limit_is_per_item_not_per_chunk(judge):
    slow = judge.with_name("slow.py")
    slow.write_text("import time\ndef judge(item):\n    time.sleep(0.15)\n    return item\n")
    pool = WorkerPool(slow, "judge", workers=1, timeout_s=1.0, memory_mb=512)
    assert [o.value for o in pool.map(list(range(12)))] == list(range(12))
    pool.close()


def test_what_is_put_off_gets_its_whole_limit_after_all_else(judge):
    judge.write_text(
        "import os, time\ndef judge(item):\n    end = time.process_time() + item\n"
        "    while time.process_time() < end: pass\n    return [time.monotonic(), os.getpid()]\n"
    )
    pool = WorkerPool(judge, "judge", workers=1, timeout_s=3.0, memory_mb=512)
    slow, *quick, hung = (outcome.value for outcome in pool.map([0.4, *[0.01] * 20, 60.0]))
    assert hung is None
    assert slow[0] > max(at for at, _ in quick)
    assert slow[1] not in {pid for _, pid in quick}, "another process does the rest"
    pool.close()


def test_a_hung_item_costs_no_new_start(pool):
    pool.map(list(range(64)))
    pids = pool.pids()
    assert [o.timed_out for o in pool.map(["hang", 1, "sleep", 2])] == [True, False, True, False]
    assert pool.pids() == pids


def test_close_ends_the_processes_that_judge(pool):
    (judging,) = (o.value for o in pool.map(["pid"]))
    assert judging not in pool.pids()
    assert alive(judging)
    pool.close()
    assert wait_until(lambda: not alive(judging))


def test_prints_do_not_corrupt_the_channel(pool):
    assert [o.value for o in pool.map(["print", 1, "print", 2])] == ["print", 1, "print", 2]


def test_workers_are_light_and_hold_no_secrets(pool, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    read, write = os.pipe()
    os.set_inheritable(write, True)
    environment, modules, descriptors = (o.value for o in pool.map(["environment", "modules", "descriptors"]))
    assert "HF_TOKEN" not in environment
    assert len(environment) <= 6
    assert not {"torch", "lightning", "transformers", "lightning_rlvr", "numpy"} & set(modules)
    pipes = [os.readlink(f"/proc/self/fd/{fd}") for fd in (read, write)]
    assert not set(pipes) & set(descriptors)
    assert len(descriptors) <= 6  # its channel and /dev/null
    os.close(read)
    os.close(write)


def test_workers_ignore_sigint(pool):
    assert [o.value for o in pool.map(["sigint", 1])] == ["sigint", 1]


def test_close_leaves_nothing_and_may_be_repeated(pool):
    pool.map(list(range(64)))
    pids = pool.pids()
    assert len(pids) == 2
    assert all(map(alive, pids))
    pool.close()
    assert not any(map(alive, pids))  # reaped as well: a zombie would still take a signal
    pool.close()
    assert [o.value for o in pool.map([1])] == [1]
    assert not set(pids) & set(pool.pids())


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_lost_while_idle_costs_nothing(pool, blow):
    (first,) = (o.value for o in pool.map(["pid"]))
    os.kill(first, blow)
    assert [o.value for o in pool.map(list(range(40)))] == list(range(40))
    assert first not in pool.pids()


def test_threads_take_turns(pool):
    found = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: [o.value for o in pool.map([n] * 30)]})) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [n] * 30 for n in range(4)}


def test_workers_are_killed_when_the_pool_is_collected(judge):
    pool = WorkerPool(judge, "judge", workers=1, timeout_s=1.0, memory_mb=512)
    pool.map([1])
    pids = pool.pids()
    del pool
    assert wait_until(lambda: not any(map(alive, pids)))


def test_copies_are_fresh_pools(pool):
    pool.map([1])
    for other in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert other.pids() == []
        assert other.map(["pid"])[0].value not in pool.pids()
        other.close()
    assert pool.map([2])[0].value == 2


PARENT = """
import signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if whoever started the tests ignores it

stub = types.ModuleType("lightning_rlvr.types")   # the real one imports torch, which takes seconds
stub.UserError = ValueError
package = types.ModuleType("lightning_rlvr.rewards")
package.__path__ = ["lightning_rlvr/rewards"]
sys.modules |= {{m.__name__: m for m in (stub, package)}}

from lightning_rlvr.rewards.pool import WorkerPool
pool = WorkerPool({judge!r}, "judge", workers=2, timeout_s={timeout}, memory_mb=512)
pool.map(list(range(64)))
print(*pool.pids(), flush=True)
{then}
"""


def start_parent(judge, then, timeout):
    code = textwrap.dedent(PARENT).format(judge=str(judge), then=then, timeout=timeout)
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
    )


def test_no_orphans(judge):
    cases = {
        "idle workers see the end of stdin": ("time.sleep(60)", signal.SIGKILL, 30.0),
        "the interrupted parent kills busy ones": ("pool.map(['hang'] * 2)", signal.SIGINT, 30.0),
        "the interpreter's exit kills them": ("pass", None, 30.0),
        "a busy orphan's alarm ends it": ("pool.map(['hang'] * 2)", signal.SIGKILL, 1.5),
    }
    parents = {name: start_parent(judge, then, timeout) for name, (then, _, timeout) in cases.items()}
    workers = {name: [int(pid) for pid in p.stdout.readline().split()] for name, p in parents.items()}
    assert [len(pids) for pids in workers.values()] == [2] * 4
    time.sleep(0.3)
    for name, parent in parents.items():
        if cases[name][1] is not None:
            assert all(map(alive, workers[name])), name
            parent.send_signal(cases[name][1])
    for name, parent in parents.items():
        _, error = parent.communicate(timeout=20)
        assert ("KeyboardInterrupt" in error) == ("interrupted" in name), error
        assert "Warning" not in error
        assert wait_until(lambda pids=workers[name]: not any(map(alive, pids))), name


def test_a_judge_that_cannot_start_is_an_error_of_the_user(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import no_such_package_at_all\n")
    pool = WorkerPool(path, "judge", workers=1, timeout_s=1.0, memory_mb=512)
    with pytest.raises(UserError, match="no_such_package_at_all"):
        pool.map([1])
    assert pool.pids() == []
    path.write_text("import os\nos._exit(3)\n")
    with pytest.raises(UserError, match="memory_mb"):
        pool.map([1])
    assert pool.pids() == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("workers", 0), ("timeout_s", 0.0), ("timeout_s", float("nan")), ("timeout_s", float("inf")), ("memory_mb", 1)],
)
def test_arguments_are_checked(judge, key, value):
    arguments = {"workers": 1, "timeout_s": 1.0, "memory_mb": 512} | {key: value}
    with pytest.raises(UserError, match=key):
        WorkerPool(judge, "judge", **arguments)
