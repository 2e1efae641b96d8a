"""The kernels of `selection_numba` in plain NumPy: the reference of the tests."""

from __future__ import annotations

from typing import Any

import numpy as np


def row_norms(rows: Any) -> Any:
    """Squared Euclidean norms of float32 rows, in float64."""
    return (rows.astype(np.float64) ** 2).sum(1)


def combine_rows(rows: Any, index: Any, value: Any) -> Any:
    """Sum of value[i] * rows[index[i]] in float64."""
    return rows[index].astype(np.float64).T @ value


def add_dots(rows: Any, r: Any, out: Any) -> Any:
    """Add rows @ r to out, accumulated in float64."""
    out += rows.astype(np.float64) @ r


def add_rows(q: Any, index: Any, value: Any, out: Any) -> Any:
    """Add sum of value[i] * q[index[i]] to out."""
    out += q[index].astype(np.float64).T @ value


def shift_to_counts(x: Any, group: Any, count: Any, out: Any) -> None:
    """Shift x by one number per group, within [0, 1], so that the group sums are `count`; into `out`."""
    groups = len(count)
    low, high = np.full(groups, -1.0), np.full(groups, 1.0)
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = np.bincount(group, np.clip(x + middle[group], 0, 1), groups) < count
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    off = np.abs(np.bincount(group, x, groups) - count) > 1e-9
    out[:] = np.where(off[group], np.clip(x + high[group], 0, 1), x)


def _dense(q: Any, q_start: Any, block_start: Any) -> Any:
    """Whole core matrix with zeros across blocks, and the block of each variable."""
    n = block_start[-1]
    full = np.zeros((n, n))
    block = np.zeros(n, np.int64)
    for b in range(len(block_start) - 1):
        a, z = block_start[b], block_start[b + 1]
        full[a:z, a:z] = q[q_start[b] : q_start[b + 1]].reshape(z - a, z - a)
        block[a:z] = b
    return full, block


def _groups(cell_start: Any, cell_group: Any) -> Any:
    return np.repeat(cell_group, np.diff(cell_start))


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
    """Second-order pairwise descent; partners in other blocks by first order only."""
    full, block = _dense(q, q_start, block_start)
    label = _groups(cell_start, cell_group)
    for step in range(steps):
        low = np.where(x < 1.0, h, np.inf)
        high = np.where(x > 0.0, h, -np.inf)
        group, worst = -1, tol
        for g in range(n_groups):
            gap = high[label == g].max() - low[label == g].min()
            if gap > worst:
                group, worst = g, gap
        if group < 0:
            return step
        i = int(np.argmin(np.where(label == group, low, np.inf)))
        allowed = (label == group) & (block == block[i])
        for c in range(len(cell_group)):
            k = cell_start[c] + int(np.argmax(high[cell_start[c] : cell_start[c + 1]]))
            if cell_group[c] == group and block[k] != block[i]:
                allowed[k] = True
        slope = h - h[i]
        at = np.flatnonzero(allowed & (x > 0) & (slope > tol))
        if len(at) == 0:
            return step
        a = curvature[i] + curvature[at] - 2 * full[i, at]
        move = np.minimum(1.0 - x[i], x[at])
        clip = a * move > slope[at]
        move[clip] = slope[at][clip] / a[clip]
        gain = move * (slope[at] - 0.5 * a * move)
        best = int(np.argmax(gain))
        if not gain[best] > 0:
            return step
        j, s = at[best], move[best]
        x[i] = 1.0 if s == 1.0 - x[i] else x[i] + s
        x[j] = 0.0 if s == x[j] else x[j] - s
        h[i] -= s * shift[i]
        h[j] += s * shift[j]
        h += s * (full[i] - full[j])
    return steps


def _mix(state: Any) -> Any:
    mask = (1 << 64) - 1
    state = (int(state) + 0x9E3779B97F4A7C15) & mask
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return state, z ^ (z >> 31)


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
    """Drop/add tabu search; the semantics of the compiled kernel."""
    full, _ = _dense(q, q_start, block_start)
    label = _groups(cell_start, cell_group)
    for _ in range(steps):
        if idle >= stall:
            break
        drop = np.where((y == 1) & (release <= clock), half - h, np.inf)
        add = np.where((y == 0) & (release <= clock), half + h, np.inf)
        group = 0
        if n_groups > 1:
            pair = np.array([drop[label == g].min() + add[label == g].min() for g in range(n_groups)])
            group = int(np.argmin(pair)) if pair.min() < np.inf else -1
        clock += 1
        idle += 1
        if group < 0 or not drop[label == group].min() < np.inf:
            continue
        i = int(np.argmin(np.where(label == group, drop, np.inf)))
        gain = half[i] - h[i]
        h -= full[i]
        y[i] = 0
        ok = (label == group) & (y == 0) & (release < clock)
        ok[i] = False
        if ok.any():
            cost = np.where(ok, half + h, np.inf)
            j = int(np.argmin(cost))
            after = cost[j]
        else:
            j, after = i, -gain
        y[j] = 1
        h += full[j]
        f += gain + after
        rng, z = _mix(rng)
        release[i] = clock + tenure + z % tenure
        if j != i:
            rng, z = _mix(rng)
            release[j] = clock + tenure + z % tenure
        if f < f_best - 1e-12 * abs(f_best):
            f_best = f
            best[:] = y
            idle = 0
    return f, f_best, clock, rng, idle


def swap_descent(
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
    gain: Any,
    limit: Any,
) -> Any:
    """Best swaps over all pairs within a group."""
    full, _ = _dense(q, q_start, block_start)
    label = _groups(cell_start, cell_group)
    for made in range(limit):
        change = (half - h)[:, None] + (half + h)[None, :] - full
        change[(y == 0)[:, None] | (y == 1)[None, :] | (label[:, None] != label[None, :])] = np.inf
        i, j = np.unravel_index(int(np.argmin(change)), change.shape)
        if not change[i, j] < -gain:
            return made
        y[i], y[j] = 0, 1
        h += full[j] - full[i]
    return limit
