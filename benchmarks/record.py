"""What every result says beside its figures, and where it is kept."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def about(
    benchmark: str, packages: Sequence[str], threads: int | None = None, gpu: str | None = None
) -> dict[str, Any]:
    """Return date, command, machine and the versions of packages (None where one is not installed)."""
    cores = ", ".join(filter(None, [platform.machine(), f"{os.cpu_count()} cores", gpu]))
    return {
        "date": date.today().isoformat(),
        "command": " ".join([f"python -m benchmarks.{benchmark}", *sys.argv[1:]]),
        "machine": cores if threads is None else f"{cores}, {threads} threads",
        "versions": {name: _version(name) for name in packages},
    }


def read(name: str) -> dict[str, Any]:
    """Return the result kept under a name, to be added to; empty if there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def keep(name: str, result: Mapping[str, Any]) -> None:
    """Write a result to results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


def wait(device: str) -> None:
    """Wait for what a GPU has still to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """Return the most resident memory of this process so far (Linux). That of getrusage begins with its parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Return median, least and most."""
    measures = {"median": statistics.median, "least": min, "most": max}
    return {name: round(of(values), digits) for name, of in measures.items()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
