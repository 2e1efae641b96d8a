"""Layers too large for a tableau of each row: exchanges of many weights at once, refits by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbs_opt.linalg import inverse_pd
from cbs_opt.solvers.layers.incumbent import Incumbent
from cbs_opt.solvers.layers.problem import Layer, LayerBudget
from cbs_opt.solvers.layers.refit import refit_by_gradients
from cbs_opt.typing import BoolArray, FloatArray, IntArray

_SHARE = 0.03  # of a row's kept weights that one exchange may move at first
_MOST = 256  # weights of a row that one exchange may move
_SINGLE = 1500  # from this many columns on, single precision


class BulkExchange:
    """Rows of one layer with fixed numbers of pruned weights, improved together.

    A weight s is removed at the estimate x_s²/t_s and a weight r returns at d_r²/a_r, where t and a are the
    geometric means of the bounds that S_ii and [S⁻¹]_ii give on the diagonals of the tableau. The cheapest
    removals of a row are paired with its best returns; it keeps the change only if its loss fell.
    The number of pairs a row may exchange grows with success and is halved without. All rows go through the same
    matrix products.

    Parameters
    ----------
    layer : Layer
    pattern : (n, m), optional
        Exchanges stay inside of each m columns.
    pruned : bool (rows, K)
    should_stop : callable
    """

    def __init__(
        self,
        layer: Layer,
        pattern: tuple[int, int] | None,
        pruned: BoolArray,
        should_stop: Callable[[], bool],
    ) -> None:
        self.layer, self.pattern, self.should_stop = layer, pattern, should_stop
        kind: Any = np.float32 if layer.columns >= _SINGLE else np.float64
        self.S: NDArray[Any] = layer.hessian.astype(kind)
        self.W: NDArray[Any] = layer.weights.astype(kind)
        self.pruned = pruned.copy()
        inverse = inverse_pd(layer.hessian)
        diagonal = np.diag(layer.hessian)
        conditional = 1 / diagonal if inverse is None else np.diag(inverse)
        self.t = np.sqrt(np.maximum(conditional, 1e-300) / diagonal).astype(kind)  # of T; its inverse is that of A
        self.moves = np.maximum(1, _SHARE * (~pruned).sum(1)).astype(np.int64)
        self.X = self._refit(self.W, pruned, None, 80)
        self.losses = self._losses(self.X, slice(None))

    def _refit(
        self, W: NDArray[Any], pruned: BoolArray, start: NDArray[Any] | None, iterations: int
    ) -> NDArray[Any]:
        tolerance = 1e-7 if W.dtype == np.float32 else 1e-12
        return refit_by_gradients(self.S, W, pruned, start, iterations, tolerance, self.should_stop)

    def _losses(self, X: NDArray[Any], rows: slice | IntArray) -> FloatArray:
        change = X - self.W[rows]
        return np.asarray(np.einsum("rk,rk->r", change @ self.S, change, dtype=np.float64))

    @property
    def objective(self) -> float:
        """½ Σ s_r times the doubled losses."""
        return 0.5 * float(self.layer.scale @ self.losses)

    def round(self, iterations: int = 15) -> int:
        """One exchange in every row that still has moves; the number of rows that improved."""
        rows = np.flatnonzero(self.moves > 0)
        if rows.size == 0 or self.should_stop():
            return 0
        X, W, old = self.X[rows], self.W[rows], self.pruned[rows]
        residual = (W - X) @ self.S
        cost = np.where(old, np.inf, X * X / self.t)
        gain = np.where(old, residual * residual * self.t, -np.inf)
        if self.layer.locked is not None:
            cost[self.layer.locked[rows] != 0] = np.inf
            gain[self.layer.locked[rows] != 0] = -np.inf
        out, back = self._pairs(cost, gain, self.moves[rows])
        new = (old | out) & ~back
        tried = out.any(axis=1)
        if self.should_stop():
            return 0
        start = np.where(new, 0, X)
        start += np.where(back, residual * self.t * self.t, 0)  # a guess: d_r over the estimate of a_r, damped
        moved = self._refit(W[tried], new[tried], start[tried], iterations)
        losses = self._losses(moved, rows[tried])
        better = losses < self.losses[rows[tried]] * (1 - 1e-6)
        accepted = rows[tried][better]
        self.X[accepted], self.losses[accepted] = moved[better], losses[better]
        self.pruned[accepted] = new[tried][better]
        self.moves[accepted] = np.minimum(_MOST, np.ceil(self.moves[accepted] * 1.3)).astype(np.int64)
        rejected = np.concatenate([rows[tried][~better], rows[~tried]])
        self.moves[rejected] = np.where(np.isin(rejected, rows[~tried]), 0, self.moves[rejected] // 2)
        return int(accepted.size)

    def _pairs(self, cost: NDArray[Any], gain: NDArray[Any], moves: IntArray) -> tuple[BoolArray, BoolArray]:
        out, back = np.zeros(cost.shape, dtype=bool), np.zeros(cost.shape, dtype=bool)
        if self.pattern is not None:
            m = self.pattern[1]
            cells = (cost.shape[0], -1, m)
            leave, enter = cost.reshape(cells).argmin(2), gain.reshape(cells).argmax(2)
            first = m * np.arange(leave.shape[1])
            leave, enter = leave + first, enter + first
            benefit = np.take_along_axis(gain, enter, 1) - np.take_along_axis(cost, leave, 1)
            chosen = (np.argsort(np.argsort(-benefit, axis=1), axis=1) < moves[:, None]) & (benefit > 0)
            row, cell = np.nonzero(chosen)
            out[row, leave[row, cell]], back[row, enter[row, cell]] = True, True
            return out, back
        size = int(min(moves.max(), cost.shape[1] - 1))
        leave = np.argpartition(cost, size - 1, axis=1)[:, :size]
        enter = np.argpartition(-gain, size - 1, axis=1)[:, :size]
        costs, gains = np.take_along_axis(cost, leave, 1), np.take_along_axis(gain, enter, 1)
        by_cost, by_gain = np.argsort(costs, axis=1), np.argsort(-gains, axis=1)
        leave, costs = np.take_along_axis(leave, by_cost, 1), np.take_along_axis(costs, by_cost, 1)
        enter, gains = np.take_along_axis(enter, by_gain, 1), np.take_along_axis(gains, by_gain, 1)
        row, pair = np.nonzero((gains > costs) & (np.arange(size) < moves[:, None]))
        out[row, leave[row, pair]], back[row, enter[row, pair]] = True, True
        return out, back


def improve_in_bulk(
    layers: list[Layer],
    budget: LayerBudget,
    pruned: list[BoolArray],
    incumbent: Incumbent,
    should_stop: Callable[[], bool],
    rounds: int = 60,
) -> None:
    """Exchanges in all layers, one round per layer at a time, reporting improvements."""
    engines = []
    for layer, mask in zip(layers, pruned, strict=True):
        engines.append(BulkExchange(layer, budget.pattern, mask, should_stop))
        if should_stop():
            return
    incumbent.offer(sum(e.objective for e in engines), [e.pruned for e in engines])
    for _ in range(rounds):
        improved = 0
        for engine in engines:
            improved += engine.round()
            if should_stop():
                break
        incumbent.offer(sum(e.objective for e in engines), [e.pruned for e in engines])
        if not improved and not any((e.moves > 0).any() for e in engines):
            return
        if should_stop():
            return
