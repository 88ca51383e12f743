"""Questions from a local file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_rlvr.store import user_path
from lightning_rlvr.tasks.records import Record, Records
from lightning_rlvr.types import UserError


@dataclass(frozen=True)
class Files(Records):
    """Rows of a .json (a list of objects), .jsonl (an object a line) or .parquet file.

    Args:
        path: the file; `~` is expanded, a relative path starts at the working directory.

    GSM8K as its authors publish it: Files("train.jsonl", answer_pattern="#### (.+)$").
    """

    path: str

    def source(self) -> tuple[str, str]:
        """Return the path for messages and the file's stem for uids."""
        return str(self.path), Path(self.path).stem

    def read(self) -> Sequence[Record]:
        """Read the file.

        Raises: UserError if it is missing, of another kind, or broken; broken lines are named (from 1).
        """
        path = user_path(self.path, "the task's path")
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise UserError(
                f"path must end in {', '.join(_READERS)}, got {self.path!r}: the suffix tells the format. "
                "Set the task's path."
            )
        if not path.is_file():
            raise UserError(
                f"path must be a file, got {self.path!r}: {'that is a folder' if path.is_dir() else 'no such file'}"
                f" (looked for {path.absolute()}). Set the task's path."
            )
        try:
            return reader(path)
        except OSError as error:
            raise UserError(
                f"path must be a readable file, got {self.path!r}: {error}. Set the task's path."
            ) from error


def _json(path: Path) -> list[Record]:
    data = path.read_bytes()
    rows = _parse(data, path, 1)
    if not isinstance(rows, list):
        raise _broken(path, f"it holds a {type(rows).__name__}, not a list of objects")
    return [_object(row, path, f"row {i}") for i, row in enumerate(rows)]


def _jsonl(path: Path) -> list[Record]:
    # only \n ends a line: JSON strings may hold U+2028, at which str.splitlines would cut
    lines = path.read_bytes().split(b"\n")
    return [
        _object(_parse(line, path, number), path, f"line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _parquet(path: Path) -> list[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[Record] = pq.read_table(path).to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:  # ArrowInvalid is no OSError
        raise _broken(path, str(error).splitlines()[0]) from error
    return rows


_READERS: dict[str, Callable[[Path], list[Record]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}


def _parse(data: bytes, path: Path, line: int) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        at = line + data.count(b"\n", 0, error.start)
        raise _broken(path, f"line {at} is not UTF-8 ({error.reason})") from error
    except json.JSONDecodeError as error:
        at = line + error.lineno - 1
        raise _broken(path, f"line {at}, column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or bottomless nesting
        raise _broken(path, f"line {line}: {error}") from error


def _object(row: Any, path: Path, at: str) -> Record:
    if not isinstance(row, dict):
        raise _broken(path, f"{at} holds a {type(row).__name__}, not an object of columns")
    return row


def _broken(path: Path, reason: str) -> UserError:
    return UserError(
        f"path must be an intact {path.suffix} file, got {str(path)!r}: {reason}. "
        "Repair the file or set the task's path."
    )
