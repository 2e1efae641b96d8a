"""Inner loops of the joint swap search and of backward elimination, in numba; twins in `joint_numpy`."""

from __future__ import annotations

from typing import Any

import numpy as np

from cbs_opt.solvers.kernels.compilation import compiled, entry

# Minima vectorise only where the order of comparisons and NaN do not matter; infinities stay in use as "never".
entry_minimum = compiled(fastmath={"nnan", "nsz", "contract", "reassoc"})


@entry_minimum
def best_swap(
    U: Any,
    q: int,
    late: bool,
    f: Any,
    left: Any,
    g: Any,
    right: Any,
    y: Any,
    it: Any,
    cost: Any,
    d: Any,
    a: Any,
    may_return: Any,
    grouped: bool,
    row_group: Any,
    column_group: Any,
    start: int,
    stop: int,
) -> tuple[int, int, float]:
    """The swap that changes the doubled loss least, over the pruned weights start … stop-1.

    The change by r and s is cost[s] − (d[r] + U[r, s] y[s])² / (a[r] + U[r, s]² it[s]); see `Tableau`. A row is
    read twice only where it holds a better swap than the rows before: the test for that needs no division.

    Parameters
    ----------
    U : float64 (≥ stop, ≥ q), in place
    q : int
        Columns of U that are in use.
    late : bool
        Whether f leftᵀ + g rightᵀ has still to be subtracted from U; done on the way, row by row.
    f, g : float64 (p,)
    left, right : float64 (q,)
    y, it, cost : float64 (q,)
    d, a : float64 (p,)
    may_return : bool (p,)
    grouped : bool
        Only pairs of one group are swapped.
    row_group, column_group : int64 (p,), (q,)
    start, stop : int

    Returns
    -------
    r, s : int
        −1 where there is no swap.
    change : float
    """
    best, best_r, best_s = 1e299, -1, -1
    for r in range(start, stop):
        row = U[r, :q]
        if late:
            fr, gr = f[r], g[r]
            for s in range(q):
                row[s] -= fr * left[s] + gr * right[s]
        if not may_return[r]:
            continue
        residual, pivot, excess = d[r], a[r], -1.0
        if grouped:
            group = row_group[r]
            for s in range(q):
                u = row[s]
                top = residual + u * y[s]
                value = top * top - (cost[s] - best) * (pivot + u * u * it[s])
                excess = max(excess, value if column_group[s] == group else -1.0)
        else:
            for s in range(q):
                u = row[s]
                top = residual + u * y[s]
                excess = max(excess, top * top - (cost[s] - best) * (pivot + u * u * it[s]))
        if excess > 0.0:
            for s in range(q):
                u = row[s]
                top = residual + u * y[s]
                change = cost[s] - top * top / (pivot + u * u * it[s])
                if change < best and (not grouped or column_group[s] == row_group[r]):
                    best, best_r, best_s = change, r, s
    return best_r, best_s, best


@entry_minimum
def rank_two_update(U: Any, q: int, f: Any, left: Any, g: Any, right: Any, start: int, stop: int) -> None:
    """Subtract f leftᵀ + g rightᵀ from the first q columns of the rows start … stop-1 of U, in place."""
    for r in range(start, stop):
        row, fr, gr = U[r, :q], f[r], g[r]
        for s in range(q):
            row[s] -= fr * left[s] + gr * right[s]


@entry_minimum
def subtract_from_rest(T: Any, left: Any, out: Any) -> None:
    """Replace `out` by T[left, left] − out, in one pass; T float64 (b, b), left int64 (l,), out float64 (l, l)."""
    for i in range(left.size):
        source, target = T[left[i]], out[i]
        for j in range(left.size):
            target[j] = source[left[j]] - target[j]


@entry
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
