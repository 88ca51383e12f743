"""Tables on screens, in pipes and in logs."""

import re

from rich.table import Table

from lightning_rlvr.analysis.screen import show

HEADER = ["variant", *(f"last pass@{k} (nats)" for k in range(2, 9))]
ROW = ["high_entropy_mask", *(f"0.{k}84 ± 0.012" for k in range(1, 8))]
LAST = "report: /a/[b]/" + "long/" * 30


def said(capsys):
    """Print a table; return the lines that it takes."""
    table = Table(*HEADER)
    table.add_row(*ROW)
    show(table, LAST)
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in capsys.readouterr().out.splitlines()]


def cells(lines):
    """The cells of the table's only row, without blanks."""
    parts = zip(*(line.strip("│").split("│") for line in lines if line.startswith("│")), strict=True)
    return ["".join(part).replace(" ", "") for part in parts]


def test_a_pipe_gets_whole_rows(capsys):
    lines = said(capsys)
    assert len(lines) == 6
    assert cells(lines) == [cell.replace(" ", "") for cell in ROW]
    assert lines[-1] == LAST


def test_a_narrow_terminal_loses_nothing(monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    lines = said(capsys)
    assert {len(line) for line in lines[:-1]} == {80}
    assert cells(lines) == [cell.replace(" ", "") for cell in ROW]
