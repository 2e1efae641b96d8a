"""Inner loops of the joint swap search and of backward elimination, in numba; twins in `joint_numpy`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

# Minima vectorise only where the order of comparisons and NaN do not matter; infinities stay in use as "never".
_FAST = {"nnan", "nsz", "contract", "reassoc"}


@njit(cache=True, nogil=True, fastmath=_FAST)
def best_swap_per_row(U: Any, y: Any, it: Any, cost: Any, d: Any, a: Any, start: int, stop: int, out: Any) -> None:
    """Smallest change of the doubled loss over all swaps that bring back pruned weight r.

    out[r] = min over kept s of cost[s] − (d[r] + U[r, s] y[s])² / (a[r] + U[r, s]² it[s]), for start ≤ r < stop.
    See `Tableau` for the letters.
    """
    for r in range(start, stop):
        row, residual, pivot = U[r], d[r], a[r]
        best = 1e300
        for s in range(U.shape[1]):
            u = row[s]
            top = residual + u * y[s]
            best = min(best, cost[s] - top * top / (pivot + u * u * it[s]))
        out[r] = best


@njit(cache=True, nogil=True, fastmath=_FAST)
def best_swap_per_row_in_groups(
    U: Any,
    y: Any,
    it: Any,
    cost: Any,
    d: Any,
    a: Any,
    row_group: Any,
    column_group: Any,
    start: int,
    stop: int,
    out: Any,
) -> None:
    """The same over the kept weights of the group of r only; 1e300 where there is none."""
    for r in range(start, stop):
        row, residual, pivot, group = U[r], d[r], a[r], row_group[r]
        best = 1e300
        for s in range(U.shape[1]):
            u = row[s]
            top = residual + u * y[s]
            change = cost[s] - top * top / (pivot + u * u * it[s])
            best = min(best, change if column_group[s] == group else 1e300)
        out[r] = best


@njit(cache=True, nogil=True, fastmath=_FAST)
def rank_two_update(U: Any, f: Any, p: Any, g: Any, q: Any, start: int, stop: int) -> None:
    """Subtract f pᵀ + g qᵀ from rows start … stop-1 of U, in place."""
    for r in range(start, stop):
        row, fr, gr = U[r], f[r], g[r]
        for s in range(U.shape[1]):
            row[s] -= fr * p[s] + gr * q[s]


@njit(cache=True, nogil=True)
def eliminate(
    T: Any, V: Any, done: int, x: Any, t: Any, removable: Any, forced: int, steps: int, order: Any, losses: Any
) -> int:
    """Remove up to `steps` weights one by one, each time the one that costs least; ExactOBS.

    After s steps the conditional inverse is T − V[:s]ᵀ V[:s]. T itself stays as it is, which makes a step
    O(s b) in place of O(b²); the caller applies V at once, by a matrix product, before its rows run out.

    Parameters
    ----------
    T : float64 (b, b)
        Inverse of H on the weights at hand.
    V : float64 (≥ done + steps, b), in place
        Its first `done` rows are steps that T does not contain yet.
    done : int
    x, t : float64 (b,), in place
        Weights after the best update, and the diagonal of the conditional inverse.
    removable : bool (b,), in place
        Becomes False where removed.
    forced : int
        The weight to remove first; −1 for the cheapest.
    steps : int
    order : int64 (steps,), out
    losses : float64 (steps,), out
        Rise of the doubled loss by each step.

    Returns
    -------
    int
        Steps taken; fewer than `steps` when nothing is removable any more.
    """
    b = x.size
    for taken in range(steps):
        best, j = np.inf, -1
        if taken == 0 and forced >= 0:
            best, j = x[forced] * x[forced] / t[forced], forced
        else:
            for i in range(b):
                if removable[i]:
                    value = x[i] * x[i] / t[i]
                    if value < best:
                        best, j = value, i
        if j < 0:
            return taken
        s = done + taken
        column = V[s]
        for i in range(b):
            column[i] = T[j, i]
        for k in range(s):
            factor = V[k, j]
            for i in range(b):
                column[i] -= factor * V[k, i]
        root = np.sqrt(column[j])
        shift = x[j] / root
        for i in range(b):
            column[i] /= root
            x[i] -= column[i] * shift
            t[i] -= column[i] * column[i]
        removable[j] = False
        x[j], t[j] = 0.0, 1.0
        order[taken], losses[taken] = j, best
    return steps
