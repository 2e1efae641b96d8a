"""Progress of a benchmark: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Any

from cbs_opt.bench.runs import store as kinds
from cbs_opt.bench.runs.store import Row

logger = logging.getLogger("cbs_opt")

_INTERVAL = 2.0  # seconds between plain lines


class Lines:
    """Logs a line every few seconds, with the time that is left; and one for each row that is not `ok`."""

    def __init__(self, names: dict[str, str]) -> None:
        self._names = names
        self._total = self._done = 0
        self._started = self._last = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last line as it is."""

    def start(self, total: int) -> None:
        """So many rows are to be made."""
        self._total = total
        self._started = self._last = time.monotonic()

    def row(self, row: Row) -> None:
        """Take notice of a row."""
        self._done += 1
        now = time.monotonic()
        if row.kind != kinds.OK:
            logger.warning(f"{self._what(row)}: {row.kind}: {row.message}")
        elif now - self._last < _INTERVAL and self._done < self._total:
            return
        self._last = now
        left = (now - self._started) / self._done * (self._total - self._done)
        logger.info(f"{self._done}/{self._total}, {duration(left)} left; {self._what(row)} {_loss(row)}")

    def _what(self, row: Row) -> str:
        name = self._names.get(row.instance_sha256, row.instance_sha256[:8])
        return f"{name} {row.sparsity:.3g} {row.label} ({row.objective_kind}), seed {row.seed}"


class Bar(Lines):
    """A bar with the time that is left, redrawn in place; rows that are not `ok` are logged above it."""

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__(names)
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            redirect_stdout=False,
        )
        self._task: Any = None
        self._streams: list[tuple[Any, Any]] = []

    def __enter__(self) -> Bar:
        self._progress.start()
        # Log lines go through the console from now on, so that they land above the bar.
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler):
                self._streams.append((handler, handler.stream))
                handler.setStream(sys.stderr)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar where it stands."""
        self._progress.stop()
        for handler, stream in self._streams:
            handler.setStream(stream)

    def start(self, total: int) -> None:
        """So many rows are to be made."""
        super().start(total)
        self._task = self._progress.add_task("rows", total=total)

    def row(self, row: Row) -> None:
        """Take notice of a row."""
        if row.kind != kinds.OK:
            logger.warning(f"{self._what(row)}: {row.kind}: {row.message}")
        self._progress.update(self._task, advance=1, description=f"{row.label[:24]:<24}")


def progress(names: dict[str, str], quiet: bool) -> Lines:
    """A bar on a terminal, else lines.

    Parameters
    ----------
    names : dict of str to str
        Names of instances by hash.
    quiet : bool
        No bar; the level of the log decides about the lines.
    """
    return Bar(names) if sys.stderr.isatty() and not quiet else Lines(names)


def duration(seconds: float) -> str:
    """Seconds as a short text."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _loss(row: Row) -> str:
    if row.objective is None:
        return row.kind
    seconds = "" if row.solve_s is None else f" in {row.solve_s:.2f} s"
    return f"{row.objective:.6e}{seconds}, {row.status}"
