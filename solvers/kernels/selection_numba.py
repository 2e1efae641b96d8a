"""Inner loops of the relaxation and of the selection search, in numba; twins in `selection_numpy`.

A *core* is a list of variables sorted by block and group. Its Q is stored as the dense square of each block, one
after the other: `q`, from `q_start` on. A *cell* is a run of variables of one block and one group. Exchanges stay
inside a group. See `cbs_opt.solvers.selection.core.Core`, which makes these arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from cbs_opt.solvers.kernels.compilation import entry, entry_fast, inner, inner_counted

_ORDERED = ("nnan", "nsz")  # lets minima run in vector registers
_CHUNK = 128
_SHORT = 32  # where looking up costs more


@intrinsic  # type: ignore[untyped-decorator]
def smaller(typing_context: Any, a: Any, b: Any) -> Any:
    """The smaller of two numbers, neither of them NaN; unlike `min`, it vectorises as a reduction."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        smaller = builder.fcmp_ordered("<", *values, flags=_ORDERED)
        return builder.select(smaller, *values, flags=_ORDERED)

    return types.float64(types.float64, types.float64), generate


@entry_fast
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


@entry_fast
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


@entry_fast
def add_dots(rows: Any, r: Any, out: Any) -> Any:
    """Add rows @ r to out, accumulated in float64."""
    n, m = rows.shape
    for k in range(n):
        row = rows[k]
        t = 0.0
        for s in range(m):
            t += row[s] * r[s]
        out[k] += t


@entry
def add_rows(q: Any, index: Any, value: Any, out: Any) -> Any:
    """Add sum of value[i] * q[index[i]] to out."""
    n = q.shape[1]
    for i in range(len(index)):
        row = q[index[i]]
        v = value[i]
        for k in range(n):
            out[k] += v * row[k]


@inner
def _argmin(v: Any) -> Any:
    """First index of the least number."""
    m = np.inf
    for k in range(len(v)):
        m = smaller(v[k], m)
    k = 0
    while k < len(v) - 1 and v[k] != m:
        k += 1
    return k


@inner
def _add_scaled(h: Any, row: Any, s: Any) -> Any:
    for k in range(len(h)):
        h[k] += s * row[k]


@inner_counted
def cells_of_groups(block_cell: Any, cell_group: Any, n_groups: Any) -> Any:
    """Block of every cell, and the cells of every group as (start, cells), ascending."""
    n_cells = len(cell_group)
    cell_block = np.empty(n_cells, np.int64)
    for b in range(len(block_cell) - 1):
        for c in range(block_cell[b], block_cell[b + 1]):
            cell_block[c] = b
    start = np.zeros(n_groups + 2, np.int64)
    for c in range(n_cells):
        start[cell_group[c] + 2] += 1
    for g in range(n_groups):
        start[g + 2] += start[g + 1]
    cells = np.empty(n_cells, np.int64)
    for c in range(n_cells):
        g = cell_group[c] + 1
        cells[start[g]] = c
        start[g] += 1
    return cell_block, start[: n_groups + 1], cells


@inner_counted
def row_of(q: Any, q_start: Any, block_start: Any, b: Any, k: Any) -> Any:
    """Row of the core matrix that belongs to variable k of block b."""
    size = block_start[b + 1] - block_start[b]
    o = q_start[b] + (k - block_start[b]) * size
    return q[o : o + size]


@inner
def _gaps(
    cell_group: Any, group_start: Any, group_cells: Any, low: Any, high: Any, first: Any, last: Any, gap: Any
) -> Any:
    """Least `low` plus least `high` of the groups that have a cell from `first` to `last`."""
    for c in range(first, last):
        g = cell_group[c]
        lo = np.inf
        hi = np.inf
        for other in group_cells[group_start[g] : group_start[g + 1]]:
            lo = min(lo, low[other])
            hi = min(hi, high[other])
        gap[g] = lo + hi


@inner
def _costs(h: Any, drop: Any, add: Any, start: Any, first: Any, last: Any, out_drop: Any, out_add: Any) -> Any:
    """Least drop - h and least add + h of the cells from `first` to `last`, into `out_drop` and `out_add`."""
    for c in range(first, last):
        a = start[c]
        hc = h[a : start[c + 1]]
        dc = drop[a : start[c + 1]]
        ac = add[a : start[c + 1]]
        vd = np.inf
        va = np.inf
        for k in range(len(hc)):
            vd = smaller(dc[k] - hc[k], vd)
            va = smaller(ac[k] + hc[k], va)
        out_drop[c] = vd
        out_add[c] = va


@inner
def _exchange(h: Any, row: Any, other: Any, move: Any, cost: Any) -> Any:
    """Add move (row - other) to h; returns the least cost + h and an index from which to look for it."""
    n = len(h)
    best = np.inf
    at = 0
    for s in range(0, n, _CHUNK):
        hc = h[s : s + _CHUNK]
        rc = row[s : s + _CHUNK]
        oc = other[s : s + _CHUNK]
        cc = cost[s : s + _CHUNK]
        m = np.inf
        for k in range(len(hc)):
            v = hc[k] + move * (rc[k] - oc[k])
            hc[k] = v
            m = smaller(cc[k] + v, m)
        if m < best:
            best = m
            at = s
    return best, at


@inner
def _partner(h: Any, x: Any, curvature: Any, row: Any, hi: Any, ci: Any, cap: Any, tol: Any, best: Any) -> Any:
    """Greatest gain above `best` of moving mass from one of these variables to one with gradient hi.

    Returns (gain, index, move), index -1 when there is none.
    """
    least = -best
    at = -1
    for s in range(0, len(h), _SHORT):
        hc = h[s : s + _SHORT]
        xc = x[s : s + _SHORT]
        cc = curvature[s : s + _SHORT]
        rc = row[s : s + _SHORT]
        m = np.inf
        for k in range(len(hc)):
            slope = hc[k] - hi
            a = ci + cc[k] - 2.0 * rc[k]
            w = cap if cap < xc[k] else xc[k]
            w = slope / a if a * w > slope else w
            v = w * (0.5 * a * w - slope)
            v = v if slope > tol else 0.0
            m = smaller(v, m)
        if m < least:
            least = m
            at = s
    j = -1
    move = 0.0
    if at >= 0:
        for k in range(at, min(at + _SHORT, len(h))):
            slope = h[k] - hi
            if slope > tol and x[k] > 0.0:
                a = ci + curvature[k] - 2.0 * row[k]
                w = cap if cap < x[k] else x[k]
                if a * w > slope:
                    w = slope / a
                v = w * (slope - 0.5 * a * w)
                if v > best:
                    best = v
                    j = k
                    move = w
    return best, j, move


@entry
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
    n_cells = len(cell_group)
    cell_block, group_start, group_cells = cells_of_groups(block_cell, cell_group, n_groups)
    # Infinite where x cannot fall or rise.
    drop = np.empty(len(x))
    add = np.empty(len(x))
    for k in range(len(x)):
        drop[k] = 0.0 if x[k] > 0.0 else np.inf
        add[k] = 0.0 if x[k] < 1.0 else np.inf
    low = np.empty(n_cells)  # least h among x < 1
    high = np.empty(n_cells)  # minus the greatest h among x > 0
    _costs(h, drop, add, cell_start, 0, n_cells, high, low)
    gap = np.empty(n_groups)
    _gaps(cell_group, group_start, group_cells, low, high, 0, n_cells, gap)
    at = 0
    for step in range(steps):
        group = _argmin(gap) if n_groups > 1 else 0
        if n_cells > 1 and not -gap[group] > tol:
            return step
        ours = group_cells[group_start[group] : group_start[group + 1]]
        cell = ours[0]
        for c in ours:
            if low[c] < low[cell]:
                cell = c
        if not low[cell] < np.inf:
            return step
        i = cell_start[cell] + at
        while i < cell_start[cell + 1] - 1 and add[i] + h[i] != low[cell]:
            i += 1
        cap = 1.0 - x[i]
        bi = cell_block[cell]
        row = row_of(q, q_start, block_start, bi, i)
        start = block_start[bi]
        stop = block_start[bi + 1]
        best = 0.0
        j = -1
        move = 0.0
        bj = bi
        for c in ours:
            k0 = cell_start[c]
            k1 = cell_start[c + 1]
            if c == cell:
                rc = row[k0 - start : k1 - start]
                best, k, s = _partner(h[k0:k1], x[k0:k1], curvature[k0:k1], rc, h[i], curvature[i], cap, tol, best)
                if k >= 0:
                    j = k0 + k
                    move = s
                    bj = bi
                continue
            slope = -high[c] - h[i]
            if slope > tol:
                k = k0
                while k < k1 - 1 and drop[k] - h[k] != high[c]:
                    k += 1
                a = curvature[i] + curvature[k]
                s = min(cap, x[k])
                if a * s > slope:
                    s = slope / a
                v = s * (slope - 0.5 * a * s)
                if v > best:
                    best = v
                    j = k
                    move = s
                    bj = cell_block[c]
        if j < 0:
            return step
        x[i] = 1.0 if move == cap else x[i] + move
        x[j] = 0.0 if move == x[j] else x[j] - move
        drop[i] = 0.0
        add[j] = 0.0
        if not x[i] < 1.0:
            add[i] = np.inf
        if not x[j] > 0.0:
            drop[j] = np.inf
        h[i] -= move * shift[i]
        h[j] += move * shift[j]
        other = row_of(q, q_start, block_start, bj, j)
        if bj == bi:
            m, k = _exchange(h[start:stop], row, other, move, add[start:stop])
            if n_cells == 1:
                low[0] = m
                at = k
                continue
        else:
            _add_scaled(h[start:stop], row, move)
            _add_scaled(h[block_start[bj] : block_start[bj + 1]], other, -move)
        for b in (bi, bj):
            _costs(h, drop, add, cell_start, block_cell[b], block_cell[b + 1], high, low)
            _gaps(cell_group, group_start, group_cells, low, high, block_cell[b], block_cell[b + 1], gap)
            if bi == bj:
                break
    return steps


@inner
def mix(state: Any) -> Any:
    """One step of the splitmix64 generator: new state and a 63-bit value."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    z = state
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state, z ^ (z >> np.uint64(31))


@inner
def _add_row(h: Any, row: Any, s: Any, cost: Any) -> Any:
    """Add s row to h, s = ±1; returns the least cost - s h and an index from which to look for it."""
    best = np.inf
    at = 0
    for a in range(0, len(h), _CHUNK):
        hc = h[a : a + _CHUNK]
        rc = row[a : a + _CHUNK]
        cc = cost[a : a + _CHUNK]
        m = np.inf
        for k in range(len(hc)):
            v = hc[k] + s * rc[k]
            hc[k] = v
            m = smaller(cc[k] - s * v, m)
        if m < best:
            best = m
            at = a
    return best, at


@inner
def _find(h: Any, s: Any, cost: Any, v: Any, k: Any, stop: Any) -> Any:
    """First index from k on at which cost - s h is v."""
    while k < stop - 1 and cost[k] - s * h[k] != v:
        k += 1
    return k


@entry
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
    n_cells = len(cell_group)
    n_blocks = len(block_start) - 1
    cell_block, group_start, group_cells = cells_of_groups(block_cell, cell_group, n_groups)
    # Costs but for h, infinite where the move is not allowed; chains of tabu variables by the time of release.
    n = len(y)
    drop = np.empty(n)
    add = np.empty(n)
    after = np.empty(n, np.int64)
    turn = 2 * tenure + 1
    for k in range(n):
        turn = max(turn, release[k] - clock + 1)
    chain = np.empty(turn, np.int64)
    for k in range(turn):
        chain[k] = -1
    for k in range(n):
        drop[k] = np.inf
        add[k] = np.inf
        if release[k] > clock:
            after[k] = chain[release[k] % turn]
            chain[release[k] % turn] = k
        elif y[k] == 1:
            drop[k] = half[k]
        else:
            add[k] = half[k]
    low = np.empty(n_cells)
    high = np.empty(n_cells)
    gap = np.empty(n_groups)
    look = np.empty(n_cells, np.int64)
    for c in range(n_cells):
        look[c] = cell_start[c]
    _costs(h, drop, add, cell_start, 0, n_cells, low, high)
    _gaps(cell_group, group_start, group_cells, low, high, 0, n_cells, gap)
    for _ in range(steps):
        if idle >= stall:
            break
        k = chain[clock % turn]
        chain[clock % turn] = -1
        while k >= 0:
            b = 0
            while block_start[b + 1] <= k:
                b += 1
            c = block_cell[b]
            if n_groups > 1:
                after_last = block_cell[b + 1]
                while after_last - c > 1:
                    middle = (c + after_last) // 2
                    if cell_start[middle] <= k:
                        c = middle
                    else:
                        after_last = middle
            if y[k] == 1:
                drop[k] = half[k]
                v = half[k] - h[k]
                if v <= low[c]:
                    look[c] = k if v < low[c] else min(k, look[c])
                    low[c] = v
            else:
                add[k] = half[k]
                high[c] = min(high[c], half[k] + h[k])
            if n_groups > 1:
                _gaps(cell_group, group_start, group_cells, low, high, c, c + 1, gap)
            k = after[k]
        group = _argmin(gap) if n_groups > 1 else 0
        clock += 1
        idle += 1
        if n_groups > 1 and not gap[group] < np.inf:
            continue
        ours = group_cells[group_start[group] : group_start[group + 1]]
        ci = ours[0]
        for c in ours:
            if low[c] < low[ci]:
                ci = c
        gain = low[ci]
        if not gain < np.inf:
            continue
        i = _find(h, 1.0, drop, gain, look[ci], cell_start[ci + 1])
        y[i] = 0
        drop[i] = np.inf
        bi = cell_block[ci]
        hi = h[block_start[bi] : block_start[bi + 1]]
        row = row_of(q, q_start, block_start, bi, i)
        from_ = cell_start[ci]
        if n_groups == 1:
            high[ci], at = _add_row(hi, row, -1.0, add[block_start[bi] : block_start[bi + 1]])
            from_ += at
        else:
            _add_scaled(hi, row, -1.0)
            _costs(h, drop, add, cell_start, ci, ci + 1, low, high)
        cj = ours[0]
        for c in ours:
            if high[c] < high[cj]:
                cj = c
        cost = high[cj]
        if cost < np.inf:
            j = _find(h, -1.0, add, cost, from_ if cj == ci else cell_start[cj], cell_start[cj + 1])
            add[j] = np.inf
        else:
            j = i
            cj = ci
            cost = -gain
        y[j] = 1
        bj = cell_block[cj]
        hj = h[block_start[bj] : block_start[bj + 1]]
        row = row_of(q, q_start, block_start, bj, j)
        if n_groups == 1:
            low[cj], at = _add_row(hj, row, 1.0, drop[block_start[bj] : block_start[bj + 1]])
            if n_blocks > 1:
                _costs(h, drop, add, cell_start, ci, ci + 1, low, high)
                _costs(h, drop, add, cell_start, cj, cj + 1, low, high)
                look[ci] = cell_start[ci]
            look[cj] = cell_start[cj] + at
        else:
            _add_scaled(hj, row, 1.0)
            for b in (bi, bj):
                _costs(h, drop, add, cell_start, block_cell[b], block_cell[b + 1], low, high)
                _gaps(cell_group, group_start, group_cells, low, high, block_cell[b], block_cell[b + 1], gap)
                for c in range(block_cell[b], block_cell[b + 1]):
                    look[c] = cell_start[c]
                if bi == bj:
                    break
        f += gain + cost
        rng, z = mix(rng)
        release[i] = clock + tenure + np.int64(z % np.uint64(tenure))
        after[i] = chain[release[i] % turn]
        chain[release[i] % turn] = i
        if j != i:
            rng, z = mix(rng)
            release[j] = clock + tenure + np.int64(z % np.uint64(tenure))
            after[j] = chain[release[j] % turn]
            chain[release[j] % turn] = j
        if f < f_best - 1e-12 * abs(f_best):
            f_best = f
            for k in range(n):
                best[k] = y[k]
            idle = 0
    return f, f_best, clock, rng, idle
