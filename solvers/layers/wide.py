"""The joint problem on layers with many columns: magnitude, ADMMs of growing patience, then exchanges.

Room: layers; `solve` alone imports it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np

from cbs_opt.interrupt import Interrupted, interruptible
from cbs_opt.solvers.layers.incumbent import Incumbent
from cbs_opt.solvers.layers.large import BulkExchange, refit_in_place, refit_rows
from cbs_opt.solvers.layers.problem import Layer, LayerBudget, loss_bound
from cbs_opt.solvers.layers.wide_admm import Single, WideAdmm, WideLayer
from cbs_opt.typing import BoolArray

logger = logging.getLogger("cbs_opt")

Found = tuple[list[BoolArray], list[Single], float]
"""Masks, scaled weights and their loss."""

BRIEF, LONGER = 4, 20
"""Iterations of conjugate gradients on a start: for a first answer, and near its refit."""

QUICK, PATIENT, MORE = 3, 4, 2
"""Iterations between two changes of ρ: in the first ADMM, as ALPS, and the second; times more in later ones."""

SETTLED = 1e-3
"""Relative gain of an ADMM below which exchanges follow."""

GAIN = 1e-5
"""Relative gain of a round of exchanges below which the search has converged."""

_FAR = 0.5  # of the loss of a start after the first of these, which the others lower by a tenth or two
_PRODUCTS_OF_EVALUATION = 25  # in single precision, or what takes that long
_WITHOUT_LIMIT = 8  # iterations between two changes of ρ in the last one, without a limit on time
_WORTHWHILE = 4  # below this another run gains little
_SHARE = 0.85  # of the remaining time for the last ADMM


class WideSearch:
    """Layers with more columns than a tableau of every row allows, under one budget.

    A first answer stands at once: magnitude, at the upper bound ½ Σ_r s_r (Σ_i |w_i| √S_ii)² of its loss; then
    after a few iterations of its refit and that of the warm start, and ADMM (`WideAdmm`). Where it does not halve
    the loss, the refits are finished. A warm start that halves the loss of magnitude takes the place of the first
    ADMM. Further ones go on from there, each with twice as many iterations between two changes of ρ, until one
    gains less than 1e-3 or the time for it is over. A refit and exchanges (`BulkExchange`) follow until a round
    gains less than 1e-5.

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
        Every ADMM is one, and every exchange of all rows.
    clock : callable
    keep_back : callable
        Called with the seconds that an evaluation of the answer takes, once they are known; the run may then end
        earlier by so much.
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
        keep_back: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        self.layers, self.budget, self.incumbent = layers, budget, incumbent
        self.keep_back = keep_back
        self.should_stop, self.remaining, self.clock = should_stop, remaining, clock
        self.rounds_left = np.inf if max_rounds is None else max_rounds

    def run(self, starts: list[list[BoolArray]]) -> bool:
        """Search from feasible masks; False if it was stopped before all of these had been evaluated."""
        for masks in starts:
            self.incumbent.offer(loss_bound(self.layers, masks), masks)
        self._to_beat = 0.0  # loss from which a search is better than all starts, whatever their refit gives
        try:
            with interruptible(self.should_stop):
                wide = [WideLayer(layer) for layer in self.layers]
                known: list[Found] = []  # masks, their weights after a few iterations, and the loss of these
                for masks in starts:
                    began = self.clock()
                    weights = [refit_rows(w, mask, None, BRIEF) for w, mask in zip(wide, masks, strict=True)]
                    known.append((masks, weights, value := self._objective(wide, weights)))
                    self.incumbent.offer(value, masks, weights)
                product = (self.clock() - began) / (BRIEF + 2)  # one more for the residual, and for the loss
                self.keep_back(_PRODUCTS_OF_EVALUATION * product)
                self._to_beat = _FAR * min(value for *_, value in known)
                self._admm = WideAdmm(wide, self.budget, self._offer, self.clock)
                found = self._first(wide, known)
                for masks, weights, _ in known:
                    if found is None or found[2] > self._to_beat:
                        parts = zip(wide, masks, weights, strict=True)
                        weights = [refit_rows(w, mask, x, LONGER) for w, mask, x in parts]
                        self.incumbent.offer(self._objective(wide, weights), masks, weights)
                self._to_beat = np.inf
                if found is not None:
                    self.incumbent.offer(found[2], *found[:2])
                    self._search(wide, found)
        except Interrupted:
            pass
        except np.linalg.LinAlgError as error:
            logger.warning(f"layers: {error}; the search ends here")
        return self.incumbent.objective <= self._to_beat

    def _offer(self, value: float, masks: list[BoolArray], weights: list[Single]) -> None:
        if value <= self._to_beat:  # else a start may be better, which is not known yet
            self.incumbent.offer(value, masks, weights)

    def _objective(self, wide: list[WideLayer], weights: list[Single]) -> float:
        pairs = zip(wide, weights, strict=True)
        return 0.5 * sum(float(w.layer.scale @ w.losses(x)) for w, x in pairs)

    def _first(self, wide: list[WideLayer], known: list[Found]) -> Found | None:
        """A good warm start, or the answer of the first ADMM; None without a round for that."""
        masks, weights, value = known[-1]
        if len(known) > 1 and value <= _FAR * known[0][2]:
            weights = [refit_rows(w, mask, x, LONGER) for w, mask, x in zip(wide, masks, weights, strict=True)]
            self._admm.start_from(masks, weights)
        elif self.rounds_left < 1:
            return None
        else:
            self.rounds_left -= 1
            masks, weights = self._admm.run(QUICK)
            self._offer(self._admm.objective(weights), masks, weights)
            weights = [refit_rows(w, mask, x, BRIEF) for w, mask, x in zip(wide, masks, weights, strict=True)]
        value = self._admm.objective(weights)
        self._offer(value, masks, weights)
        return masks, weights, value

    def _search(self, wide: list[WideLayer], best: Found) -> None:
        """Further ADMMs; then, in the time that they leave, a refit and exchanges."""
        hold = PATIENT
        while self.rounds_left >= 1:
            if np.isfinite(self.remaining()):
                hold = int(min(hold, self._admm.affordable(_SHARE * self.remaining())))
            if not _WORTHWHILE <= hold <= (_WITHOUT_LIMIT if np.isinf(self.remaining()) else np.inf):
                break
            self.rounds_left -= 1
            masks, weights = self._admm.run_again(hold)
            value = self._admm.objective(weights)
            self.incumbent.offer(value, masks, weights)
            gained = best[2] - value
            if gained > 0:
                best = masks, weights, value
            if gained < SETTLED * value:
                break
            hold *= MORE
        if self.rounds_left >= 1:
            self.exchange(wide, best)

    def exchange(self, wide: list[WideLayer], start: Found) -> None:
        """A refit and exchanges, until a round gains little."""
        masks, weights, _ = start
        self.incumbent.adopt(masks, weights)
        for w, mask, x in zip(wide, masks, weights, strict=True):
            refit_in_place(w, mask, x)
        engines = [
            BulkExchange(w, self.budget.pattern, mask, x) for w, mask, x in zip(wide, masks, weights, strict=True)
        ]
        value = sum(engine.objective for engine in engines)
        self.incumbent.offer(value, [e.pruned for e in engines], [e.X for e in engines])
        while self.rounds_left >= 1 and any((engine.moves > 0).any() for engine in engines):
            self.rounds_left -= 1
            improved = sum(engine.round() for engine in engines)
            before, value = value, sum(engine.objective for engine in engines)
            self.incumbent.offer(value, [e.pruned for e in engines], [e.X for e in engines])
            if improved and before - value < GAIN * before:
                return
