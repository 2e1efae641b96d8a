"""The swap tableau of the joint problem on one block: what every removal, return and swap would cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cbs_opt.linalg import inverse_pd
from cbs_opt.solvers.kernels import joint_numba as kernels
from cbs_opt.typing import BoolArray, FloatArray, IntArray

NEVER = 1e300
"""The price of what is not allowed."""

_PARALLEL_ENTRIES = 1 << 19  # below this many entries one thread is faster than two


class Tableau:
    """min ½ vᵀHv − bᵀv + κ over v that is zero off the kept set S; H positive definite.

    With H_SS⁻¹ = T, the kept weights are x = T b_S, the loss is κ − ½ b_Sᵀx, and for the others, P,
    U = H_PS T, d = b_P − H_PS x, a_i = H_ii − U_i H_Si. Removing s costs x_s²/T_ss (doubled), returning r gains
    d_r²/a_r, and a swap changes the doubled loss by x_s²/T_ss − (d_r + U_rs y_s)² / (a_r + U_rs²/T_ss) with
    y_s = x_s/T_ss: O(1) a pair. These are the entries of the symmetric sweep tableau of [[H, b], [bᵀ, 2κ]] swept
    on S, without its P×P part, which no swap reads.

    Parameters
    ----------
    H : float64 (n, n)
    b : float64 (n,)
    constant : float
        κ.
    kept : bool (n,)
    group : int64 (n,)
        A swap exchanges weights of one group.
    movable : bool (n,)
        False where a weight must stay on its side.
    pool : ThreadPoolExecutor or None
    threads : int
        Threads of the pool that a large update uses.

    Notes
    -----
    Memory O(p q + q²) beside H; a swap costs O(p q + q²), a fresh start O(q³ + p q²).
    """

    def __init__(
        self,
        H: FloatArray,
        b: FloatArray,
        constant: float,
        kept: BoolArray,
        group: IntArray,
        movable: BoolArray,
        pool: ThreadPoolExecutor | None = None,
        threads: int = 1,
    ) -> None:
        self.H, self.b, self.constant = H, b, constant
        self.group, self.movable = group, movable
        self.pool, self.threads = pool, threads
        self.one_group = bool((group == group[0]).all()) if group.size else True
        self.tabu = np.zeros(b.size, dtype=bool)  # weights that may not move for now
        self.drift = 0.0
        self.reset(kept)

    @property
    def kept(self) -> BoolArray:
        """The kept set, bool (n,)."""
        mask = np.zeros(self.b.size, dtype=bool)
        mask[self.S] = True
        return mask

    def reset(self, kept: BoolArray) -> None:
        """Start from a kept set, from scratch."""
        self.S, self.P = np.flatnonzero(kept), np.flatnonzero(~kept)
        inverse = inverse_pd(self.H[np.ix_(self.S, self.S)])
        if inverse is None:
            raise np.linalg.LinAlgError("the Hessian is singular on the kept weights")
        H_SP = self.H[np.ix_(self.S, self.P)]
        self.T = inverse
        self.x = inverse @ self.b[self.S]
        self.U = np.ascontiguousarray((inverse @ H_SP).T)
        self.d = self.b[self.P] - self.x @ H_SP
        self.a = self.H.diagonal()[self.P] - np.einsum("rs,sr->r", self.U, H_SP)
        self.a = np.maximum(self.a, 1e-14 * np.maximum(self.H.diagonal()[self.P], 1e-300))
        self.doubled = 2.0 * self.constant - float(self.b[self.S] @ self.x)
        self._row_best: FloatArray | None = None

    def refactor(self) -> None:
        """Start again from the same set; `drift` keeps the largest relative error that was found."""
        before = self.doubled
        self.reset(self.kept)
        self.drift = max(self.drift, abs(before - self.doubled) / max(abs(self.doubled), 1e-300))

    def copy(self) -> Tableau:
        """An independent copy that shares H and b."""
        other = object.__new__(Tableau)
        other.__dict__.update(self.__dict__)
        for name in ("S", "P", "T", "x", "U", "d", "a", "tabu"):
            setattr(other, name, getattr(self, name).copy())
        other._row_best = None if self._row_best is None else self._row_best.copy()
        return other

    # Prices ------------------------------------------------------------------------------------------------

    def removal_costs(self) -> FloatArray:
        """Rise of the doubled loss when each kept weight goes, float64 (q,)."""
        costs = self.x**2 / self.T.diagonal()
        return np.where(self.movable[self.S] & ~self.tabu[self.S], costs, NEVER)

    def return_gains(self) -> FloatArray:
        """Fall of the doubled loss when each pruned weight comes back, float64 (p,); −NEVER where it may not."""
        allowed = self.movable[self.P] & ~self.tabu[self.P]
        return np.where(allowed, self.d**2 / self.a, -NEVER)

    def best_swap(self) -> tuple[int, int, float]:
        """The best swap inside its group: row r of P, column s of S, change of the doubled loss."""
        if self.S.size == 0 or self.P.size == 0:
            return -1, -1, NEVER
        it = 1.0 / self.T.diagonal()
        y, cost = self.x * it, self.removal_costs()
        if self._row_best is None:
            self._row_best = np.empty(self.P.size)
            self._over_rows(self._scan, y, it, cost, self._row_best)
        best = np.where(self.movable[self.P] & ~self.tabu[self.P], self._row_best, NEVER)
        r = int(np.argmin(best))
        u = self.U[r]
        change = cost - (self.d[r] + u * y) ** 2 / (self.a[r] + u * u * it)
        if not self.one_group:
            change = np.where(self.group[self.S] == self.group[self.P[r]], change, NEVER)
        s = int(np.argmin(change))
        value = float(change[s])
        return (r, s, value) if best[r] < NEVER / 2 and value < NEVER / 2 else (-1, -1, NEVER)

    def forbid(self, weight: int, forbidden: bool) -> None:
        """Forbid a weight to move, or allow it again."""
        self.tabu[weight] = forbidden
        self._row_best = None

    def _scan(
        self, start: int, stop: int, y: FloatArray, it: FloatArray, cost: FloatArray, out: FloatArray
    ) -> None:
        if self.one_group:
            kernels.best_swap_per_row(self.U, y, it, cost, self.d, self.a, start, stop, out)
        else:
            row, column = self.group[self.P], self.group[self.S]
            kernels.best_swap_per_row_in_groups(self.U, y, it, cost, self.d, self.a, row, column, start, stop, out)

    def _over_rows(self, work: Callable[..., None], *arguments: FloatArray) -> None:
        """Call ``work(start, stop, *arguments)`` over all rows, in the threads of the pool where it pays."""
        rows = self.P.size
        if self.pool is None or rows * self.S.size < _PARALLEL_ENTRIES:
            work(0, rows, *arguments)
            return
        cuts = [rows * k // self.threads for k in range(self.threads + 1)]
        for done in [self.pool.submit(work, a, b, *arguments) for a, b in itertools.pairwise(cuts)]:
            done.result()

    # Moves -------------------------------------------------------------------------------------------------

    def swap(self, r: int, s: int) -> None:
        """Return row r to the kept weights in place of column s; O(p q + q²)."""
        T, U = self.T, self.U
        leaving, coming = int(self.S[s]), int(self.P[r])
        t, x_s = T[s, s], self.x[s]
        row = T[s] / t  # after the removal of s the row of U that belongs to it is −row
        column = U[:, s].copy()
        x, d, a = self.x - row * x_s, self.d + column * (x_s / t), self.a + column**2 / t
        u = U[r] - column[r] * row
        u[s] = 0.0
        pivot, residual = a[r], d[r]

        h = self.H[coming]
        h_S = h[self.S]
        h_S[s] = 0.0
        v = h[self.P] - (U @ h_S - column * (row @ h_S))  # the Schur complement's column of the coming weight
        v[r] = h[leaving] + row @ h_S
        d[r], a[r] = x_s / t, 1.0 / t
        shift = u / pivot
        self.x = x - shift * residual
        self.x[s] = residual / pivot
        self.d, self.a = d - v * (residual / pivot), a - v**2 / pivot
        # Cancellation may leave nothing of a weight that the kept ones nearly determine.
        np.maximum(self.a, 1e-14 * np.maximum(self.H.diagonal()[self.P], 1e-300), out=self.a)
        self.doubled += x_s**2 / t - residual**2 / pivot

        T_s = T[:, s].copy()
        kernels.rank_two_update(T, T_s, row, -u, shift, 0, T.shape[0])
        T[s, :] = T[:, s] = -shift
        T[s, s] = 1.0 / pivot
        U[r] = -row
        U[r, s] = 0.0
        column[r] = 0.0
        self._over_rows(self._update, column, row, v, shift)
        U[:, s] = v / pivot
        self.S[s], self.P[r] = coming, leaving
        self._row_best = None

    def _update(self, start: int, stop: int, f: FloatArray, p: FloatArray, g: FloatArray, q: FloatArray) -> None:
        kernels.rank_two_update(self.U, f, p, g, q, start, stop)

    def remove(self, s: int) -> None:
        """Prune column s; O(p q + q²), with a new allocation."""
        t, x_s = self.T[s, s], self.x[s]
        row, column = self.T[s] / t, self.U[:, s].copy()
        leaving = self.S[s]
        rest = np.arange(self.S.size) != s
        self.doubled += x_s**2 / t
        self.x = (self.x - row * x_s)[rest]
        self.U = np.vstack([(self.U - np.outer(column, row))[:, rest], -row[rest]])
        self.T = (self.T - np.outer(self.T[:, s], row))[np.ix_(rest, rest)]
        self.d = np.append(self.d + column * (x_s / t), x_s / t)
        self.a = np.append(self.a + column**2 / t, 1.0 / t)
        self.S, self.P = self.S[rest], np.append(self.P, leaving)
        self._row_best = None

    def bring_back(self, r: int) -> None:
        """Return row r to the kept weights; O(p q + q²), with a new allocation."""
        coming = self.P[r]
        u, pivot, residual = self.U[r], self.a[r], self.d[r]
        h = self.H[coming]
        v = h[self.P] - self.U @ h[self.S]
        shift = u / pivot
        rest = np.arange(self.P.size) != r
        self.doubled -= residual**2 / pivot
        self.T = np.block(
            [[self.T + np.outer(u, shift), -shift[:, None]], [-shift[None, :], np.array([[1.0 / pivot]])]]
        )
        self.x = np.append(self.x - shift * residual, residual / pivot)
        self.U = np.hstack([self.U - np.outer(v, shift), v[:, None] / pivot])[rest]
        self.d, self.a = (self.d - v * (residual / pivot))[rest], (self.a - v**2 / pivot)[rest]
        self.S, self.P = np.append(self.S, coming), self.P[rest]
        self._row_best = None
