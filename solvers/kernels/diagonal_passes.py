"""Coordinate passes over the diagonal that makes a relaxation tight: O(n³) each, one rank-one update a step."""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.kernels.dense_numba import entry_fast


@entry_fast
def selection_pass(W, x, d, mu, col):
    """One exact step in every d_i; W and x, the minimiser, are kept up to date."""
    n = W.shape[0]
    for i in range(n):
        h = W[i, i]
        if not h > 0.0:
            continue
        y = (x[i] - 0.5) ** 2
        a = 0.5 / (mu * h + np.sqrt(mu * mu * h * h + y))
        a = min(max(a, 0.02), 50.0)
        if abs(a - 1.0) < 1e-3:
            continue
        s = (a - 1.0) / h
        d[i] += s / a
        for k in range(n):
            col[k] = W[i, k]
        t = s * (x[i] - 0.5)
        for k in range(n):
            x[k] += t * col[k]
        for k in range(n):
            f = s * col[k]
            Wk = W[k]
            for j in range(n):
                Wk[j] += f * col[j]
