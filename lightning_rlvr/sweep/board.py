"""What one sees of a sweep while it runs: a table that stays up to date, or lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import mean
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lightning_rlvr.sweep.experiment import Run
from lightning_rlvr.sweep.state import Progress, State, planned, progress_of, read_json

STYLES: dict[State, str] = {"waiting": "dim", "running": "yellow", "finished": "green", "failed": "red"}


class Pace:
    """Tells the time left of a run from how fast it has gone while it was watched.

    >>> pace = Pace()
    >>> pace.left(2, 10, now=100.0), pace.left(4, 10, now=110.0)
    (None, 30.0)
    """

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def left(self, done: int, total: int | None, now: float) -> float | None:
        """Return the seconds left, None as long as that cannot be told."""
        if self._last is None or done > self._last[0]:
            self._last = (done, now)
        if self._first is None and done > 0:
            self._first = (done, now)
        if self._first is None or total is None or self._last[0] == self._first[0]:
            return None
        steps, seconds = self._last[0] - self._first[0], self._last[1] - self._first[1]
        return (total - done) * seconds / steps


class Board:
    """Shows the states of all runs, variant by seed, with step, last avg@k and time left of those under way."""

    def __init__(self, runs: Sequence[Run], states: Mapping[Run, State], console: Console) -> None:
        self._runs, self._states, self._console = runs, dict(states), console
        self._paces = {run: Pace() for run in runs}
        self._totals: dict[Run, int | None] = {}
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Board:
        """Begin to show."""
        if self._live is not None:
            self._live.start()
        self.draw()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Leave the last state standing."""
        if self._live is not None:
            self._live.stop()

    def now(self, run: Run, state: State) -> None:
        """Take a run's new state."""
        self._states[run] = state
        if self._live is None:
            took = (read_json(run.folder / "summary.json") or {}).get("seconds", {}).get("total")
            after = f" in {clock(took)}" if state == "finished" and took else ""
            reached = _accuracy(progress_of(run)) if state == "finished" else ""
            line = f"{run.name} {state}{after} {reached}".rstrip()
            self._console.print(f"{line} ({self._count()})", highlight=False, soft_wrap=True)
        self.draw()

    def draw(self) -> None:
        """Bring the table up to date."""
        if self._live is not None:
            self._live.update(self.table(), refresh=True)

    def table(self) -> Table:
        """Return the table: a row for each variant, a column for each seed."""
        seeds = list(dict.fromkeys(run.seed for run in self._runs))
        title = ", ".join([self._count(), *self._rest()])
        table = Table("variant", *(f"seed {seed}" for seed in seeds), title=title, title_justify="left")
        by_variant: dict[str, list[Text]] = {}
        for run in self._runs:
            by_variant.setdefault(run.variant, []).append(self._cell(run))
        for variant, cells in by_variant.items():
            table.add_row(variant, *cells)
        return table

    def _cell(self, run: Run) -> Text:
        state = self._states[run]
        text: str = state
        if state in ("running", "finished"):
            progress = progress_of(run)
            text = _accuracy(progress) if state == "finished" else self._under_way(run, progress)
        return Text(text, style=STYLES[state])

    def _under_way(self, run: Run, progress: Progress) -> str:
        if self._totals.get(run) is None:
            self._totals[run] = planned(run)
        total = self._totals[run]
        if total is None:
            return "starting"
        left = self._paces[run].left(progress.done, total, time.monotonic())
        step, rest = f"{progress.done}/{total}", f"{clock(left)} left" if left is not None else ""
        return " ".join(part for part in (step, _accuracy(progress), rest) if part)

    def _count(self) -> str:
        states = list(self._states.values())
        counts = [f"{states.count(state)} {state}" for state in ("running", "failed", "waiting") if state in states]
        return ", ".join([f"{states.count('finished')} of {len(states)} finished", *counts])

    def _rest(self) -> list[str]:
        """Estimate the time left of the sweep by the runs that have finished."""
        states = list(self._states.values())
        summaries = [read_json(run.folder / "summary.json") for run in self._runs if self._states[run] == "finished"]
        took = [summary["seconds"]["total"] for summary in summaries if summary]
        left = states.count("waiting") + states.count("running")
        if not took or not states.count("running"):
            return []
        return [f"about {clock(mean(took) * left / states.count('running'))} left"]


def clock(seconds: float) -> str:
    """Return a duration as one reads it.

    >>> clock(42), clock(200), clock(7300)
    ('42 s', '3:20', '2:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _accuracy(progress: Progress) -> str:
    return "" if progress.accuracy is None else f"{progress.accuracy:.3f}"
