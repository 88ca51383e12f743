"""The judge of MathAnswer with the time at which it was done: loaded by benchmarks.verify in worker processes."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parents[1] / "lightning_rlvr" / "rewards"


def _judge_module() -> Any:
    import sys

    file = _FOLDER / "_math_judge.py"
    spec = importlib.util.spec_from_file_location("math_judge", file, submodule_search_locations=[str(_FOLDER)])
    module = sys.modules["math_judge"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_MODULE = _judge_module()
warm = _MODULE.warm


def judge(item: dict[str, Any]) -> dict[str, Any]:
    """Judge, and say when (monotonic seconds, the same clock in all processes)."""
    return {"judged": _MODULE.judge(item), "at": time.monotonic()}
