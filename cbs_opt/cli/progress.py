"""The log table of a solve: time, iteration, incumbent, bound, gap."""

from __future__ import annotations

import logging

from cbs_opt.monitor import Monitor
from cbs_opt.view.text import number, percent

logger = logging.getLogger("cbs_opt")

_INTERVAL = 0.2  # seconds between rows


class ProgressTable:
    """Logs a row when the incumbent or the bound improves, at most five a second; call it with a monitor."""

    def __init__(self) -> None:
        self._last_row: float | None = None
        self._pending = False

    def __call__(self, monitor: Monitor) -> None:
        """Record an improvement."""
        self._pending = True
        if self._last_row is None:
            logger.info(f"{'time':>9}  {'iteration':>10}  {'incumbent':>14}  {'bound':>14}  {'gap':>8}")
        elif monitor.elapsed - self._last_row < _INTERVAL:
            return
        self._row(monitor.elapsed, monitor.iterations, monitor.objective, monitor.bound, monitor.gap)

    def finish(
        self,
        seconds: float,
        iterations: int,
        objective: float | None,
        bound: float | None,
        gap: float | None,
    ) -> None:
        """Log the last state if it has not been logged."""
        if self._pending or self._last_row is None:
            self._row(seconds, iterations, objective, bound, gap)

    def _row(
        self,
        seconds: float,
        iterations: int,
        objective: float | None,
        bound: float | None,
        gap: float | None,
    ) -> None:
        self._last_row, self._pending = seconds, False
        logger.info(
            f"{seconds:8.2f}s  {iterations:>10}  {number(objective):>14}  {number(bound):>14}  {percent(gap):>8}"
        )
