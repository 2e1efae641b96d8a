"""A block-diagonal matrix of its own for each row: the second half of the search for bounds.

The bound of a layer at a price is a sum over its rows, and each row may use another B. From the B of all rows on,
a row alternates Frank-Wolfe cycles with steps of its B, and keeps the best table of block values that it found. A
step costs O(K³), most of it in matrix products; the rows with the largest gaps come first.
"""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.layers.parallel import StopFlag
from cbs_opt.solvers.layers.relaxation import LayerRelaxation
from cbs_opt.typing import FloatArray

CLOSE = 0.05
"""Gaps of the mixtures at which sweeps end, relative to the distance from the bound to the incumbent."""

DEPTHS = 4
"""How often settled rows may go on with twice the sweeps."""

_STEPS = 3  # of B in one visit
_SWEEPS = 80  # of Frank-Wolfe between two steps of B
_MEMORY = 0.5  # weight of the previous Ω relative to the current one
_FIRST_BARRIER, _BARRIER, _DECAY = 0.03, 2e-3, 0.8
_SETTLED, _IDLE = 2e-3, 3  # relative gain of a visit, and how many with less settle a row


class RowRefinement:
    """The bounds of the rows of a layer, each with a B of its own once it was visited.

    Parameters
    ----------
    shared : LayerRelaxation
        With the B of all rows and their mixtures.
    losses : float64 (rows,)
        Loss of the incumbent's rows with their scales, doubled.

    Attributes
    ----------
    best : (constants (rows,), tables (rows, blocks, m + 1), rounding error)
        The best of each row; see `LayerRelaxation.tables`.
    """

    def __init__(self, shared: LayerRelaxation, losses: FloatArray) -> None:
        self._shared, self._losses = shared, losses
        self._constant, self._tables, self._rounding = shared.tables_of_rows()
        rows = losses.size
        self._blocks: list[FloatArray | None] = [None] * rows
        self._omega: list[FloatArray | None] = [None] * rows
        self._barrier = np.full(rows, _FIRST_BARRIER)
        self._idle = np.zeros(rows, dtype=np.int64)  # visits without a gain
        self._depth = 0

    @property
    def best(self) -> tuple[FloatArray, FloatArray, float]:
        """The best table of each row."""
        return self._constant, self._tables, float(self._rounding.sum())

    def _value(self, constant: float, table: FloatArray, price: float) -> float:
        best = (table - price * np.arange(table.shape[1])).max(1)
        return float(constant - best.sum())

    def gaps(self, price: FloatArray, kept: FloatArray) -> FloatArray:
        """What the rows may still gain, with their scales, doubled: 0 for rows that have settled.

        price : (rows,) doubled, without the scale; kept : (rows,) numbers of the incumbent.
        """
        out = np.zeros(self._losses.size)
        for r in np.flatnonzero(self._idle < _IDLE):
            value = self._value(self._constant[r], self._tables[r], price[r])
            out[r] = max(self._losses[r] + self._shared.scale[r] * (price[r] * kept[r] - value), 0.0)
        return out

    def deepen(self) -> None:
        """Let all rows go on with twice the sweeps and half the barrier."""
        self._depth += 1
        self._idle[:] = 0

    def visit(self, r: int, price: float, kept: float, flag: StopFlag) -> None:
        """Steps of row r's B at a price, from where the last visit ended."""
        part = self._shared.of_row(r)
        if (blocks := self._blocks[r]) is not None:
            part.set_blocks(blocks)
            part.refactor()
        prices = np.array([price])
        value = first = self._value(self._constant[r], self._tables[r], price)
        loss = max(self._losses[r], 1e-12 * float(self._losses.sum()), 1e-300)
        unit = part.S.shape[0] / loss
        finer = 0.5**self._depth
        least = _BARRIER * finer
        for _ in range(_STEPS):
            left = max(self._losses[r] + self._shared.scale[r] * (price * kept - value), 0.0)
            part.sweep_rows(slice(0, 1), prices, _SWEEPS << self._depth, CLOSE * left * finer, flag)
            if flag[0]:
                return
            constant, tables, rounding = part.tables_of_rows()
            now = self._value(constant[0], tables[0], price)
            if now > value:
                value = now
                self._constant[r], self._tables[r], self._rounding[r] = constant[0], tables[0], rounding[0]
            new = part.covariance() * unit
            old = self._omega[r]
            omega = new if old is None else _MEMORY * old + (1 - _MEMORY) * new
            part.improve_blocks(omega, float(self._barrier[r]))
            part.refactor()
            self._omega[r] = omega
            self._barrier[r] = max(_DECAY * self._barrier[r], least)
        self._blocks[r] = part.blocks_of()
        for name in ("u", "M", "kept"):
            getattr(self._shared, name)[r] = getattr(part, name)[0]
        gained = value - first >= _SETTLED * loss / self._shared.scale[r]
        self._idle[r] = 0 if gained or self._barrier[r] > 2 * least else self._idle[r] + 1
