"""A good first selection for small joint problems: backward elimination and swap descent on one tableau.

`joint_numba.eliminate` only removes, by rank-one terms that it applies late; here the swaps that follow need the
tableau of all weights, kept and pruned, after every step.
"""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.kernels.dense_numba import entry, inner


@inner
def pivot(T, k):
    """Gauss-Jordan exchange: add k to the kept set or take it out."""
    n = T.shape[0]
    D = T[k, k]
    for j in range(T.shape[1]):
        if j != k:
            T[k, j] /= D
    for i in range(n):
        if i != k:
            B = T[i, k]
            for j in range(T.shape[1]):
                if j != k:
                    T[i, j] -= B * T[k, j]
            T[i, k] = -B / D
    T[k, k] = 1.0 / D


@entry
def eliminate(H, b, kept, group, target, stop):
    """Backward elimination to `target` kept weights of each group, then swaps while they gain; changes `kept`.

    The loss is ½ uᵀHu − bᵀu and a constant, over u with support `kept`, int8 (n,). Returns False where stop[0] was
    set before the target was met.
    """
    n = H.shape[0]
    T = np.empty((n, n + 1))
    for i in range(n):
        for j in range(n):
            T[i, j] = H[i, j]
        T[i, n] = b[i]
    excess = np.empty_like(target)
    for a in range(target.size):
        excess[a] = -target[a]
    for i in range(n):
        if kept[i]:
            if stop[0] != 0:
                return False
            pivot(T, i)
            excess[group[i]] += 1
    for _ in range(n):
        best = np.inf
        at = np.int64(-1)
        for j in range(n):
            if kept[j] and excess[group[j]] > 0:
                t = T[j, n] * T[j, n] / T[j, j]
                if t < best:
                    best = t
                    at = j
        if at < 0:
            break
        if stop[0] != 0:
            return False
        pivot(T, at)
        kept[at] = 0
        excess[group[at]] -= 1
    for _ in range(10 * n):
        best = 0.0
        bi = np.int64(-1)
        bj = np.int64(-1)
        for j in range(n):
            if kept[j]:
                tj = T[j, j]
                out = 0.5 * T[j, n] * T[j, n] / tj
                for i in range(n):
                    if not kept[i] and group[i] == group[j]:
                        r = T[i, n] - T[i, j] * T[j, n] / tj
                        p = T[i, i] + T[i, j] * T[i, j] / tj
                        gain = out - 0.5 * r * r / p
                        if gain < best and gain < -1e-12 * out:
                            best = gain
                            bi = i
                            bj = j
        if bi < 0 or stop[0] != 0:
            break
        pivot(T, bj)
        pivot(T, bi)
        kept[bj] = 0
        kept[bi] = 1
    return True
