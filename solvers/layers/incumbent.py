"""The best feasible masks so far, and the callbacks that receive them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from cbs_opt.solvers.layers.problem import Layer
from cbs_opt.typing import BoolArray, FloatArray

Report = Callable[[float, list[BoolArray]], object]
"""Called with the objective and the masks of a new incumbent, and from the calling thread of the solver only."""


class Incumbent:
    """Masks with the least objective, the best bound, and their history.

    Parameters
    ----------
    layers : list of Layer
    report, report_bound : callable, optional
    clock : callable
    """

    def __init__(
        self,
        layers: list[Layer],
        report: Report | None = None,
        report_bound: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self.layers = layers
        self.objective = np.inf
        self.bound: float | None = None
        self.pruned: list[BoolArray] = []
        self.weights: list[FloatArray] | None = None
        self.history: list[tuple[float, float | None, float | None]] = []
        self._report, self._report_bound = report, report_bound
        self._started = clock()

    def offer(
        self, objective: float, pruned: list[BoolArray], weights: Sequence[FloatArray] | None = None
    ) -> bool:
        """Keep the masks, and weights near their best ones, if they are better; returns whether they are."""
        if not objective < self.objective:
            return False
        self.objective, self.pruned = float(objective), [np.array(mask, dtype=bool) for mask in pruned]
        self.weights = None if weights is None else [np.array(w) for w in weights]
        self._record()
        if self._report is not None:
            self._report(self.objective, self.pruned)
        return True

    def adopt(self, pruned: list[BoolArray], weights: list[FloatArray]) -> None:
        """Take weights that fit the masks, and are not copied: the caller improves them. Ignored for others."""
        if all(np.array_equal(a, b) for a, b in zip(self.pruned, pruned, strict=True)):
            self.weights = weights

    def offer_bound(self, bound: float) -> bool:
        """Keep a proven lower bound if it is better."""
        if not np.isfinite(bound) or (self.bound is not None and bound <= self.bound):
            return False
        self.bound = float(bound)
        self._record()
        if self._report_bound is not None:
            self._report_bound(self.bound)
        return True

    def _record(self) -> None:
        objective = self.objective if np.isfinite(self.objective) else None
        self.history.append((self._clock() - self._started, objective, self.bound))
