"""The joint problem on layers with many columns: magnitude, ADMM with growing patience, then exchanges.

Room: layers; `solve` alone imports it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np

from cbs_opt.interrupt import Interrupted, interruptible
from cbs_opt.solvers.layers.incumbent import Incumbent
from cbs_opt.solvers.layers.large import BulkExchange, refit_rows
from cbs_opt.solvers.layers.problem import Layer, LayerBudget
from cbs_opt.solvers.layers.wide_admm import Single, WideAdmm, WideLayer
from cbs_opt.typing import BoolArray

logger = logging.getLogger("cbs_opt")

_FIRST_REFITS = (4, 20)  # iterations of conjugate gradients on a start, each followed by an answer
_QUICK = 3  # iterations of the first ADMM between two changes of ρ
_LONGEST = 64  # iterations between two changes of ρ in the second run
_WITHOUT_LIMIT = 16  # the same, without a limit on time
_WORTHWHILE = 2 * _QUICK  # below this a second run is not better than the first
_SHARE = 0.75  # of the remaining time for the second run
_GAIN = 1e-5  # relative gain of a round of exchanges below which the search has converged


class WideSearch:
    """Layers with more columns than a tableau of every row allows, under one budget.

    A first answer stands at once: magnitude, at the upper bound ½ Σ_r s_r (Σ_i |w_i| √S_ii)² of its loss; then its
    refit, that of the warm start, and ADMM (`WideAdmm`). A second ADMM spends most of the remaining time: the more
    iterations between two changes of ρ, the better. Exchanges (`BulkExchange`) follow until a round gains less
    than 1e-5.

    Parameters
    ----------
    layers : list of Layer
    budget : LayerBudget
    incumbent : Incumbent
    should_stop : callable
        Asked before every product with 256 rows, and every panel of a factorisation.
    remaining : callable
        Seconds, infinite without a limit.
    max_rounds : int, optional
        The first ADMM is one, the second one, and every exchange of all rows.
    clock : callable
    """

    def __init__(
        self,
        layers: list[Layer],
        budget: LayerBudget,
        incumbent: Incumbent,
        should_stop: Callable[[], bool],
        remaining: Callable[[], float],
        max_rounds: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.layers, self.budget, self.incumbent = layers, budget, incumbent
        self.should_stop, self.remaining, self.clock = should_stop, remaining, clock
        self.rounds_left = np.inf if max_rounds is None else max_rounds

    def run(self, starts: list[list[BoolArray]]) -> bool:
        """Search from feasible masks; False if it was stopped before all of these had been evaluated."""
        for masks in starts:
            self.incumbent.offer(self._loss_bound(masks), masks)
        compared = False
        try:
            with interruptible(self.should_stop):
                wide = [WideLayer(layer) for layer in self.layers]
                for masks in starts:
                    weights: list[Single | None] = [None] * len(wide)
                    for iterations in _FIRST_REFITS:
                        parts = zip(wide, masks, weights, strict=True)
                        refitted = [refit_rows(w, mask, x, iterations) for w, mask, x in parts]
                        self.incumbent.offer(self._objective(wide, refitted), masks)
                        weights = list(refitted)
                compared = True
                self._search(wide)
        except Interrupted:
            pass
        except np.linalg.LinAlgError as error:
            logger.warning(f"layers: {error}; the search ends here")
        return compared

    def _loss_bound(self, masks: list[BoolArray]) -> float:
        total = 0.0
        for layer, mask in zip(self.layers, masks, strict=True):
            norms = np.where(mask, np.abs(layer.weights), 0.0) @ np.sqrt(np.maximum(np.diag(layer.hessian), 0.0))
            total += 0.5 * float(layer.scale @ norms**2)
        return total

    def _objective(self, wide: list[WideLayer], weights: list[Single]) -> float:
        pairs = zip(wide, weights, strict=True)
        return 0.5 * sum(float(w.layer.scale @ w.losses(x)) for w, x in pairs)

    def _search(self, wide: list[WideLayer]) -> None:
        admm = WideAdmm(wide, self.budget, self.incumbent.offer, self.clock)
        if self.rounds_left < 1:
            return
        self.rounds_left -= 1
        best, weights = admm.run(_QUICK)
        value = admm.objective(weights)
        self.incumbent.offer(value, best)
        hold = _WITHOUT_LIMIT
        if np.isfinite(self.remaining()):
            hold = int(min(_LONGEST, admm.affordable(_SHARE * self.remaining())))
        if hold >= _WORTHWHILE and self.rounds_left >= 1:
            self.rounds_left -= 1
            masks, found = admm.run(hold)
            if (reached := admm.objective(found)) < value:
                best, weights, value = masks, found, reached
            self.incumbent.offer(reached, masks)
        self._exchange(wide, best, weights)

    def _exchange(self, wide: list[WideLayer], masks: list[BoolArray], weights: list[Single]) -> None:
        if self.rounds_left < 1:
            return
        engines = [
            BulkExchange(w, self.budget.pattern, mask, x) for w, mask, x in zip(wide, masks, weights, strict=True)
        ]
        value = sum(engine.objective for engine in engines)
        self.incumbent.offer(value, [engine.pruned for engine in engines])
        while self.rounds_left >= 1 and any((engine.moves > 0).any() for engine in engines):
            self.rounds_left -= 1
            improved = sum(engine.round() for engine in engines)
            before, value = value, sum(engine.objective for engine in engines)
            self.incumbent.offer(value, [engine.pruned for engine in engines])
            if improved and before - value < _GAIN * before:
                return
