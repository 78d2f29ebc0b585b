"""Shows how far long work has come: a live table on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tightfit.cluster.units import format_bytes, format_seconds
from tightfit.workers.api import LoadProgress

PLAIN_INTERVAL_S = 3.0
WIDE_COLUMNS = 110
"""Terminal width from which on there is room for what is being read."""
FINAL_PHASES = ("ready", "failed")


def describe(label: str, progress: LoadProgress) -> str:
    """One line: "stage 0: loading 40.0 MiB of 135.0 MiB (30 %), 20.0 MiB/s, 4.7 s left; …"."""
    line = f"{label}: {progress.phase}"
    if progress.bytes_total:
        share = 100 * progress.bytes_done // progress.bytes_total
        line += f" {format_bytes(progress.bytes_done)} of {format_bytes(progress.bytes_total)}"
        line += f" ({share} %)"
    if progress.phase in FINAL_PHASES:
        line += f" after {format_seconds(progress.elapsed_s)}" if progress.elapsed_s else ""
    else:
        rate, left = _rate(progress), _left(progress)
        line += f", {rate}" if rate else ""
        line += f", {left} left" if left else ""
    message = _message(progress)
    return f"{line}; {message}" if message else line


def _message(progress: LoadProgress) -> str:
    return "" if progress.phase == "ready" else progress.message


def _rate(progress: LoadProgress) -> str:
    return f"{format_bytes(progress.bytes_per_s)}/s" if progress.bytes_done else ""


def _left(progress: LoadProgress) -> str:
    all_read = progress.bytes_done >= progress.bytes_total
    if progress.seconds_left is None or all_read or progress.phase in FINAL_PHASES:
        return ""
    return format_seconds(progress.seconds_left)


def load_table(rows: Mapping[str, LoadProgress], width: int) -> Table:
    """The live view, one row per label; narrow terminals leave out what is being read."""
    wide = width >= WIDE_COLUMNS
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("phase", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in ("read", "rate", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    if wide:
        table.add_column("", no_wrap=True)
    for label, progress in rows.items():
        total = max(1, progress.bytes_total)
        row: list[RenderableType] = [
            label,
            progress.phase,
            ProgressBar(total=total, completed=progress.bytes_done, width=24 if wide else 10),
            f"{format_bytes(progress.bytes_done)} of {format_bytes(progress.bytes_total)}"
            if progress.bytes_total
            else "",
            _rate(progress),
            _left(progress),
        ]
        table.add_row(*row, *([Text(_message(progress))] if wide else []))
    return table


class LoadView:
    """The progress of some pieces of work, on stderr, while the `with` block runs.

    Args:
        labels: of the pieces, such as "stage 0".
        console: where to; default: stderr.
        interval_s: seconds between a piece's lines when the console is no terminal.
        clock: a monotonic clock, in seconds.
    """

    def __init__(
        self,
        labels: Sequence[str],
        *,
        console: Console | None = None,
        interval_s: float = PLAIN_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._rows = {label: LoadProgress(phase="waiting") for label in labels}
        self._interval_s = interval_s
        self._clock = clock
        self._printed_s: dict[str, float] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(
                load_table(self._rows, self._console.width),
                console=self._console,
                refresh_per_second=8,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, label: str, progress: LoadProgress) -> None:
        """Show a piece's newest progress."""
        phase_changed = progress.phase != self._rows[label].phase
        self._rows[label] = progress
        if self._live is not None:
            self._live.update(load_table(self._rows, self._console.width))
            return
        now, last = self._clock(), self._printed_s.get(label)
        if last is not None and not phase_changed and now - last < self._interval_s:
            return
        if progress.phase in FINAL_PHASES and not phase_changed:
            return
        self._printed_s[label] = now
        self._console.print(
            describe(label, progress), markup=False, highlight=False, soft_wrap=True
        )
