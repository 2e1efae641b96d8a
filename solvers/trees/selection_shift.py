"""Shift of a binary quadratic problem with fixed group sums, close to its doubly nonnegative bound.

For binary x, ½ xᵀQx + cᵀx = ½ xᵀ(Q − D − N)x + (c + d/2)ᵀx + ½ xᵀNx with D = diag(d), and ½ xᵀNx ≥ 0 if N ≥ 0.
Maximises over d and N the minimum over Σ x = r plus μ/2 times the log determinant of Q − D − N where all group
sums are zero, by coordinate steps of O(n²) each (in d after Dong, SIAM J. Optim. 26, 2016), through W, the
inverse there. This is the dual of the semidefinite relaxation with X ≥ 0 and the products of each x_i with the
group sums.

Trees call it for thousands of subproblems, where a rough shift does; `mip.selection_outer.optimal_shift`, called
once a component, converges by Newton steps.
"""

from __future__ import annotations

import itertools

import numpy as np

from cbs_opt.interrupt import Interrupted, checkpoint
from cbs_opt.solvers.kernels.diagonal_passes import product_pass, selection_pass
from cbs_opt.solvers.kernels.stop_flag import NEVER
from cbs_opt.solvers.trees.best_first import Shift
from cbs_opt.typing import FloatArray, Int8Array, IntArray

_LARGEST = 500  # variables up to which products are fitted: seconds there
_STEPS_OF_NODE = 12  # coordinate steps that take as long as a node
_PRODUCT_STEPS = 1 / 80  # of a pass, over the square of the variables
_SLOPE = 0.02  # worth a step, in units of the square of the share of ones
_COLD, _WARM = (0.3, 0.85, 40), (0.05, 0.8, 6)  # first μ in units of scale / n, its decay, passes
_DIAGONAL = (0.3, 0.6, 12)  # the same without products
_REFRESH = 5  # passes after which W is computed afresh


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


def cost_of_shift(n: int, with_products: bool, warm: bool) -> float:
    """Nodes that take about as long as `best_shift` for n variables."""
    if not with_products or n > _LARGEST:
        return _DIAGONAL[2] * n / _STEPS_OF_NODE
    return (_WARM if warm else _COLD)[2] * (n + _PRODUCT_STEPS * n**2) / _STEPS_OF_NODE


def best_shift(
    Q: FloatArray,
    c: FloatArray,
    gp: IntArray,
    r: IntArray,
    with_products: bool = True,
    scale: float = 1.0,
    rel: float = 5e-2,
    floor: float = 1e-9,
    before: tuple[FloatArray, FloatArray] | None = None,
    stop: Int8Array = NEVER,
) -> Shift | None:
    """Multipliers d, N ≥ 0 with Q − diag(d) − N positive definite where all group sums are zero.

    Parameters
    ----------
    Q, c : float64 (n, n), (n,)
    gp : int64 (G+1,)
        Group a is the range gp[a] … gp[a+1].
    r : int64 (G,)
        Ones wanted per group.
    with_products : bool
        Whether N may be other than zero, which takes up to `_LARGEST` variables.
    scale : float
        Size of the objective.
    rel, floor : float
        Smallest μ, and smallest lift of the diagonal, in units of scale / n.
    before : tuple of float64 (n,) and (n, n), optional
        d and N of a larger problem on these variables, to start from.
    stop : int8 (1,)
        See `kernels.stop_flag`.

    Returns
    -------
    Shift or None
        None where no shift was found.

    Raises
    ------
    Interrupted
        When the run is told to stop, or `stop` is set.

    Notes
    -----
    Up to 40 passes of n steps in d and one in each N_ij that is worth it, O(n²) each; a few from `before`.
    """
    n = len(Q)
    # never worse than this at the root, and it makes low rank regular
    lift = np.maximum(1e-6 * np.diag(Q), floor * scale / n)
    with_products = with_products and n <= _LARGEST
    if before is not None and with_products:
        d, N = before[0] - lift, before[1].copy()
        first_mu, decay, passes = _WARM
    else:
        d, N = -lift, np.zeros((n, n))
        first_mu, decay, passes = _COLD if with_products else _DIAGONAL
    fill = r / np.maximum(np.diff(gp), 1)
    centre = np.repeat(fill, np.diff(gp))
    mu, worth = first_mu * scale / n, _SLOPE * float(fill.mean()) ** 2
    columns = np.empty((2, n))
    for k in range(passes):
        checkpoint()
        if stop[0]:
            raise Interrupted
        if k % _REFRESH == 0:
            W = inverse_on_complement(Q - np.diag(d) - N, gp)
            if W is None:
                return None
            x = centre - W @ (Q @ centre - d * centre - N @ centre + c + d / 2)
        selection_pass(W, x, d, mu, columns[0])
        if with_products:
            product_pass(W, x, N, mu, worth, columns[0], columns[1])
        mu = max(rel * scale / n, decay * mu)
    # certificate: Cholesky with a margin
    for back in (1e-9, 1e-6, 1e-4, 1e-2, 1e-1):
        t = d - back * np.maximum(np.abs(d), lift)
        if inverse_on_complement(Q - np.diag(t) - N, gp) is not None:
            at, to = np.nonzero(np.tril(N))
            return Shift(t - 1e-12 * np.diag(Q), at.astype(np.int32), to.astype(np.int32), N[at, to])
    return None
