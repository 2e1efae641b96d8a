"""A core: a few variables with a dense Q, on which steps are cheap, while all other variables are fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cbs_opt.solvers.kernels import selection_numba as kernels
from cbs_opt.solvers.problem.columns import Columns
from cbs_opt.typing import FloatArray, IntArray

_NEWTON_LIMIT = 1500  # fractional variables
_NEWTON_GROUPS = 200
_DAMPING = 1e-9  # of the scaled system, against singular Q


class Core:
    """Dense restriction of a problem to the variables `index`, sorted by block and group.

    Parameters
    ----------
    columns : Columns
    group : int64 (r,)
    index : int64 (c,)

    Attributes
    ----------
    index : int64 (c,)
        In the order of the core.
    diagonal : float64 (c,)
    group : int64 (c,)
        Relabelled 0 … number_of_groups-1.
    """

    def __init__(self, columns: Columns, group: IntArray, index: IntArray) -> None:
        order = np.lexsort((index, group[index], columns.block_of[index]))
        self.index = index[order]
        block, labels = columns.block_of[self.index], group[self.index]
        self.n = int(index.size)
        self.diagonal = columns.diagonal[self.index]
        present, relabelled = np.unique(labels, return_inverse=True)
        self.group = relabelled.astype(np.int64)
        self.number_of_groups = int(present.size)
        self.squares = [made.submatrix(local) for _, made, _, local in columns.split(self.index)]
        self.q = (
            self.squares[0].ravel()
            if len(self.squares) == 1
            else np.concatenate([np.zeros(0), *(square.ravel() for square in self.squares)])
        )
        sizes = np.array([square.shape[0] for square in self.squares], dtype=np.int64)
        zero = np.zeros(1, dtype=np.int64)
        self.block_start = np.concatenate([zero, np.cumsum(sizes)])
        self.q_start = np.concatenate([zero, np.cumsum(sizes**2)])
        new = np.flatnonzero((np.diff(block) != 0) | (np.diff(labels) != 0)) + 1
        self.cell_start = np.concatenate([zero, new, [self.n]]).astype(np.int64)
        self.cell_group = self.group[self.cell_start[:-1]]
        self.block_cell = np.searchsorted(self.cell_start, self.block_start).astype(np.int64)

    def layout(self) -> tuple[Any, ...]:
        """Leading arguments of the kernels."""
        return (
            self.q,
            self.q_start,
            self.block_start,
            self.block_cell,
            self.cell_start,
            self.cell_group,
            self.number_of_groups,
        )

    def product(self, x: FloatArray) -> FloatArray:
        """Q x inside the core, float64 (c,)."""
        out = np.empty(self.n)
        for b, square in enumerate(self.squares):
            part = slice(self.block_start[b], self.block_start[b + 1])
            out[part] = square @ x[part]
        return out

    def descend(self, x: FloatArray, h: FloatArray, shift: FloatArray, steps: int, tolerance: float) -> int:
        """Pairwise descent in place on ½xᵀ(Q − diag(shift))x + …, h its gradient; returns the steps taken."""
        return int(kernels.pair_descent(*self.layout(), self.diagonal - shift, shift, x, h, steps, tolerance))

    def newton(
        self,
        x: FloatArray,
        h: FloatArray,
        shift: FloatArray,
        should_stop: Callable[[], bool] = lambda: False,
        limit: int = 64,
    ) -> int:
        """Newton steps on the fractional variables in place, up to the first bound that each hits.

        Every group sum is kept. Returns the number of steps; 0 when the reduced matrix is not positive definite.
        """
        for count in range(limit):
            free = np.flatnonzero((x > 0) & (x < 1))
            if free.size < 2 or free.size > _NEWTON_LIMIT or should_stop():
                return count
            step = self._newton_direction(free, h, shift)
            if step is None:
                return count
            slope = -float(h[free] @ step)
            direction = np.zeros(self.n)
            direction[free] = step
            change = self.product(direction) - shift * direction
            bend = float(direction @ change)
            if not slope > 0:
                return count
            full = slope / bend if bend > 0 else np.inf
            room = np.full(free.size, np.inf)
            up, down = step > 0, step < 0
            room[up] = (1.0 - x[free][up]) / step[up]
            room[down] = -x[free][down] / step[down]
            longest = float(room.min())
            length = min(full, longest)
            x[free] += length * step
            if longest <= full:
                hit = free[room <= longest * (1 + 1e-12)]
                x[hit] = np.round(x[hit])
            np.clip(x, 0.0, 1.0, out=x)
            h += length * change
            if longest > full:
                return count + 1
        return limit

    def _newton_direction(self, free: IntArray, h: FloatArray, shift: FloatArray) -> FloatArray | None:
        """The equality-constrained Newton direction on the free variables, or None; O(f³)."""
        from scipy.linalg import cho_factor, cho_solve

        labels, label = np.unique(self.group[free], return_inverse=True)
        if labels.size > _NEWTON_GROUPS:
            return None
        sums = np.zeros((free.size, labels.size))
        sums[np.arange(free.size), label] = 1.0
        inverse_sums, inverse_h = np.empty_like(sums), np.empty(free.size)
        cut = np.searchsorted(free, self.block_start)
        try:
            for b, square in enumerate(self.squares):
                part = slice(cut[b], cut[b + 1])
                if part.start == part.stop:
                    continue
                local = free[part] - self.block_start[b]
                K = square[np.ix_(local, local)]
                scale = np.sqrt(K.diagonal())
                scale[scale < 1e-150] = 1.0  # free weights
                K = K / scale[:, None] / scale
                K[np.diag_indices(local.size)] += _DAMPING - shift[free[part]] / scale**2
                rhs = np.column_stack([sums[part], h[free[part]]]) / scale[:, None]
                solved = cho_solve(cho_factor(K, lower=True, check_finite=False), rhs, check_finite=False)
                solved /= scale[:, None]
                inverse_sums[part], inverse_h[part] = solved[:, :-1], solved[:, -1]
            multipliers = np.linalg.solve(sums.T @ inverse_sums, sums.T @ inverse_h)
        except np.linalg.LinAlgError:
            return None
        direction = inverse_sums @ multipliers - inverse_h
        # Badly scaled systems leave a rest in the sums.
        direction -= (np.bincount(label, direction) / np.bincount(label))[label]
        return direction if np.isfinite(direction).all() else None
