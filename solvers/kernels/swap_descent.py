"""Best swaps on a core, over all pairs of it; the layout of a core is that of `selection_numba`."""

from __future__ import annotations

from typing import Any

import numpy as np

from cbs_opt.solvers.kernels.compilation import entry, inner
from cbs_opt.solvers.kernels.selection_numba import cells_of_groups, row_of, smaller


@inner
def _partner(add: Any, row: Any) -> Any:
    """The least add - row and its first index."""
    m = np.inf
    for k in range(len(add)):
        m = smaller(add[k] - row[k], m)
    k = 0
    while k < len(add) - 1 and add[k] - row[k] != m:
        k += 1
    return m, k


@entry
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
    """Make the best swap within a group, over all pairs, while it gains more than `gain`; returns the swaps made.

    y (int8) and h (gradient) change in place. O(c²) for each swap on a core of c variables.
    """
    n_cells = len(cell_group)
    cell_block, group_start, group_cells = cells_of_groups(block_cell, cell_group, n_groups)
    add = np.empty(len(y))
    low = np.empty(n_cells)
    cheapest = np.empty(n_cells, np.int64)
    for made in range(limit):
        for c in range(n_cells):
            low[c] = np.inf
            cheapest[c] = -1
            for k in range(cell_start[c], cell_start[c + 1]):
                add[k] = half[k] + h[k] if y[k] == 0 else np.inf
                if add[k] < low[c]:
                    low[c] = add[k]
                    cheapest[c] = k
        best = -gain
        out = -1
        into = -1
        for c in range(n_cells):
            b = cell_block[c]
            first = cell_start[c]
            last = cell_start[c + 1]
            elsewhere = np.inf  # the cheapest addition to the same group in another block
            where = -1
            for other in group_cells[group_start[cell_group[c]] : group_start[cell_group[c] + 1]]:
                if cell_block[other] != b and low[other] < elsewhere:
                    elsewhere = low[other]
                    where = cheapest[other]
            for i in range(first, last):
                if y[i] == 0:
                    continue
                drop = half[i] - h[i]
                if drop + elsewhere < best:
                    best = drop + elsewhere
                    out = i
                    into = where
                if cheapest[c] < 0:
                    continue
                row = row_of(q, q_start, block_start, b, i)
                o = block_start[b]
                m, k = _partner(add[first:last], row[first - o : last - o])
                if drop + m < best:
                    best = drop + m
                    out = i
                    into = first + k
        if out < 0:
            return made
        y[out] = 0
        y[into] = 1
        for k, sign in ((out, -1.0), (into, 1.0)):
            b = 0
            while block_start[b + 1] <= k:
                b += 1
            row = row_of(q, q_start, block_start, b, k)
            part = h[block_start[b] : block_start[b + 1]]
            for t in range(len(part)):
                part[t] += sign * row[t]
    return limit
