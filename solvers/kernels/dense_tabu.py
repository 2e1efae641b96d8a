"""Tabu search on one small dense selection problem.

A step tries the six best drops, each with its best partner, which suits the small components that trees solve.
`selection_numba.tabu_swaps`, for cores of many blocks, drops one weight and then adds the cheapest of its group.
"""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.kernels.dense_numba import entry


@entry
def tabu(Q, c, group, y, iterations, tenure, state, best_y):
    """Drop/add moves within a group, each time the best that is not tabu; the best value, the point in best_y."""
    n = Q.shape[0]
    g = c.copy()
    f = 0.0
    for i in range(n):
        if y[i]:
            for k in range(n):
                g[k] += Q[i, k]
    for i in range(n):
        if y[i]:
            f += 0.5 * (g[i] + c[i])
    best = f
    for k in range(n):
        best_y[k] = y[k]
    until = np.zeros(n, np.int64)
    stall = 0
    for it in range(1, iterations + 1):
        # candidates: the few best to drop, each with its best partner
        bi = -1
        bj = -1
        bd = np.inf
        cut = np.inf
        for trial in range(6):
            i = -1
            di = np.inf
            for k in range(n):
                if y[k] == 1 and until[k] < it:
                    t = -g[k] + 0.5 * Q[k, k]
                    if t < di and (trial == 0 or t > cut):
                        di = t
                        i = k
            if i < 0:
                break
            cut = di
            Qi = Q[i]
            for k in range(n):
                if y[k] == 0 and group[k] == group[i] and until[k] < it:
                    t = di + g[k] + 0.5 * Q[k, k] - Qi[k]
                    if t < bd:
                        bd = t
                        bi = i
                        bj = k
        if bi < 0:
            break
        y[bi] = 0
        y[bj] = 1
        f += bd
        for k in range(n):
            g[k] += Q[bj, k] - Q[bi, k]
        state = (state * 48271) % 2147483647
        until[bi] = it + tenure + state % (tenure + 1)
        until[bj] = it + tenure // 2 + (state // 64) % (tenure + 1)
        if f < best - 1e-12 * abs(best):
            best = f
            for k in range(n):
                best_y[k] = y[k]
            stall = 0
        else:
            stall += 1
            if stall > 60 + 2 * n:
                break
    return best
