"""The cheapest entries of small matrices with given numbers in their rows and columns; for `Budget.cheapest`."""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.kernels.compilation import entry


@entry
def cheapest_entries(costs, rows, columns, locked, chosen):
    """Choose entries of least total cost in every tile, with given numbers in its rows and columns.

    A minimum-cost flow by successive shortest paths. It starts from the cheapest entries of every row, which is
    optimal without the columns, and moves one entry at a time from columns that have too many to columns that have
    too few, by Dijkstra's algorithm on reduced costs. The sum of the excess of all columns is the number of paths.

    Parameters
    ----------
    costs : float64 (T, a, b)
        Finite.
    rows, columns : int64 (T, a), (T, b)
        Numbers of entries to choose; their sums over a tile are equal.
    locked : int8 (T, a, b)
        1 must be chosen, −1 must not be, 0 undecided.
    chosen : uint8 (T, a, b), out

    Returns
    -------
    int
        The first tile without a choice, −1 where there is none; O((a + b)² + a b) time for every path.
    """
    T, a, b = costs.shape
    infinite = np.inf
    u, v = np.empty(a), np.empty(b)
    of_row, of_column = np.empty(a), np.empty(b)  # distances
    by_column, by_row = np.empty(a, np.int64), np.empty(b, np.int64)  # the nodes before, on the shortest path
    row_done, column_done = np.empty(a, np.bool_), np.empty(b, np.bool_)
    excess = np.empty(b, np.int64)
    for tile in range(T):
        c, x, lock = costs[tile], chosen[tile], locked[tile]
        for j in range(b):
            excess[j] = -columns[tile, j]
            v[j] = 0.0
        for i in range(a):
            left = rows[tile, i]
            for j in range(b):
                x[i, j] = 0
                if lock[i, j] > 0:
                    x[i, j] = 1
                    left -= 1
                    excess[j] += 1
            if left < 0:
                return tile
            u[i] = -infinite
            for _ in range(left):
                best = -1
                for j in range(b):
                    if lock[i, j] == 0 and x[i, j] == 0 and (best < 0 or c[i, j] < c[i, best]):
                        best = j
                if best < 0:
                    return tile
                x[i, best] = 1
                excess[best] += 1
                u[i] = c[i, best]
            if left == 0:
                u[i] = infinite
                for j in range(b):
                    if lock[i, j] == 0:
                        u[i] = min(u[i], c[i, j])
                if u[i] == infinite:
                    u[i] = 0.0
        while True:
            source = False
            for j in range(b):
                column_done[j] = False
                by_row[j] = -1
                of_column[j] = infinite
                if excess[j] > 0:
                    of_column[j] = 0.0
                    source = True
            if not source:
                break
            for i in range(a):
                row_done[i] = False
                by_column[i] = -1
                of_row[i] = infinite
            target, length = -1, 0.0
            while True:
                nearest, node, is_row = infinite, -1, False
                for j in range(b):
                    if not column_done[j] and of_column[j] < nearest:
                        nearest, node, is_row = of_column[j], j, False
                for i in range(a):
                    if not row_done[i] and of_row[i] < nearest:
                        nearest, node, is_row = of_row[i], i, True
                if node < 0:
                    break
                if is_row:
                    row_done[node] = True
                    for j in range(b):
                        if not column_done[j] and lock[node, j] == 0 and x[node, j] == 0:
                            d = nearest + max(c[node, j] - u[node] - v[j], 0.0)
                            if d < of_column[j]:
                                of_column[j] = d
                                by_row[j] = node
                else:
                    if excess[node] < 0:
                        target, length = node, nearest
                        break
                    column_done[node] = True
                    for i in range(a):
                        if not row_done[i] and lock[i, node] == 0 and x[i, node] == 1:
                            d = nearest + max(u[i] + v[node] - c[i, node], 0.0)
                            if d < of_row[i]:
                                of_row[i] = d
                                by_column[i] = node
            if target < 0:
                return tile
            for j in range(b):
                v[j] += min(of_column[j], length)
            for i in range(a):
                u[i] -= min(of_row[i], length)
            excess[target] += 1
            j = target
            while by_row[j] >= 0:
                i = by_row[j]
                x[i, j] = 1
                j = by_column[i]
                x[i, j] = 0
            excess[j] -= 1
    return -1
