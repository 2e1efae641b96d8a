"""Progress of long work on a network: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Any

logger = logging.getLogger("cbs_opt")

_LOG_INTERVAL = 10.0  # seconds between lines of progress where there is no terminal


class WorkProgress:
    """A bar on a terminal, a line every ten seconds elsewhere; for `Export` and `Run`.

    Parameters
    ----------
    quiet : bool
        No bar.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._what = ""
        self._logged = time.perf_counter()
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(stderr=True), transient=True)

    def __enter__(self) -> WorkProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        if self._bar is not None:
            if what != self._what:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._what, self._task = what, self._bar.add_task(what, total=total)
            self._bar.update(self._task, completed=done)
        elif (now := time.perf_counter()) - self._logged >= _LOG_INTERVAL:
            self._logged = now
            logger.info(f"{what}: {done} of {total}")
