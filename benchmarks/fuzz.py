"""What the program does with inputs that nobody means to give.

    python -m benchmarks.fuzz [--inputs 10000] [--seed 1] [--kinds config flag ...]

Draws inputs of each kind in benchmarks/hostile.py, all in this process; each must be taken or refused by one UserError,
within a minute. Prints the kinds of findings with an example of each, and writes benchmarks/results/fuzz.json, where
kinds that were not tried this time keep what they came to the last time.
"""

from __future__ import annotations

import argparse
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from benchmarks import record
from benchmarks.hostile import KINDS

HANG_S = 60  # of CPU time
SLOW = {"config": 0.05, "flag": 0.05}  # share of all inputs; the other kinds have the rest, alike


class Hang(BaseException):
    """An input took too long; no handler of the program stops it."""


def _hang(*_: Any) -> None:
    raise Hang


class Tally:
    """What the inputs of one kind came to."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.outcomes: Counter[str] = Counter()
        self.findings: dict[str, str] = {}
        self.slowest = 0.0

    def run(self, inputs: int, number: int) -> None:
        """Draw and try inputs."""
        with tempfile.TemporaryDirectory() as folder:

            @seed(number)
            @settings(max_examples=inputs, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(st.data())
            def one(data: st.DataObject) -> None:
                self._try(data, Path(folder))

            one()

    def _try(self, data: st.DataObject, folder: Path) -> None:
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, HANG_S)
        try:
            self.outcomes[KINDS[self.kind](data.draw, folder)] += 1
        except (Exception, Hang) as error:
            if type(error).__module__.startswith("hypothesis"):  # it draws no more for this input
                raise
            self._found(error)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        self.slowest = max(self.slowest, time.process_time() - start)

    def _found(self, error: BaseException) -> None:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "lightning_rlvr" in f.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "outside"
        self.outcomes["finding"] += 1
        name = f"{type(error).__name__} in {where}" + (f": {error}"[:120] if isinstance(error, AssertionError) else "")
        if name not in self.findings:
            self.findings[name] = "".join(traceback.format_exception(error))[-1500:]
            print(f"--- {self.kind}: {name}\n{self.findings[name]}", flush=True)


def main() -> None:
    """Try the inputs and write what they came to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=list(KINDS))
    args = parser.parse_args()
    signal.signal(signal.SIGPROF, _hang)
    warnings.simplefilter("ignore")
    slow = sum(SLOW.get(kind, 0.0) for kind in args.kinds)
    fast = sum(kind not in SLOW for kind in args.kinds)
    results, start = {}, time.perf_counter()
    for kind in args.kinds:
        tally = Tally(kind)
        share = SLOW.get(kind, (1 - slow) / fast if fast else 0.0) if fast else 1 / len(args.kinds)
        tally.run(round(args.inputs * share), args.seed)
        results[kind] = {**tally.outcomes, "slowest_s": round(tally.slowest, 2), "findings": sorted(tally.findings)}
        print(f"{kind:12} {dict(tally.outcomes)}, slowest {tally.slowest:.2f} s", flush=True)
    results = {**record.read("fuzz").get("kinds", {}), **results}
    tried = sum(of.get(name, 0) for of in results.values() for name in ("taken", "refused", "finding"))
    found = sum(of.get("finding", 0) for of in results.values())
    print(f"{tried} inputs, {found} findings, {time.perf_counter() - start:.0f} s")
    about = record.about("fuzz", ("hypothesis", "jsonargparse", "pyarrow", "transformers"))
    record.keep("fuzz", {**about, "inputs": tried, "findings": found, "kinds": results})


if __name__ == "__main__":
    main()
