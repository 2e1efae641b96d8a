"""Inner loops of the relaxation and of the selection search, in numba; twins in `selection_numpy`.

A *core* is a list of variables sorted by block and group. Its Q is stored as the dense square of each block, one
after the other: `q`, from `q_start` on. A *cell* is a run of variables of one block and one group. Exchanges stay
inside a group. See `cbs_opt.solvers.core.Core`, which makes these arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_SUM = {"reassoc", "contract", "nsz", "arcp"}  # lets sums run in vector registers


@njit(cache=True, nogil=True, fastmath=_SUM)
def row_norms(rows: Any) -> Any:
    """Squared Euclidean norms of float32 rows, in float64."""
    n, m = rows.shape
    out = np.empty(n)
    for k in range(n):
        t = 0.0
        for s in range(m):
            v = np.float64(rows[k, s])
            t += v * v
        out[k] = t
    return out


@njit(cache=True, nogil=True, fastmath=_SUM)
def combine_rows(rows: Any, index: Any, value: Any) -> Any:
    """Sum of value[i] * rows[index[i]] in float64."""
    m = rows.shape[1]
    r = np.zeros(m)
    for i in range(len(index)):
        row = rows[index[i]]
        v = value[i]
        for s in range(m):
            r[s] += v * row[s]
    return r


@njit(cache=True, nogil=True, fastmath=_SUM)
def add_dots(rows: Any, r: Any, out: Any) -> Any:
    """Add rows @ r to out, accumulated in float64."""
    n, m = rows.shape
    for k in range(n):
        row = rows[k]
        t = 0.0
        for s in range(m):
            t += row[s] * r[s]
        out[k] += t


@njit(cache=True, nogil=True)
def add_rows(q: Any, index: Any, value: Any, out: Any) -> Any:
    """Add sum of value[i] * q[index[i]] to out."""
    n = q.shape[1]
    for i in range(len(index)):
        row = q[index[i]]
        v = value[i]
        for k in range(n):
            out[k] += v * row[k]


@njit(cache=True, nogil=True)
def _cell_heads(c: Any, cell_start: Any, x: Any, h: Any, low: Any, high: Any) -> Any:
    """Least h among x < 1 and greatest h among x > 0 in cell c."""
    lo = -1
    hi = -1
    vlo = np.inf
    vhi = -np.inf
    for k in range(cell_start[c], cell_start[c + 1]):
        if h[k] < vlo and x[k] < 1.0:
            vlo = h[k]
            lo = k
        if h[k] > vhi and x[k] > 0.0:
            vhi = h[k]
            hi = k
    low[c] = lo
    high[c] = hi


@njit(cache=True, nogil=True)
def pair_descent(
    q: Any,
    q_start: Any,
    block_start: Any,
    block_cell: Any,
    cell_start: Any,
    cell_group: Any,
    n_groups: Any,
    curvature: Any,
    shift: Any,
    x: Any,
    h: Any,
    steps: Any,
    tol: Any,
) -> Any:
    """Second-order pairwise descent of the (possibly concave) box QP on a core.

    `curvature` is diag(Q) - shift, `h` the gradient of the shifted objective; both
    x and h are changed in place. Returns the number of steps taken; fewer than
    `steps` means that no pair violates optimality by more than `tol`.
    """
    n_cells = len(cell_start) - 1
    cell_block = np.empty(n_cells, np.int64)
    for b in range(len(block_start) - 1):
        for c in range(block_cell[b], block_cell[b + 1]):
            cell_block[c] = b
    low = np.empty(n_cells, np.int64)
    high = np.empty(n_cells, np.int64)
    for c in range(n_cells):
        _cell_heads(c, cell_start, x, h, low, high)
    g_low = np.empty(n_groups, np.int64)
    g_high = np.empty(n_groups)
    for step in range(steps):
        g_low[:] = -1
        g_high[:] = -np.inf
        for c in range(n_cells):
            g = cell_group[c]
            if low[c] >= 0 and (g_low[g] < 0 or h[low[c]] < h[g_low[g]]):
                g_low[g] = low[c]
            if high[c] >= 0 and h[high[c]] > g_high[g]:
                g_high[g] = h[high[c]]
        group = -1
        worst = tol
        for g in range(n_groups):
            if g_low[g] >= 0 and g_high[g] - h[g_low[g]] > worst:
                worst = g_high[g] - h[g_low[g]]
                group = g
        if group < 0:
            return step
        i = g_low[group]
        cap_i = 1.0 - x[i]
        best = 0.0
        j = -1
        move = 0.0
        bi = 0
        for c in range(n_cells):
            if cell_group[c] != group:
                continue
            b = cell_block[c]
            if low[c] != i:
                k = high[c]
                if k >= 0 and (i < block_start[b] or i >= block_start[b + 1]):
                    slope = h[k] - h[i]
                    if slope > tol:
                        a = curvature[i] + curvature[k]
                        s = min(cap_i, x[k])
                        if a * s > slope:
                            s = slope / a
                        v = s * (slope - 0.5 * a * s)
                        if v > best:
                            best = v
                            j = k
                            move = s
                continue
            bi = b
            base = block_start[b]
            size = block_start[b + 1] - base
            o = q_start[b] + (i - base) * size
            row = q[o : o + size]
            for k in range(cell_start[c], cell_start[c + 1]):
                slope = h[k] - h[i]
                if slope > tol and x[k] > 0.0:
                    a = curvature[i] + curvature[k] - 2.0 * row[k - base]
                    if a <= 0.0 or slope * slope > 2.0 * a * best:
                        s = min(cap_i, x[k])
                        if a * s > slope:
                            s = slope / a
                        v = s * (slope - 0.5 * a * s)
                        if v > best:
                            best = v
                            j = k
                            move = s
        if j < 0:
            return step
        x[i] = 1.0 if move == cap_i else x[i] + move
        x[j] = 0.0 if move == x[j] else x[j] - move
        bj = bi
        if j < block_start[bi] or j >= block_start[bi + 1]:
            bj = np.searchsorted(block_start, j, side="right") - 1
        base = block_start[bi]
        size = block_start[bi + 1] - base
        o = q_start[bi] + (i - base) * size
        row = q[o : o + size]
        if bj == bi:
            o = q_start[bi] + (j - base) * size
            other = q[o : o + size]
            for k in range(size):
                h[base + k] += move * (row[k] - other[k])
        else:
            for k in range(size):
                h[base + k] += move * row[k]
            base = block_start[bj]
            size = block_start[bj + 1] - base
            o = q_start[bj] + (j - base) * size
            other = q[o : o + size]
            for k in range(size):
                h[base + k] -= move * other[k]
        h[i] -= move * shift[i]
        h[j] += move * shift[j]
        for c in range(block_cell[bi], block_cell[bi + 1]):
            _cell_heads(c, cell_start, x, h, low, high)
        if bj != bi:
            for c in range(block_cell[bj], block_cell[bj + 1]):
                _cell_heads(c, cell_start, x, h, low, high)
    return steps


@njit(cache=True, nogil=True)
def _mix(state: Any) -> Any:
    """One step of the splitmix64 generator: new state and a 63-bit value."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    z = state
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state, z ^ (z >> np.uint64(31))


@njit(cache=True, nogil=True)
def tabu_swaps(
    q: Any,
    q_start: Any,
    block_start: Any,
    block_cell: Any,
    cell_start: Any,
    cell_group: Any,
    n_groups: Any,
    half: Any,
    y: Any,
    h: Any,
    f: Any,
    best: Any,
    f_best: Any,
    release: Any,
    clock: Any,
    steps: Any,
    stall: Any,
    tenure: Any,
    rng: Any,
    idle: Any,
) -> Any:
    """Drop/add tabu search on a core; y (int8) and h (gradient) change in place.

    A step drops the pruned variable whose removal costs least in the group with the
    least estimated pair cost, then adds the variable of the same group that costs least
    after the drop. Returns (f, f_best, clock, rng, steps since the best).
    """
    n_cells = len(cell_start) - 1
    cell_block = np.empty(n_cells, np.int64)
    for b in range(len(block_start) - 1):
        for c in range(block_cell[b], block_cell[b + 1]):
            cell_block[c] = b
    drop_k = np.empty(n_groups, np.int64)
    drop_v = np.empty(n_groups)
    add_v = np.empty(n_groups)
    for _ in range(steps):
        if idle >= stall:
            break
        drop_v[:] = np.inf
        drop_k[:] = -1
        for c in range(n_cells):
            g = cell_group[c]
            vd = drop_v[g]
            kd = drop_k[g]
            for k in range(cell_start[c], cell_start[c + 1]):
                if y[k] == 1:
                    v = half[k] - h[k]
                    if v < vd and release[k] <= clock:
                        vd = v
                        kd = k
            drop_v[g] = vd
            drop_k[g] = kd
        group = 0
        if n_groups > 1:
            add_v[:] = np.inf
            for c in range(n_cells):
                g = cell_group[c]
                va = add_v[g]
                for k in range(cell_start[c], cell_start[c + 1]):
                    if y[k] == 0:
                        v = half[k] + h[k]
                        if v < va and release[k] <= clock:
                            va = v
                add_v[g] = va
            least = np.inf
            group = -1
            for g in range(n_groups):
                v = drop_v[g] + add_v[g]
                if v < least:
                    least = v
                    group = g
        clock += 1
        idle += 1
        if group < 0 or drop_k[group] < 0:
            continue
        i = drop_k[group]
        gain = drop_v[group]
        bi = np.searchsorted(block_start, i, side="right") - 1
        base = block_start[bi]
        size = block_start[bi + 1] - base
        o = q_start[bi] + (i - base) * size
        row = q[o : o + size]
        for k in range(size):
            h[base + k] -= row[k]
        y[i] = 0
        j = -1
        vj = np.inf
        for c in range(n_cells):
            if cell_group[c] == group:
                for k in range(cell_start[c], cell_start[c + 1]):
                    if y[k] == 0:
                        v = half[k] + h[k]
                        if v < vj and k != i and release[k] < clock:
                            vj = v
                            j = k
        if j < 0:
            j = i
            vj = -gain
        y[j] = 1
        bj = np.searchsorted(block_start, j, side="right") - 1
        base = block_start[bj]
        size = block_start[bj + 1] - base
        o = q_start[bj] + (j - base) * size
        row = q[o : o + size]
        for k in range(size):
            h[base + k] += row[k]
        f += gain + vj
        rng, z = _mix(rng)
        release[i] = clock + tenure + np.int64(z % np.uint64(tenure))
        if j != i:
            rng, z = _mix(rng)
            release[j] = clock + tenure + np.int64(z % np.uint64(tenure))
        if f < f_best - 1e-12 * abs(f_best):
            f_best = f
            best[:] = y
            idle = 0
    return f, f_best, clock, rng, idle
