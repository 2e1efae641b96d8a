"""Diagonal shift of a binary quadratic problem with fixed group sums, close to its semidefinite bound.

For binary x, ½ xᵀQx + cᵀx = ½ xᵀ(Q − D)x + (c + d/2)ᵀx with D = diag(d). Maximises over d the minimum over
Σ x = r plus μ/2 times the log determinant of Q − D where all group sums are zero, by exact coordinate steps of
O(n²) each (after Dong, SIAM J. Optim. 26, 2016), through W, the inverse there.

Trees call it for thousands of subproblems, where a rough shift does; `mip.selection_outer.optimal_shift`, called
once a component, converges by Newton steps.
"""

from __future__ import annotations

import itertools

import numpy as np

from cbs_opt.solvers.kernels.diagonal_passes import selection_pass
from cbs_opt.typing import FloatArray, IntArray


def inverse_on_complement(M: FloatArray, gp: IntArray) -> FloatArray | None:
    """Inverse of M on {Σ of every group = 0}, float64 (n, n), or None where M is not positive definite there."""
    n = len(M)
    dg = np.diag(M)
    ref = np.empty(n, np.int64)
    keep = np.ones(n, bool)
    for a, b in itertools.pairwise(gp):
        if b > a:
            o = a + int(np.argmin(dg[a:b]))
            ref[a:b] = o
            keep[o] = False
    k = np.flatnonzero(keep)
    W = np.zeros((n, n))
    if k.size == 0:
        return W
    o = ref[k]
    P = M[k] - M[o]
    R = P[:, k] - P[:, o]
    diag = np.diag(R)
    if not diag.min() > 0:
        return None
    s = 1 / np.sqrt(diag)
    try:
        L = np.linalg.cholesky(R * s[:, None] * s)
    except np.linalg.LinAlgError:
        return None
    Li = np.linalg.solve(L, np.diag(s))
    E = np.zeros((k.size, n))
    E[np.arange(k.size), k] = 1
    np.subtract.at(E, (np.arange(k.size), o), 1)
    T = Li @ E
    return np.asarray(T.T @ T)


def best_shift(
    Q: FloatArray,
    c: FloatArray,
    gp: IntArray,
    r: IntArray,
    scale: float = 1.0,
    passes: int = 12,
    rel: float = 1e-2,
    floor: float = 1e-9,
) -> FloatArray | None:
    """Float64 (n,) d with Q − diag(d) positive definite where all group sums are zero; None where none was found.

    Parameters
    ----------
    Q, c : float64 (n, n), (n,)
    gp : int64 (G+1,)
        Group a is the range gp[a] … gp[a+1].
    r : int64 (G,)
        Ones wanted per group.
    scale : float
        Size of the objective.
    passes : int
        Passes of coordinate steps, O(n³) each; μ falls from 0.3 scale / n to rel · scale / n.
    rel, floor : float
        Smallest μ, and smallest lift of the diagonal, in units of scale / n.
    """
    n = len(Q)
    # never worse than this at the root, and it makes low rank regular
    lift = np.maximum(1e-6 * np.diag(Q), floor * scale / n)
    d = -lift
    W = inverse_on_complement(Q + np.diag(lift), gp)
    if W is None:
        return None
    x = np.repeat(r / np.maximum(np.diff(gp), 1), np.diff(gp))
    x = x - W @ (Q @ x - d * x + c + d / 2)
    mu, col = 0.3 * scale / n, np.empty(n)
    for _ in range(passes):
        selection_pass(W, x, d, mu, col)
        mu = max(rel * scale / n, 0.6 * mu)
    # certificate: Cholesky with a margin
    for back in (1e-9, 1e-6, 1e-4, 1e-2, 1e-1):
        t = d - back * np.maximum(np.abs(d), lift)
        if inverse_on_complement(Q - np.diag(t), gp) is not None:
            return np.asarray(t - 1e-12 * np.diag(Q))
    return None
