"""The clock, the incumbent and the history of a run: the interface between a solver and its caller."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbs_opt.result import HistoryRow, Status, relative_gap
from cbs_opt.stop import Stop
from cbs_opt.typing import BoolArray

logger = logging.getLogger("cbs_opt")

OPTIMAL_GAP = 1e-6
"""Relative gap up to which a selection counts as optimal."""

Callback = Callable[["Monitor"], None]
"""Called after each new incumbent or bound, one call at a time, from a thread of the solver; progress printers are
callbacks."""


class Monitor:
    """Keeps the best selection and bound of a run, and decides when to stop.

    A solver reports selections and bounds with `report` and `report_bound`, counts iterations with `advance`, and
    calls `should_stop` about every 50 ms. Reported values survive interrupts, limits and errors.

    Parameters
    ----------
    stop : Stop
    callback : callable, optional
    clock : callable
        Seconds, monotonic.

    Attributes
    ----------
    weights : float (n,) or None
        Set by a solver: weights near the best ones of the incumbent, from which the evaluator starts.
    """

    def __init__(
        self,
        stop: Stop | None = None,
        callback: Callback | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.stop = stop or Stop()
        self.callback = callback
        self.iterations = 0
        self.objective: float | None = None
        self.bound: float | None = None
        self.reason: Status | None = None
        self._pruned: BoolArray | None = None
        self.weights: NDArray[Any] | None = None
        self._history: list[HistoryRow] = []
        self._last_improvement = 0
        self._reported: set[bytes] = set()
        self._clock = clock
        self._started, self._spent, self._reserve = clock(), 0.0, 0.0

    def start(self, spent: float = 0.0) -> None:
        """Start the clock; preparation ends here, and of the time limit it has used up `spent` seconds."""
        self._started, self._spent = self._clock(), spent
        if self.reason is Status.TIME_LIMIT and not spent:
            self.reason = None

    def keep_back(self, seconds: float) -> None:
        """End so much before the time limit, at most half of it, to evaluate the answer within the limit."""
        self._reserve = min(seconds, 0.5 * (self.stop.time_limit or 0.0))

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    @property
    def remaining(self) -> float:
        """Seconds until the time limit, less what is kept back; infinity without one."""
        limit = self.stop.time_limit
        return float("inf") if limit is None else limit - self._spent - self._reserve - self.elapsed

    @property
    def pruned(self) -> BoolArray | None:
        """The incumbent, bool (n,)."""
        return self._pruned

    @property
    def gap(self) -> float | None:
        """Relative gap between incumbent and bound."""
        return relative_gap(self.objective, self.bound)

    @property
    def closed(self) -> bool:
        """Whether bound and incumbent agree to `OPTIMAL_GAP`: the incumbent is then proven optimal."""
        return self.gap is not None and self.gap <= OPTIMAL_GAP

    @property
    def history(self) -> tuple[HistoryRow, ...]:
        """Every improvement so far."""
        return tuple(self._history)

    def advance(self, iterations: int = 1) -> None:
        """Count finished iterations."""
        self.iterations += iterations

    def report(self, objective: float, pruned: BoolArray, exact: bool = True) -> bool:
        """Offer a selection; it becomes the incumbent if it is better. Returns whether it did.

        `exact` is False where `objective` is only an upper bound of its loss: the run then compares it again in
        the end.
        """
        objective = float(objective)
        if exact and np.isfinite(objective):
            self._reported.add(_key(pruned))
        if not np.isfinite(objective) or (self.objective is not None and objective >= self.objective):
            return False
        self.objective, self._pruned, self.weights = objective, np.array(pruned, dtype=bool), None
        self._last_improvement = self.iterations
        self._record()
        return True

    def note(self, pruned: BoolArray) -> None:
        """Note that the incumbent is known to be no worse than this selection."""
        self._reported.add(_key(pruned))

    def has_seen(self, pruned: BoolArray) -> bool:
        """Whether this selection was reported with its loss, or noted, so that the incumbent is not worse."""
        return _key(pruned) in self._reported

    def report_bound(self, bound: float) -> bool:
        """Offer a proven lower bound; returns whether it improves on the current one."""
        bound = float(bound)
        if not np.isfinite(bound) or (self.bound is not None and bound <= self.bound):
            return False
        self.bound = bound
        self._record()
        return True

    def should_stop(self) -> bool:
        """Whether a rule of `stop` holds; `reason` is then that rule."""
        if self.reason is None:
            self.reason = self._rule_that_holds()
        return self.reason is not None

    def out_of_time(self) -> bool:
        """Whether the time limit or an interrupt holds: what other threads may ask while this one reports."""
        stop = self.stop
        return (stop.should_stop is not None and stop.should_stop()) or self.remaining <= 0

    def reached(self) -> Status | None:
        """The goal that the incumbent has reached: the target or the gap, if any."""
        stop = self.stop
        if self.objective is not None and stop.target is not None and self.objective <= stop.target:
            return Status.TARGET_REACHED
        if stop.gap is not None and self.gap is not None and self.gap <= stop.gap:
            return Status.GAP_REACHED
        return None

    def _rule_that_holds(self) -> Status | None:
        stop = self.stop
        if stop.should_stop is not None and stop.should_stop():
            return Status.INTERRUPTED
        if (reached := self.reached()) is not None:
            return reached
        if stop.max_iterations is not None and self.iterations >= stop.max_iterations:
            return Status.ITERATION_LIMIT
        if (
            stop.no_improvement is not None
            and self.objective is not None
            and self.iterations - self._last_improvement >= stop.no_improvement
        ):
            return Status.NO_IMPROVEMENT
        if self.remaining <= 0:
            return Status.TIME_LIMIT
        return None

    def _record(self) -> None:
        self._history.append(HistoryRow(self.elapsed, self.iterations, self.objective, self.bound))
        if self.callback is not None:
            self.callback(self)


def _key(pruned: BoolArray) -> bytes:
    return hashlib.blake2b(np.packbits(pruned).tobytes(), digest_size=16).digest()
