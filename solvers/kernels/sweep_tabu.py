"""Tabu search by best swaps on one dense joint problem, on its swept tableau.

The symmetric matrix [[H, b], [bᵀ, κ]] swept on the kept weights S (Goodnight, The American Statistician 33, 1979)
holds −H_SS⁻¹, H_SS⁻¹H_SP, the Schur complement of the pruned weights P, the kept values x, the residuals d and the
doubled loss: the prices of `joint.tableau.Tableau` are made of its entries, and a swap is a change of rank two.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cbs_opt.solvers.kernels.compilation import compiled, entry
from cbs_opt.solvers.kernels.joint_numba import entry_minimum
from cbs_opt.solvers.kernels.selection_numba import mix

NEVER = 1e200
"""Pivot or price of what may not move."""

_GAIN = 1e-9  # smallest improvement that counts, relative to the loss
_SETTLED = 20  # swaps since the last fresh tableau after which a new best value is computed afresh

_minimum = compiled(fastmath={"nnan", "nsz", "contract", "reassoc"}, no_cpython_wrapper=True, _nrt=False)


@entry_minimum
def sweep(M: Any, kept: Any, floor: Any, A: Any) -> None:
    """Sweep M, float64 (n+1, n+1), on the kept weights, int8 (n,), into A; no pivot is below `floor`, (n,)."""
    size = M.shape[0]
    for i in range(size):
        for j in range(size):
            A[i, j] = M[i, j]
    v = np.empty(size)
    for s in range(size - 1):
        if not kept[s]:
            continue
        pivot = max(A[s, s], floor[s])
        for i in range(size):
            v[i] = A[s, i]
        for i in range(size):
            row, factor = A[i], v[i] / pivot
            for j in range(size):
                row[j] -= factor * v[j]
        for i in range(size):
            A[s, i] = A[i, s] = v[i] / pivot
        A[s, s] = -1.0 / pivot


@_minimum
def _excess(row: Any, d: Any, a: Any, y: Any, missing: Any, it: Any) -> Any:
    """Positive where some swap of this kept weight changes the loss by less than its price less `missing`."""
    most = -1.0
    for k in range(len(row)):
        u = row[k]
        top = d[k] + u * y
        most = max(most, top * top - missing * (a[k] + u * u * it))
    return most


@_minimum
def _exchange(A: Any, s: Any, r: Any, least: Any, v: Any, w: Any) -> None:
    """Sweep s out and r in; v and w, float64 (n+1,), are work space."""
    size = A.shape[0]
    first = A[s, s]
    for i in range(size):
        v[i] = A[s, i]
    factor = v[r] / first
    second = max(A[r, r] - v[r] * factor, least)
    for i in range(size):
        w[i] = A[r, i] - v[i] * factor
    w[s], w[r] = -factor, second
    for i in range(size):
        row, a, b = A[i], v[i] / first, w[i] / second
        for j in range(size):
            row[j] -= a * v[j] + b * w[j]
    for i in range(size):
        A[s, i] = A[i, s] = -v[i] / first - w[s] * w[i] / second
    A[s, s] = -1.0 / first - w[s] * w[s] / second
    for i in range(size):
        A[r, i] = A[i, r] = w[i] / second
    A[r, r] = -1.0 / second


@entry
def sweep_tabu(
    M: Any,
    A: Any,
    kept: Any,
    floor: Any,
    group: Any,
    group_start: Any,
    release: Any,
    best: Any,
    value: Any,
    clock: Any,
    idle: Any,
    since: Any,
    rng: Any,
    steps: Any,
    stall: Any,
    away: Any,
    back: Any,
    refresh: Any,
) -> Any:
    """Up to `steps` best swaps within groups of weights that are not tabu; stops after `stall` without a new best.

    Parameters
    ----------
    M, A : float64 (n+1, n+1)
        The problem, and its tableau at `kept`; A changes in place.
    kept : int8 (n,), in place
    floor : float64 (n,)
        Least Schur complements.
    group : int64 (n,)
        Weights are sorted by group; group g is group_start[g] … group_start[g+1]-1.
    release : int64 (n,), in place
        When the clock exceeds it the weight may move.
    best : int8 (n,), in place
        The best kept set, of doubled loss `value`.
    clock, idle, since : int
        Moves so far, since the best, and since a fresh tableau.
    rng : uint64
    steps, stall : int
    away, back : int
        Moves for which a weight that left, or came back, is tabu, at least; less than twice as many.
    refresh : int
        Moves after which the tableau is computed afresh.

    Returns
    -------
    value, clock, idle, since, rng
        As above; `idle` is `stall` where no weight can ever move.
    """
    n = len(kept)
    price, y, it = np.empty(n), np.empty(n), np.empty(n)
    d, a = np.empty(n), np.empty(n)
    v, w = np.empty(n + 1), np.empty(n + 1)
    for _ in range(steps):
        if idle >= stall:
            break
        if since >= refresh:
            sweep(M, kept, floor, A)
            since = 0
        first = -1
        tabu = False
        for k in range(n):
            free = release[k] < clock
            tabu = tabu or (not free and release[k] < clock + 10**9)
            d[k], a[k], price[k] = 0.0, NEVER, NEVER
            if kept[k]:
                t = -A[k, k]
                it[k] = 1.0 / t
                y[k] = A[k, n] / t
                if free:
                    price[k] = A[k, n] * y[k]
                    if first < 0 or price[k] < price[first]:
                        first = k
            elif free:
                d[k], a[k] = A[k, n], max(A[k, k], floor[k])
        clock += 1
        idle += 1
        change = 0.5 * NEVER
        out = -1
        into = -1
        for position in range(-1, n):
            s = first if position < 0 else position
            if s < 0 or price[s] >= NEVER or position == first:
                continue
            lo, hi = group_start[group[s]], group_start[group[s] + 1]
            row = A[s]
            if _excess(row[lo:hi], d[lo:hi], a[lo:hi], y[s], price[s] - change, it[s]) <= 0.0:
                continue
            for k in range(lo, hi):
                if a[k] < NEVER:
                    top = d[k] + row[k] * y[s]
                    found = price[s] - top * top / (a[k] + row[k] * row[k] * it[s])
                    if found < change:
                        change, out, into = found, s, k
        if out < 0:
            if not tabu:
                idle = stall
            continue
        _exchange(A, out, into, floor[into], v, w)
        kept[out], kept[into] = 0, 1
        since += 1
        rng, z = mix(rng)
        release[out] = clock + away + np.int64(z % np.uint64(away))
        rng, z = mix(rng)
        release[into] = clock + back + np.int64(z % np.uint64(back))
        if A[n, n] < value - _GAIN * abs(value):
            if since > _SETTLED:
                sweep(M, kept, floor, A)
                since = 0
            if A[n, n] < value - _GAIN * abs(value):
                value = A[n, n]
                idle = 0
                for k in range(n):
                    best[k] = kept[k]
    return value, clock, idle, since, rng
