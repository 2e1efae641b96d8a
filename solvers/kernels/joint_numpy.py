"""The kernels of `joint_numba` in plain NumPy, one for one: the oracle of the tests."""

from __future__ import annotations

import numpy as np

from cbs_opt.typing import BoolArray, FloatArray, IntArray


def best_swap_per_row(
    U: FloatArray,
    y: FloatArray,
    it: FloatArray,
    cost: FloatArray,
    d: FloatArray,
    a: FloatArray,
    start: int,
    stop: int,
    out: FloatArray,
) -> None:
    """Twin of `joint_numba.best_swap_per_row`."""
    rows = slice(start, stop)
    change = cost - (d[rows, None] + U[rows] * y) ** 2 / (a[rows, None] + U[rows] ** 2 * it)
    out[rows] = change.min(axis=1, initial=1e300)


def best_swap_per_row_in_groups(
    U: FloatArray,
    y: FloatArray,
    it: FloatArray,
    cost: FloatArray,
    d: FloatArray,
    a: FloatArray,
    row_group: IntArray,
    column_group: IntArray,
    start: int,
    stop: int,
    out: FloatArray,
) -> None:
    """Twin of `joint_numba.best_swap_per_row_in_groups`."""
    rows = slice(start, stop)
    change = cost - (d[rows, None] + U[rows] * y) ** 2 / (a[rows, None] + U[rows] ** 2 * it)
    same = row_group[rows, None] == column_group
    out[rows] = np.where(same, change, 1e300).min(axis=1, initial=1e300)


def rank_two_update(
    U: FloatArray, f: FloatArray, p: FloatArray, g: FloatArray, q: FloatArray, start: int, stop: int
) -> None:
    """Twin of `joint_numba.rank_two_update`."""
    rows = slice(start, stop)
    U[rows] -= np.outer(f[rows], p) + np.outer(g[rows], q)


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
