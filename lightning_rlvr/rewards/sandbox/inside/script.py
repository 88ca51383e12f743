"""Runs the candidate's code as a program that reads standard input and prints."""

from __future__ import annotations

import sys
from types import CodeType, ModuleType
from typing import Any


def main(code: CodeType, setup: dict[str, Any]) -> None:
    """Run it as __main__."""
    module = sys.modules["__main__"] = ModuleType("__main__")
    exec(code, module.__dict__)
