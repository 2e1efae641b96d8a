"""Multiple-choice knapsack with an equality budget, by dynamic programming."""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.kernels.dense_numba import entry


@entry
def cheapest_entries(values, start, count, budget, choice):
    """Least sum of one value per table whose positions sum to `budget`; choice is int32 (K, budget+1).

    Table k is values[start[k] : start[k] + count[k]]. Returns the value and the positions, int64 (K,).
    """
    K = start.size
    D = np.empty(budget + 1)
    E = np.empty(budget + 1)
    for t in range(budget + 1):
        D[t] = np.inf
        E[t] = np.inf
    D[0] = 0.0
    reach = 0
    for k in range(K):
        top = min(budget, reach + count[k] - 1)
        for t in range(top + 1):
            best = np.inf
            at = 0
            for j in range(max(0, t - reach), min(count[k], t + 1)):
                v = D[t - j] + values[start[k] + j]
                if v < best:
                    best = v
                    at = j
            E[t] = best
            choice[k, t] = at
        for t in range(top + 1):
            D[t] = E[t]
        reach = top
    path = np.zeros(K, np.int64)
    t = budget
    if t > reach or D[t] == np.inf:
        return np.inf, path
    v = D[t]
    for k in range(K - 1, -1, -1):
        path[k] = choice[k, t]
        t -= choice[k, t]
    return v, path
