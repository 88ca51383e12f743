"""Finished records that survive a kill: long work is written as it goes and continued where it stopped."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lightning_rlvr.types import UserError

Record = dict[str, Any]


def make_folder(folder: Path, setting: str) -> None:
    """Make a folder for results, before the work for them is done, and see that it takes files.

    Raises: UserError if it cannot be made or written to; it names the setting that led there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{setting} must be a folder that can be written to, got {folder}: {error}. Set --{setting}."
        ) from error


class Store:
    """Records with a unique key, bound for one parquet file that holds its manifest: what the records depend on.

    While the work goes on, each `append` leaves one more file in the folder PATH.parts, whole or not at all; a process
    that is killed loses what it had not appended. `finish` puts the parts together in `path` and removes them. Several
    ranks append to the same folder; one finishes.

    Args:
        path: the file to make.
        manifest: equal manifests mean equal records; values as json has them.
        setting: how error messages call the setting that led to `path`.
        key: the column that names a record.
        rank: this process; two that append at a time must not have the same.

    Raises: UserError if parts of another manifest are there; it says what differs.
    """

    def __init__(
        self, path: Path, manifest: Mapping[str, Any], setting: str = "output", key: str = "uid", rank: int = 0
    ) -> None:
        self.path, self.manifest, self.setting, self.key, self.rank = path, dict(manifest), setting, key, rank
        self.parts = path.with_name(f"{path.name}.parts")
        self._count = len(self._files())
        self._lock: IO[str] | None = None

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Hold the file against other runs that would make it too: these wait here, then find it made.

        The claim ends with the process, however that ends.
        """
        while not self.try_claim():
            time.sleep(1.0)
        try:
            yield
        finally:
            self.release()

    def try_claim(self) -> bool:
        """Hold the file against other runs if none holds it; return whether it is held now.

        Raises: UserError if its folder cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self.path.with_name(f".{self.path.name}.lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise UserError(
                f"{self.setting} must lead to a folder that can be written and locked, got {self.path}: {error}. "
                f"Set {self.setting}."
            ) from error
        return True

    def release(self) -> None:
        """Let other runs have the file."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def done(self) -> set[str]:
        """Return the keys of the records that are finished, by any rank."""
        if self.path.exists():
            return set(self._column(self.path))
        return {key for part in self._files() for key in self._column(part)}

    def append(self, records: Sequence[Record]) -> None:
        """Write finished records; when it returns they will outlive the process, and the machine's power."""
        self.parts.mkdir(parents=True, exist_ok=True)
        while not self._write(records, self.parts / f"{self.rank:04d}-{self._count:06d}.parquet"):
            self._count += 1

    def finish(self, order: Sequence[str]) -> None:
        """Put the parts together in `path`, in the order of keys given, and remove them.

        The file depends on the records and their order alone, not on how they came in parts. A record may be there
        twice: a rank may go on for a moment after the kill of the first, while the next run has begun.

        Raises: ValueError if a record is missing, unknown, or there twice and not the same.
        """
        if not self.path.exists():  # else killed between writing the file and removing its parts
            self._write(self._ordered(order), self.path)
        shutil.rmtree(self.parts, ignore_errors=True)

    def _ordered(self, order: Sequence[str]) -> list[Record]:
        self.check()
        remedy = f"{self.setting}, or remove {self.parts}"
        records = [record for part in self._files() for record in _read(part, remedy).to_pylist()]
        by_key = {record[self.key]: record for record in records}
        twice = sorted({record[self.key] for record in records if not _same(record, by_key[record[self.key]])})
        if twice or by_key.keys() != set(order):
            raise ValueError(
                f"{self.parts} holds {len(by_key)} records, needed are {len(set(order))}: missing "
                f"{sorted(set(order) - by_key.keys())[:3]}, unknown {sorted(by_key.keys() - set(order))[:3]}, "
                f"twice and not the same {twice[:3]}"
            )
        return [by_key[key] for key in order]

    def check(self) -> None:
        """Raise UserError if the file or a part of it is there and was made for another manifest."""
        remedy = f"{self.setting}, or remove {self.parts}"
        for file in [self.path] if self.path.exists() else self._files():
            setting = self.setting if file == self.path else remedy
            compare_manifests(read_manifest(file, setting), self.manifest, file, setting)

    def _files(self) -> list[Path]:
        return sorted(self.parts.glob("[0-9]*.parquet"))

    def _column(self, file: Path) -> list[str]:
        names: list[str] = _read(file, f"{self.setting}, or remove {file}", [self.key]).column(0).to_pylist()
        return names

    def _write(self, records: Sequence[Record], file: Path) -> bool:
        """Write a file whole or not at all. Returns whether it did: what is there already is left alone."""
        table = pa.Table.from_pylist(list(records))
        table = table.replace_schema_metadata({b"manifest": json.dumps(self.manifest, sort_keys=True).encode()})
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            with partial.open("wb") as out:
                pq.write_table(table, out, write_page_checksum=True)
                out.flush()
                os.fsync(out.fileno())
            os.link(partial, file)
            sync_folder(file.parent)
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(
                f"{self.setting} must be a place with room to write to, got {file}: {error}. What was finished before "
                f"is kept. Free some space, or set {self.setting}."
            ) from error
        finally:
            partial.unlink(missing_ok=True)
        return True


def _same(a: Any, b: Any) -> bool:
    """Whether two values from files are equal; nan is nan."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b or (a != a and b != b))


@contextmanager
def whole_file(path: Path, keep_old_as: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of `path` when the block has ended, whole and on the disk, or not at all.

    Args:
        path: the file to make; one process at a time makes it.
        keep_old_as: what the file that is replaced is renamed to, if there is one. A kill between the two renames
            leaves that name alone.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_old_as is not None and path.exists():
            path.replace(keep_old_as)
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def user_path(text: str | Path, key: str) -> Path:
    """Return the path that a user's text means, `~` expanded, whether there is anything or not.

    Raises: UserError if nothing could be there: the name is too long, holds what no name may, or is of an unknown user.
    """
    try:
        path = Path(text).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{key} must be a path, got {str(text)[:200]!r}: {reason}. Set {key}.") from error
    return path


def sync_folder(folder: Path) -> None:
    """Have the names of the files in a folder written to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_records(path: Path, manifest: Mapping[str, Any], setting: str = "output") -> pd.DataFrame:
    """Read a finished file that was made for exactly this manifest.

    Raises: UserError if it is missing, damaged or no such file, or that says what differs.
    """
    compare_manifests(read_manifest(path, setting), manifest, path, setting)
    return _read(path, setting).to_pandas()


def read_manifest(path: Path, setting: str = "output") -> dict[str, Any]:
    """Return the manifest in a file. Raises: UserError if there is none that can be read."""
    try:
        return dict(json.loads((pq.read_schema(path).metadata or {})[b"manifest"]))
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path} as a file of this program: {error!r}. Set {setting}.") from error


def _read(path: Path, setting: str, columns: list[str] | None = None) -> pa.Table:
    """Read a file's records. Raises: UserError if they are damaged, by the checksums of their pages."""
    try:
        return pq.read_table(path, columns=columns, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is damaged: {reason}. Set {setting}, or remove it to have it made anew.") from error


def compare_manifests(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], path: Path, setting: str = "output"
) -> None:
    """Raise UserError that says what differs between the manifest in a file and the one wanted, if anything does."""
    wanted = json.loads(json.dumps(wanted))  # as it would read from a file: tuples are lists
    differing = [key for key in dict.fromkeys([*wanted, *stored]) if stored.get(key) != wanted.get(key)]
    if differing:
        lines = "\n".join(
            f"  {key}: the file has {stored.get(key)!r}, this run {wanted.get(key)!r}" for key in differing
        )
        raise UserError(f"{path} was made for something else:\n{lines}\nSet {setting}, or what differs.")


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as one of dotted keys.

    >>> flat({"a": {"b": 1, "c": {}}})
    {'a.b': 1, 'a.c': {}}
    """
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
