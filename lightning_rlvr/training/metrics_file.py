"""metrics.csv: a file that one can read at any moment, and that a resumed run goes on with."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from lightning_rlvr.store import whole_file

NAME = "metrics.csv"


class MetricsFile(Logger):
    """Writes each call of log_metrics as a row, at once; columns are sorted.

    Lightning's CSVLogger removes the file of an earlier process, and writes it anew in place where a metric comes that
    has no column yet: a kill at that moment loses it.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / NAME
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        """The file's name."""
        return NAME

    @property
    def version(self) -> str:
        """Nothing: a run has a folder of its own."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row."""
        row = {**metrics, "step": step}
        if self._columns is None:
            self._columns = self._rows()[0] if self.path.exists() else []
        if not row.keys() <= set(self._columns):
            self._widen(row)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _widen(self, row: Mapping[str, Any]) -> None:
        """Give the file the columns that it lacks."""
        columns, rows = self._rows() if self.path.exists() else ([], [])
        self._columns = sorted({*columns, *row})
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as file:
            file.write(text.getvalue().encode())

    def _rows(self) -> tuple[list[str], list[dict[str, str]]]:
        with self.path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        return list(reader.fieldnames or []), rows
