"""The swap tableau of the joint problem on one block: the costs of all removals, returns and swaps."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from cbs_opt.curvature.base import LARGE_BLOCK
from cbs_opt.errors import InstanceError
from cbs_opt.interrupt import checkpoint
from cbs_opt.linalg import inverse_pd
from cbs_opt.solvers.joint.inverse import LazyInverse
from cbs_opt.solvers.kernels import joint_numba as kernels
from cbs_opt.typing import BoolArray, FloatArray, IntArray

NEVER = 1e300
"""The price of a forbidden move."""

_Values = TypeVar("_Values", FloatArray, IntArray)

_PARALLEL_ENTRIES = 1 << 18  # below this many entries one thread is faster than two
_DEPENDENT = 1e8  # 1 / (1 − R²) of a weight on the kept ones beyond which a move starts from scratch
_SPARE = 64  # rows or columns of room for weights that come from other blocks


class Tableau:
    """min ½ vᵀHv − bᵀv + κ over v that is zero off the kept set S; H positive definite.

    With H_SS⁻¹ = T, the kept weights are x = T b_S, the loss is κ − ½ b_Sᵀx, and for the others, P,
    U = H_PS T, d = b_P − H_PS x, a_i = H_ii − U_i H_Si. Removing s costs x_s²/T_ss (doubled), returning r gains
    d_r²/a_r, and a swap changes the doubled loss by x_s²/T_ss − (d_r + U_rs y_s)² / (a_r + U_rs²/T_ss) with
    y_s = x_s/T_ss: O(1) per pair. These are the entries of the symmetric sweep tableau of [[H, b], [bᵀ, 2κ]] swept
    on S, without its P×P part, which no swap needs.

    A move is a rank-two change of U; it is applied during the next search for a swap, which reads U anyway. Of T
    only single rows are needed; it keeps its changes as a list (`LazyInverse`).

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
    least : float64 (n,) or float
        Of a_r, for each weight: the damping of H.

    Notes
    -----
    Memory O(p q + q²) plus H; a swap costs O(p q + q²), a fresh start O(q³ + p q²).
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
        least: FloatArray | float = 0.0,
    ) -> None:
        self.H, self.b, self.constant = H, b, constant
        self.group, self.movable = group, movable
        self.pool, self.threads = pool, threads
        self.one_group = bool((group == group[0]).all()) if group.size else True
        self.tabu = np.zeros(b.size, dtype=bool)  # weights that may not move for now
        self._late: tuple[FloatArray, FloatArray, FloatArray, FloatArray] | None = None  # terms that U lacks
        self.floor = np.maximum(1e-14 * np.maximum(H.diagonal(), 1e-300), least)
        self.reset(kept)

    @property
    def kept(self) -> BoolArray:
        """The kept set, bool (n,)."""
        mask = np.zeros(self.b.size, dtype=bool)
        mask[self.S] = True
        return mask

    @property
    def T(self) -> FloatArray:  # noqa: N802
        """H_SS⁻¹, float64 (q, q)."""
        return self.inverse.matrix()

    @property
    def U(self) -> FloatArray:  # noqa: N802
        """H_PS H_SS⁻¹, float64 (p, q), brought up to date."""
        if self._late is not None:
            kernels.rank_two_update(self._U, self.S.size, *self._late, 0, self.P.size)
            self._late = None
        return self._U[: self.P.size, : self.S.size]

    def reset(self, kept: BoolArray) -> None:
        """Start from a kept set, from scratch."""
        if kept.size > LARGE_BLOCK:
            checkpoint()
        self.S, self.P = np.flatnonzero(kept), np.flatnonzero(~kept)
        inverse = inverse_pd(self.H[np.ix_(self.S, self.S)])
        if inverse is None:
            raise InstanceError(
                f"the Hessian is singular on {self.S.size} weights of a block: a larger damping is needed"
            )
        H_PS = self.H[np.ix_(self.P, self.S)]
        self.inverse = LazyInverse(inverse)
        self.x = inverse @ self.b[self.S]
        self._U = H_PS @ inverse
        self._late = None
        self.d = self.b[self.P] - H_PS @ self.x
        self.a = self.H.diagonal()[self.P] - np.einsum("rs,rs->r", self._U, H_PS)
        np.maximum(self.a, self.floor[self.P], out=self.a)
        self.doubled = 2.0 * self.constant - float(self.b[self.S] @ self.x)

    def refactor(self) -> float:
        """Start again from the same set; returns the error of `doubled` that was found."""
        before = self.doubled
        self.reset(self.kept)
        return abs(before - self.doubled)

    def copy(self) -> Tableau:
        """An independent copy that shares H and b."""
        other = object.__new__(Tableau)
        self._copy_to(other)
        return other

    def restore(self, saved: Tableau) -> None:
        """Go back to an earlier `copy`; what is tabu stays."""
        tabu = self.tabu
        saved._copy_to(self)
        self.tabu = tabu

    def _copy_to(self, other: Tableau) -> None:
        U = self.U.copy()
        other.__dict__.update(self.__dict__)
        for name in ("S", "P", "x", "d", "a", "tabu"):
            setattr(other, name, getattr(self, name).copy())
        other._U, other._late, other.inverse = U, None, self.inverse.copy()

    # Prices ------------------------------------------------------------------------------------------------

    def removal_costs(self) -> FloatArray:
        """Rise of the doubled loss when each kept weight goes, float64 (q,)."""
        costs = self.x**2 / self.inverse.diagonal
        return np.where(self.movable[self.S] & ~self.tabu[self.S], costs, NEVER)

    def return_gains(self) -> FloatArray:
        """Fall of the doubled loss when each pruned weight comes back, float64 (p,); −NEVER where it may not."""
        allowed = self.movable[self.P] & ~self.tabu[self.P]
        return np.where(allowed, self.d**2 / self.a, -NEVER)

    def best_swap(self) -> tuple[int, int, float]:
        """The best swap inside its group: row r of P, column s of S, change of the doubled loss."""
        p, q = self.P.size, self.S.size
        if p == 0 or q == 0:
            return -1, -1, NEVER
        it = 1.0 / self.inverse.diagonal
        late = self._late is not None
        nothing = np.zeros(1)
        f, left, g, right = self._late or (nothing, nothing, nothing, nothing)
        groups = (self.group[self.P], self.group[self.S])
        y, costs = self.x * it, self.removal_costs()
        may_return, grouped = self.movable[self.P] & ~self.tabu[self.P], not self.one_group
        late_terms = (q, late, f, left, g, right)
        prices = (y, it, costs, self.d, self.a, may_return, grouped, *groups)

        def scan(start: int, stop: int) -> tuple[int, int, float]:
            return kernels.best_swap(self._U, *late_terms, *prices, start, stop)  # type: ignore[no-any-return]

        if self.pool is None or p * q < _PARALLEL_ENTRIES:
            found = [scan(0, p)]
        else:
            cuts = [p * k // self.threads for k in range(self.threads + 1)]
            found = [done.result() for done in [self.pool.submit(scan, *c) for c in itertools.pairwise(cuts)]]
        self._late = None
        r, s, change = min(found, key=lambda swap: swap[2])
        return (int(r), int(s), float(change)) if r >= 0 else (-1, -1, NEVER)

    def forbid(self, weight: int, forbidden: bool) -> None:
        """Forbid a weight to move, or allow it again."""
        self.tabu[weight] = forbidden

    # Moves -------------------------------------------------------------------------------------------------

    def swap(self, r: int, s: int) -> None:
        """Return row r to the kept weights in place of column s; O(p q + q²)."""
        U, T_s = self.U, self.inverse.row(s)
        leaving, coming = int(self.S[s]), int(self.P[r])
        t, x_s = T_s[s], self.x[s]
        if self._is_inaccurate(s, t) or not self.a[r] * _DEPENDENT > self.H[coming, coming]:
            self._restart(leaving, coming)
            return
        row = T_s / t  # after the removal of s the row of U that belongs to it is −row
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
        self.doubled += x_s**2 / t - residual**2 / pivot

        self.inverse.replace(s, T_s, u, pivot)
        U[r] = -row
        U[r, s] = 0.0
        column[r] = 0.0
        shift[s] = -1.0 / pivot  # column s, which the first term makes zero, becomes v / pivot
        self._late = (column, row, v, shift)
        self.S[s], self.P[r] = coming, leaving
        # Cancellation may leave nothing of a weight that the kept ones nearly determine.
        np.maximum(self.a, self.floor[self.P], out=self.a)

    def remove(self, s: int) -> None:
        """Prune column s; O(p q + q)."""
        U, T_s = self.U, self.inverse.row(s)
        t, x_s = T_s[s], self.x[s]
        if self._is_inaccurate(s, t):
            self._restart(int(self.S[s]), None)
            return
        row, column = T_s / t, U[:, s].copy()
        leaving, p, last = self.S[s], self.P.size, self.S.size - 1
        self.doubled += x_s**2 / t
        self.x = _without(self.x - row * x_s, s)
        self.d = np.append(self.d + column * (x_s / t), x_s / t)
        self.a = np.append(self.a + column**2 / t, 1.0 / t)
        self._make_room(p + 1, last + 1)
        self._U[p, : last + 1] = -row
        self._U[: p + 1, s] = self._U[: p + 1, last]
        self.inverse.remove(s, T_s)
        left = _without(row, s)
        self._late = (np.append(column, 0.0), left, np.zeros(p + 1), np.zeros(last))
        self.S, self.P = _without(self.S, s), np.append(self.P, leaving)

    def bring_back(self, r: int) -> None:
        """Return row r to the kept weights; O(p q + q)."""
        U = self.U
        coming, q, last = self.P[r], self.S.size, self.P.size - 1
        u, pivot, residual = U[r].copy(), self.a[r], self.d[r]
        h = self.H[coming]
        v = h[self.P] - U @ h[self.S]
        shift = u / pivot
        self.doubled -= residual**2 / pivot
        self.x = np.append(self.x - shift * residual, residual / pivot)
        self.d = _without(self.d - v * (residual / pivot), r)
        self.a = _without(self.a - v**2 / pivot, r)
        self._make_room(last + 1, q + 1)
        self._U[: last + 1, q] = v / pivot
        self._U[r, : q + 1] = self._U[last, : q + 1]
        self.inverse.append(u, pivot)
        self._late = (_without(v, r), np.append(shift, 0.0), np.zeros(last), np.zeros(q + 1))
        self.S, self.P = np.append(self.S, coming), _without(self.P, r)
        np.maximum(self.a, self.floor[self.P], out=self.a)

    def _is_inaccurate(self, s: int, t: float) -> bool:
        """Whether taking out s would cancel most digits; T_ss H_ss ≥ 1 is large for nearly dependent weights."""
        return not 0.5 < t * self.H[self.S[s], self.S[s]] < _DEPENDENT

    def _restart(self, leaving: int, coming: int | None) -> None:
        """Make a move from scratch, O(q³ + p q²)."""
        kept = self.kept
        kept[leaving] = False
        if coming is not None:
            kept[coming] = True
        self.reset(kept)

    def _make_room(self, rows: int, columns: int) -> None:
        """Let U hold so many rows and columns."""
        if rows > self._U.shape[0] or columns > self._U.shape[1]:
            larger = np.empty((rows + _SPARE, columns + _SPARE))
            larger[: self._U.shape[0], : self._U.shape[1]] = self._U
            self._U = larger


def _without(values: _Values, k: int) -> _Values:
    """`values` with entry k replaced by the last one, which goes."""
    out = values[:-1].copy()
    if k < out.size:
        out[k] = values[-1]
    return out
