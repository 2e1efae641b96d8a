"""A good first selection for small problems: drop/add tabu search from a few points."""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.kernels.dense_tabu import tabu
from cbs_opt.typing import FloatArray, Int8Array, IntArray


def take_smallest(key: FloatArray, gp: IntArray, r: IntArray) -> Int8Array:
    """int8 (n,): ones at the r[a] smallest keys of each group gp[a] … gp[a+1]."""
    y = np.zeros(key.size, np.int8)
    for a in range(r.size):
        y[gp[a] + np.argsort(key[gp[a] : gp[a + 1]], kind="stable")[: r[a]]] = 1
    return y


def improve(Q: FloatArray, c: FloatArray, group: IntArray, y: Int8Array, seed: int) -> tuple[Int8Array, float]:
    """Tabu search from y, int8 (n,); the best selection and its value ½ yᵀQy + cᵀy."""
    n = c.size
    out = np.empty(n, np.int8)
    value = tabu(Q, c, group, y.copy(), 50 + 4 * n, min(8, max(1, n // 8)), 12345 + seed, out)
    return out, float(value)
