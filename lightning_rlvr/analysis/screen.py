"""How tables are printed."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

WIDEST = 1000  # columns


def show(table: Table, *lines: str) -> None:
    """Print a table and lines below it: in a terminal as wide as that, in a pipe or a log as wide as the table is.

    Where a terminal is too narrow, cells go on in the next line: nothing is left out.
    """
    console = Console(highlight=False)
    for column in table.columns:
        column.overflow = "fold"
    if not console.is_terminal:
        console.width = Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum
    console.print(table)
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
