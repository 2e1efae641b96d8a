"""Lower bounds for layers under their budget; see `relaxation` for the bound of one block-diagonal matrix."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cbs_opt.solvers.layers.bound_rows import CLOSE, DEPTHS, RowRefinement
from cbs_opt.solvers.layers.incumbent import Incumbent
from cbs_opt.solvers.layers.parallel import RowPool
from cbs_opt.solvers.layers.problem import Layer, LayerBudget, row_losses
from cbs_opt.solvers.layers.relaxation import BLOCK, LayerRelaxation
from cbs_opt.typing import FloatArray

_SWEEPS, _LEAST_SWEEPS = 200, 10  # of a layer between two steps of B: of one row, and of many
_MEMORY = 0.5  # weight of the previous Ω relative to the current one
_BARRIER = 3e-3  # least μ
_ROWS = 32  # visits between two bounds


def lagrangian_bound(
    tables: list[tuple[FloatArray, FloatArray, float]],
    scales: list[FloatArray],
    kept: int,
) -> tuple[float, float]:
    """The bound on the objective at the best price over all layers, and that price (doubled, with the scale).

    kept : how many weights stay. The price minimises a convex piecewise linear function: bisection of its slope.
    """
    values = [scale[:, None, None] * best for (_, best, _), scale in zip(tables, scales, strict=True)]

    def at(price: float) -> tuple[float, int]:
        total, number = price * kept, 0
        for value in values:
            shifted = value - price * np.arange(value.shape[2])
            choice = shifted.argmax(2)
            total += float(np.take_along_axis(shifted, choice[:, :, None], 2).sum())
            number += int(choice.sum())
        return total, number

    low, high = 0.0, max(float(v.max()) for v in values) + 1e-300
    for _ in range(45):
        middle = 0.5 * (low + high)
        _, number = at(middle)
        if number > kept:
            low = middle
        else:
            high = middle
        if number == kept:
            break
    price = min((low, middle, high), key=lambda p: at(p)[0])
    constant = sum(float(scale @ c) for (c, _, _), scale in zip(tables, scales, strict=True))
    total, _ = at(price)
    rounding = sum(t[2] for t in tables) + 1e-13 * abs(total)
    return 0.5 * (constant - total - rounding), price


def row_bounds(
    table: tuple[FloatArray, FloatArray, float], scale: FloatArray, kept: FloatArray
) -> tuple[float, FloatArray]:
    """The sum of the bounds of rows that keep given numbers of weights, and the best price of each row.

    kept : (rows,). The same bisection as in `lagrangian_bound`, for all rows at once.
    """
    constant, best, rounding = table
    counts = np.arange(best.shape[2])

    def at(price: FloatArray) -> tuple[FloatArray, FloatArray]:
        shifted = best - price[:, None, None] * counts
        choice = shifted.argmax(2)
        total = np.take_along_axis(shifted, choice[:, :, None], 2).sum((1, 2))
        return price * kept + total, choice.sum(1)

    low, high = np.zeros(kept.size), best.max((1, 2)) + 1e-300
    for _ in range(45):
        middle = 0.5 * (low + high)
        many = at(middle)[1] > kept
        low, high = np.where(many, middle, low), np.where(many, high, middle)
    ends = np.stack((low, high))
    totals = np.stack([at(price)[0] for price in ends])
    chosen = totals.argmin(0)
    rows = np.arange(kept.size)
    total = totals[chosen, rows]
    value = scale @ (constant - total - 1e-13 * np.abs(total)) - rounding
    return 0.5 * float(value), ends[chosen, rows]


class BoundSearch:
    """Bounds for all layers under their budget.

    `step` alternates Frank-Wolfe sweeps with steps of one B for each layer and of the prices; `refine` gives each
    row a B of its own.

    Parameters
    ----------
    layers : list of Layer
    budget : LayerBudget
    incumbent : Incumbent
        Its masks are the start; it receives the bounds.
    weights : list of float64 (rows, K)
        The refitted weights of the incumbent.
    pool : RowPool
    size : int
        Columns of a block at most.
    fixed : bool
        Whether kept weights are not updated (selection).
    price : float
        First price of a weight under one budget, in units of the objective; 0 for the one of the first bound.

    Attributes
    ----------
    value : float
        The last bound, which may be negative.
    """

    def __init__(
        self,
        layers: list[Layer],
        budget: LayerBudget,
        incumbent: Incumbent,
        weights: list[FloatArray],
        pool: RowPool,
        size: int = BLOCK,
        fixed: bool = False,
        price: float = 0.0,
    ) -> None:
        self.value = -np.inf
        self.budget, self.incumbent, self.pool = budget, incumbent, pool
        self._fixed = fixed
        self.parts: list[LayerRelaxation] = []
        self.layers = layers
        self._displacements, self._size = weights, size
        self.prices: list[FloatArray] = []
        if price > 0 and budget.total is not None:
            self.prices = [2 * price / layer.scale for layer in layers]
        self.barrier = 0.3
        self.omega: list[FloatArray | None] = [None] * len(layers)
        self._best: tuple[float, list[FloatArray], list[FloatArray]] | None = None  # bound, prices, blocks of B
        self._kept_rows: list[FloatArray] | None = None  # where the budget determines them
        if budget.per_row is not None:
            self._kept_rows = [
                (layer.columns - np.asarray(counts)).astype(np.float64)
                for layer, counts in zip(layers, budget.per_row, strict=True)
            ]

    def prepare(self) -> bool:
        """Relaxations and a first B for each layer; False if stopped."""
        for layer, displacement in zip(self.layers, self._displacements, strict=True):
            part = LayerRelaxation(layer, self.budget, displacement, self._size, self._fixed)
            if self.pool.stopped():
                return False
            part.first_blocks()
            self.parts.append(part)
            if self.pool.stopped():
                return False
        best = self._bound([part.tables() for part in self.parts])
        self.prices = self.prices or best
        return True

    def _bound(self, tables: list[tuple[FloatArray, FloatArray, float]]) -> list[FloatArray]:
        """Report the bound of these tables, one for each layer; the best prices for them."""
        scales = [layer.scale for layer in self.layers]
        value = 0.0
        if self.budget.total is not None:
            kept = sum(layer.weights.size for layer in self.layers) - self.budget.total
            value, price = lagrangian_bound(tables, scales, kept)
            prices = [price / scale for scale in scales]
        elif self._kept_rows is not None:
            prices = []
            for table, scale, kept_rows in zip(tables, scales, self._kept_rows, strict=True):
                here, price_of_row = row_bounds(table, scale, kept_rows)
                value += here
                prices.append(price_of_row)
        else:
            for (constant, best, rounding), scale in zip(tables, scales, strict=True):
                value += 0.5 * (float(scale @ (constant - best.max(2).sum(1))) - rounding)
            prices = [np.zeros(scale.size) for scale in scales]
        self.value = value
        self.incumbent.offer_bound(max(value, 0.0))  # S is positive semidefinite: 0 is a bound
        return prices

    def step(self) -> bool:
        """Sweeps at the present B and prices, the bound, then a step of both; False if stopped."""
        at = [price.copy() for price in self.prices]
        self._sweep(self.prices)
        self._bound([part.tables() for part in self.parts])
        if self.pool.stopped():
            return False
        if self._best is None or self.value > self._best[0]:
            self._best = self.value, at, [part.blocks_of() for part in self.parts]
        self._step_prices()
        unit = max(2 * self.incumbent.objective / len(self.parts), 1e-300)

        def improve(k: int) -> None:
            part, old = self.parts[k], self.omega[k]
            new = part.covariance() * (part.S.shape[0] / unit)
            omega = new if old is None else _MEMORY * old + (1 - _MEMORY) * new
            part.improve_blocks(omega, self.barrier)
            part.refactor()
            self.omega[k] = omega

        if not self.pool.map(improve, range(len(self.parts))):
            return False
        self.barrier = max(0.8 * self.barrier, _BARRIER)
        return True

    def _sweep(self, prices: list[FloatArray]) -> None:
        left = 2 * (self.incumbent.objective - max(self.value, 0.0))
        for part, price in zip(self.parts, prices, strict=True):
            # The mean of many rows needs few sweeps; a step of B costs as much as a hundred of one row.
            sweeps = max(_SWEEPS // price.size, _LEAST_SWEEPS)
            part.sweep(price, sweeps, CLOSE * left / len(self.parts), self.pool)

    def _restore(self) -> None:
        """Back to the B and prices of the best bound: the present ones are a step further, without sweeps."""
        if self._best is None:
            return
        self.value, self.prices, blocks = self._best
        for part, best in zip(self.parts, blocks, strict=True):
            part.set_blocks(best)
            part.refactor()
        self._sweep(self.prices)

    def refine(self, ended: Callable[[], bool]) -> None:
        """Visits of the rows, those with the largest gaps first, until all have settled, or `ended` or a stop.

        They start from the B of the best bound so far.
        """
        self._restore()
        refinements = [
            RowRefinement(part, 2 * row_losses(layer, weights))
            for part, layer, weights in zip(self.parts, self.layers, self._displacements, strict=True)
        ]
        kept = [(weights != 0).sum(1).astype(np.float64) for weights in self._displacements]
        every = [(k, r) for k, layer in enumerate(self.layers) for r in range(layer.rows)]
        prices = self._bound([each.best for each in refinements])

        def visit(i: int) -> None:
            if ended():
                return
            k, r = chosen[i]
            refinements[k].visit(r, float(prices[k][r]), kept[k][r], self.pool.flag)

        depth = 0
        while not ended():
            gaps = [
                each.gaps(price, number) for each, price, number in zip(refinements, prices, kept, strict=True)
            ]
            order = sorted(every, key=lambda at: -gaps[at[0]][at[1]])
            waiting = [(k, r) for k, r in order if gaps[k][r] > 0]
            if not waiting:
                if depth == DEPTHS:
                    return
                depth += 1
                for each in refinements:
                    each.deepen()
            for first in range(0, len(waiting), _ROWS):
                chosen = waiting[first : first + _ROWS]
                if not self.pool.map(visit, range(len(chosen))):
                    return
                prices = self._bound([each.best for each in refinements])
                if ended():
                    return

    def _step_prices(self) -> None:
        """Prices follow the numbers of kept weights of the mixtures, which are the slope of the bound in them."""
        if self.budget.total is not None:
            kept = sum(layer.weights.size for layer in self.layers) - self.budget.total
            ratio = sum(float(part.kept.sum()) for part in self.parts) / max(kept, 1e-9)
            factor = float(np.clip(ratio, 0.6, 1.6))
            self.prices = [np.maximum(price, 1e-300) * factor for price in self.prices]
        elif self._kept_rows is not None:
            self.prices = [
                np.maximum(price, 1e-300) * np.clip(part.kept.sum(1) / np.maximum(kept, 1e-9), 0.6, 1.6)
                for price, part, kept in zip(self.prices, self.parts, self._kept_rows, strict=True)
            ]
