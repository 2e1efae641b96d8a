"""Best value and selection for every number of pruned weights of a small block, by enumeration of its subsets."""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.kernels.dense_numba import entry

MAX_WEIGHTS = 18
"""Up to here enumeration is faster than branch and bound for every number."""


@entry
def all_subsets(A, v, joint):
    """Best value, float64 (n+1,), and code, int64 (n+1,), bit i for pruned, per number pruned.

    Parameters
    ----------
    A : float64 (n, n)
        H⁻¹ where `joint`, else Q.
    v : float64 (n,)
        Weights where `joint`, for ½ v_Pᵀ(A_PP)⁻¹v_P; else c, for ½ yᵀQy + cᵀy.
    joint : bool

    Notes
    -----
    Weights are decided from the last to the first, so that a node at which m are left costs O(m²): about 6·2ⁿ
    operations in all.
    """
    n = v.size
    best = np.empty(n + 1)
    code = np.zeros(n + 1, np.int64)
    As = np.empty((n + 1, n, n))
    vs = np.empty((n + 1, n))
    f = np.zeros(n + 1)
    bits = np.zeros(n + 1, np.int64)
    number = np.zeros(n + 1, np.int64)
    state = np.zeros(n + 1, np.int64)
    for i in range(n):
        for j in range(n):
            As[n, i, j] = A[i, j]
        vs[n, i] = v[i]
    for i in range(n + 1):
        best[i] = np.inf
    m = n
    while m <= n:
        if m == 0:
            k = number[0]
            if f[0] < best[k]:
                best[k] = f[0]
                code[k] = bits[0]
            m = 1
            if n == 0:
                break
            continue
        s = state[m]
        state[m] = s + 1
        if s == 2:
            m += 1
            continue
        i = m - 1
        f[i] = f[m]
        bits[i] = bits[m]
        number[i] = number[m]
        d = As[m, i, i]
        if s == 1:
            f[i] += 0.5 * vs[m, i] * vs[m, i] / d if joint else 0.5 * d + vs[m, i]
            bits[i] |= 1 << i
            number[i] += 1
        for a in range(i):
            vs[i, a] = vs[m, a]
            t = 0.0
            if s == 1:
                if joint:
                    t = As[m, i, a] / d
                    vs[i, a] -= t * vs[m, i]
                else:
                    vs[i, a] += As[m, i, a]
            for b in range(i):
                As[i, a, b] = As[m, a, b] - t * As[m, i, b]
        state[i] = 0
        m = i
    return best, code
