"""Coordinate passes over the multipliers that make a relaxation tight: updates of rank one and two, O(n²) each."""

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.kernels.dense_numba import entry_fast, inner_fast

_HALVINGS = 12  # of the interval of a step: its length is known to some percent then


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


@inner_fast
def _product_slope(t, a, b, mu, h, k, e):
    """Derivative by t of the bound with barrier, and the determinant that has to stay positive.

    h, k, e: entries ii, jj, ij of W; a, b: x_i and x_j at t = 0.
    """
    s = 1.0 - t * e
    det = s * s - t * t * h * k
    if det <= 0.0 or s <= 0.0:
        return -np.inf, 0.0
    return -(s * a + t * h * b) * (s * b + t * k * a) / (det * det) - mu * (e * s + t * h * k) / det, det


@entry_fast
def product_pass(W, x, N, mu, tolerance, first, second):
    """One step in every N_ij ≥ 0, i ≠ j, whose slope is worth it; W and x, the minimiser, are kept up to date.

    R loses t at ij and ji. With a violated X_ij = x_i x_j + μ W_ij < 0 the bound rises with N_ij until X_ij = 0.
    Returns the number of steps.
    """
    n = W.shape[0]
    steps = 0
    for i in range(n):
        for j in range(i):
            a, b, e, held = x[i], x[j], W[i, j], N[i, j]
            slope = -a * b - mu * e
            if slope <= tolerance and (held == 0.0 or slope >= -tolerance):
                continue
            h, k = W[i, i], W[j, j]
            root = np.sqrt(h * k)
            low, high = 0.0, 1.0 / max(root + e, 1e-6 * root)
            if slope < 0.0:
                low, high = max(-held, -(1.0 - 1e-9) / max(root - e, 1e-6 * root)), 0.0
                if low == -held and _product_slope(low, a, b, mu, h, k, e)[0] <= 0.0:
                    high = low
            for _ in range(_HALVINGS):
                middle = 0.5 * (low + high)
                if _product_slope(middle, a, b, mu, h, k, e)[0] > 0.0:
                    low = middle
                else:
                    high = middle
            t = low if slope > 0.0 else high
            s = 1.0 - t * e
            det = s * s - t * t * h * k
            if t == 0.0 or not det > 0.0 or not s > 0.0:
                continue
            steps += 1
            N[i, j] = N[j, i] = max(held + t, 0.0)
            for m in range(n):
                first[m], second[m] = W[i, m], W[j, m]
            to_first, to_second = t * (s * b + t * k * a) / det, t * (s * a + t * h * b) / det
            ii, ij, jj = t * t * k / det, t * s / det, t * t * h / det
            for m in range(n):
                x[m] += to_first * first[m] + to_second * second[m]
            for m in range(n):
                p, q = ii * first[m] + ij * second[m], ij * first[m] + jj * second[m]
                Wm = W[m]
                for r in range(n):
                    Wm[r] += p * first[r] + q * second[r]
    return steps
