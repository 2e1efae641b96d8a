"""Layers too large for a tableau of each row: exchanges of many weights at once, refits by conjugate gradients.

Room: layers, for `wide`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cbs_opt.curvature.row_updates import refit_by_gradients
from cbs_opt.interrupt import checkpoint
from cbs_opt.linalg import cholesky_lower, inverse_of_cholesky
from cbs_opt.solvers.layers.wide_admm import Single, WideLayer
from cbs_opt.typing import BoolArray, FloatArray, IntArray

SHARE, MOST_MOVES = 0.03, 256
"""Of a row's kept weights, that one exchange may move at first, and weights of a row, later."""

ITERATIONS, REFIT = 80, 1e-7
"""Of a refit, and the relative energy of the residual at which it ends."""

SAMPLES = 4
"""Rows whose exact prices calibrate the estimates."""

_ROWS = 256  # that are refitted together


class BulkExchange:
    """Rows of one layer with fixed numbers of pruned weights, improved together.

    A weight s is removed at the price x_s²/T_ss and a weight r returns at d_r²/a_r, where T = [S_QQ]⁻¹ on the kept
    weights Q of its row and a_r is the Schur complement of S_QQ. Neither is computed for every row. With unit
    diagonal, 1 ≤ T_ss ≤ [S⁻¹]_ss and 1/[S⁻¹]_rr ≤ a_r ≤ 1; on a logarithmic scale between these bounds T_ss and
    a_r are nearly the same for all weights of a row, and depend on the share f of its kept weights like f^α and
    1 − f^β. The exponents are fitted on a few rows with exact T.

    The cheapest removals of a row are paired with its best returns; it keeps the change only if its loss fell. The
    number of pairs a row may exchange grows with success and is halved without. All rows go through the same
    matrix products.

    Parameters
    ----------
    wide : WideLayer
    pattern : (n, m), optional
        Exchanges stay inside of each m columns.
    pruned : bool (rows, K)
    start : float32 (rows, K), optional
        Scaled weights to start the refit from; rows that are refitted already take one product.

    Raises
    ------
    numpy.linalg.LinAlgError
        S is singular to single precision.
    """

    def __init__(
        self, wide: WideLayer, pattern: tuple[int, int] | None, pruned: BoolArray, start: Single | None = None
    ) -> None:
        self.wide, self.layer, self.pattern = wide, wide.layer, pattern
        self.pruned = pruned.copy()
        self.moves = np.maximum(1, SHARE * (~pruned).sum(1)).astype(np.int64)
        self.X = refit_rows(wide, pruned, start, ITERATIONS)
        self.losses = wide.losses(self.X)
        factor = cholesky_lower(wide.S)
        if factor is None:
            raise np.linalg.LinAlgError("a stored Hessian is singular to single precision")
        self.upper: FloatArray = np.log(np.maximum(np.diag(inverse_of_cholesky(factor)), 1.0)).astype(np.float64)
        self.alpha, self.beta = self._exponents()

    @property
    def objective(self) -> float:
        """½ Σ s_r times the doubled losses."""
        return 0.5 * float(self.layer.scale @ self.losses)

    def _exponents(self) -> tuple[float, float]:
        """α and β of the estimates of T and a, from exact values on a few rows."""
        open_ = np.flatnonzero(self.pruned.any(1) & ~self.pruned.all(1))
        found = []
        for r in open_[np.linspace(0, max(0, open_.size - 1), min(SAMPLES, open_.size)).astype(np.int64)]:
            kept, out = np.flatnonzero(~self.pruned[r]), np.flatnonzero(self.pruned[r])
            factor = cholesky_lower(self.wide.S[np.ix_(kept, kept)])
            if factor is None:
                continue
            T, S = inverse_of_cholesky(factor), self.wide.S[np.ix_(out, kept)]
            a = np.maximum(1.0 - np.einsum("pq,pq->p", S @ T, S), 1e-6)
            t_level = float(np.log(np.diag(T)).mean()) / max(float(self.upper[kept].mean()), 1e-9)
            a_level = 1.0 + float(np.log(a).mean()) / max(float(self.upper[out].mean()), 1e-9)
            share = np.log(kept.size / self.layer.columns)
            found.append([np.log(np.clip(x, 1e-3, 1)) / share for x in (t_level, 1.0 - a_level)])
        if not found:
            return 0.5, 0.5
        alpha, beta = np.median(np.array(found), axis=0)
        return float(alpha), float(beta)

    def round(self, iterations: int = 8) -> int:
        """One exchange in every row that still has moves; the number of rows that improved."""
        rows = np.flatnonzero(self.moves > 0)
        if rows.size == 0:
            return 0
        X, old = self.X[rows], self.pruned[rows]
        cost, gain, step = self.prices(rows)
        out, back = self._pairs(cost, gain, self.moves[rows])
        new = (old | out) & ~back
        tried = out.any(axis=1)
        start = np.where(new, np.float32(0), X) + np.where(back, 0.5 * step, np.float32(0))
        moved = refit_rows(self.wide, new[tried], start[tried], iterations, rows[tried])
        losses = self.wide.losses(moved, rows[tried])
        better = losses < self.losses[rows[tried]] * (1 - 1e-6)
        accepted = rows[tried][better]
        self.X[accepted], self.losses[accepted] = moved[better], losses[better]
        self.pruned[accepted] = new[tried][better]
        self.moves[accepted] = np.minimum(MOST_MOVES, np.ceil(self.moves[accepted] * 1.3)).astype(np.int64)
        self.moves[rows[tried][~better]] //= 2
        self.moves[rows[~tried]] = 0
        return int(accepted.size)

    def prices(self, rows: IntArray) -> tuple[Single, Single, Single]:
        """What each kept weight of some rows costs, what each pruned one gains, and its step; (len(rows), K) each.

        Infinite for the others, and for fixed ones.
        """
        checkpoint()
        X, old = self.X[rows], self.pruned[rows]
        residual = self.wide.B[rows] - self.wide.product(X)
        share = np.maximum(1.0 - old.mean(1), 1e-6)
        t = np.exp(np.outer(share**self.alpha, self.upper)).astype(np.float32)
        a = np.exp(np.outer(-(share**self.beta), self.upper)).astype(np.float32)
        cost = np.where(old, np.float32(np.inf), X * X / t)
        gain = np.where(old, residual * residual / a, -np.float32(np.inf))
        if self.layer.locked is not None:
            cost[self.layer.locked[rows] != 0] = np.inf
            gain[self.layer.locked[rows] != 0] = -np.inf
        return cost, gain, residual / a

    def _pairs(self, cost: Single, gain: Single, moves: IntArray) -> tuple[BoolArray, BoolArray]:
        out, back = np.zeros(cost.shape, dtype=bool), np.zeros(cost.shape, dtype=bool)
        if self.pattern is not None:
            m = self.pattern[1]
            cells = (cost.shape[0], -1, m)
            leave, enter = cost.reshape(cells).argmin(2), gain.reshape(cells).argmax(2)
            first = m * np.arange(leave.shape[1])
            leave, enter = leave + first, enter + first
            benefit = np.take_along_axis(gain, enter, 1) - np.take_along_axis(cost, leave, 1)
            benefit = np.where(np.isfinite(benefit), benefit, -np.inf)
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


def refit_rows(
    wide: WideLayer,
    pruned: BoolArray,
    start: Single | None,
    iterations: int,
    rows: NDArray[np.int64] | None = None,
) -> Single:
    """Best scaled weights of rows, float32 (rows, K), by conjugate gradients on a few rows at a time."""
    W = wide.W if rows is None else wide.W[rows]
    out = np.empty_like(W)
    for first in range(0, W.shape[0], _ROWS):
        part = slice(first, first + _ROWS)
        begin = None if start is None else start[part]
        out[part] = refit_by_gradients(wide.S, W[part], pruned[part], begin, iterations, REFIT, checkpoint_only)
    return out


def refit_in_place(wide: WideLayer, pruned: BoolArray, X: Single) -> None:
    """Refit scaled weights, (rows, K), 256 rows at a time: what is done when the run is stopped is kept."""
    for first in range(0, X.shape[0], _ROWS):
        part = slice(first, first + _ROWS)
        X[part] = refit_by_gradients(
            wide.S, wide.W[part], pruned[part], X[part], ITERATIONS, REFIT, checkpoint_only
        )


def checkpoint_only() -> bool:
    """Raise where the run is told to stop, and never say so by the answer."""
    checkpoint()
    return False
