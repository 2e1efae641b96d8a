"""The kernels of `joint_numba` in plain NumPy: the reference of the tests."""

from __future__ import annotations

import numpy as np

from cbs_opt.typing import BoolArray, FloatArray, IntArray


def best_swap(
    U: FloatArray,
    q: int,
    late: bool,
    f: FloatArray,
    left: FloatArray,
    g: FloatArray,
    right: FloatArray,
    y: FloatArray,
    it: FloatArray,
    cost: FloatArray,
    d: FloatArray,
    a: FloatArray,
    may_return: BoolArray,
    grouped: bool,
    row_group: IntArray,
    column_group: IntArray,
    start: int,
    stop: int,
) -> tuple[int, int, float]:
    """Twin of `joint_numba.best_swap`."""
    rows = slice(start, stop)
    if late:
        rank_two_update(U, q, f, left, g, right, start, stop)
    change = cost - (d[rows, None] + U[rows, :q] * y) ** 2 / (a[rows, None] + U[rows, :q] ** 2 * it)
    change[~may_return[rows]] = 1e300
    if grouped:
        change[row_group[rows, None] != column_group] = 1e300
    r, s = np.unravel_index(int(np.argmin(change)), change.shape)
    if change[r, s] >= 1e299:
        return -1, -1, 1e299
    return start + int(r), int(s), float(change[r, s])


def rank_two_update(
    U: FloatArray,
    q: int,
    f: FloatArray,
    left: FloatArray,
    g: FloatArray,
    right: FloatArray,
    start: int,
    stop: int,
) -> None:
    """Twin of `joint_numba.rank_two_update`."""
    rows = slice(start, stop)
    U[rows, :q] -= np.outer(f[rows], left) + np.outer(g[rows], right)


def subtract_from_rest(T: FloatArray, left: IntArray, out: FloatArray) -> None:
    """Twin of `joint_numba.subtract_from_rest`."""
    np.subtract(T[np.ix_(left, left)], out, out=out)


def eliminate(
    T: FloatArray,
    V: FloatArray,
    done: int,
    x: FloatArray,
    t: FloatArray,
    removable: BoolArray,
    forced: int,
    steps: int,
    order: IntArray,
    losses: FloatArray,
) -> int:
    """Twin of `joint_numba.eliminate`."""
    for taken in range(steps):
        if not removable.any() and (taken or forced < 0):
            return taken
        costs = np.where(removable, x**2 / t, np.inf)
        j = forced if taken == 0 and forced >= 0 else int(np.argmin(costs))
        s = done + taken
        column = T[j] - V[:s, j] @ V[:s]
        V[s] = column / np.sqrt(column[j])
        order[taken], losses[taken] = j, x[j] ** 2 / t[j]
        x -= V[s] * (x[j] / V[s, j])
        t -= V[s] ** 2
        removable[j] = False
        x[j], t[j] = 0.0, 1.0
    return steps
