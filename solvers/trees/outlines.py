"""Bounds and selections for every number to prune of a component, from one relaxed point."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cbs_opt.solvers.kernels.joint_numba import eliminate
from cbs_opt.solvers.kernels.stop_flag import NEVER
from cbs_opt.solvers.trees.best_first import Subproblem
from cbs_opt.solvers.trees.joint_diagonal import safe_diagonal
from cbs_opt.solvers.trees.joint_worker import DenseJoint, JointWorker
from cbs_opt.solvers.trees.selection_worker import DenseSelection, SelectionWorker
from cbs_opt.typing import FloatArray, Int8Array, IntArray

_ROUNDING = 1e-13  # of the terms of a bound, which are summed in float64
_SLACK = 1e-5  # relative, of values that are summed up step by step


class Outline(NamedTuple):
    """Bounds for 0 … n pruned.

    Attributes
    ----------
    lower, upper : float64 (n+1,)
    order : int64 (n,)
        Pruning its first j weights costs `upper[j]`.
    """

    lower: FloatArray
    upper: FloatArray
    order: IntArray


def selection_outline(Q: FloatArray, c: FloatArray, count: int, stop: Int8Array = NEVER) -> Outline:
    """The outline of ½ yᵀQy + cᵀy from the box relaxation with Σy = count.

    For any x, ½ yᵀQy + cᵀy ≥ hᵀy − ½ xᵀQx with h = Qx + c, which is least at the smallest entries of h.
    The selections are the prefixes of the weights ordered by x. O(n²) plus the relaxation.
    """
    n = c.size
    problem = DenseSelection(Q, c, np.zeros(n, np.int64), np.array([count]))
    start = np.zeros(n)
    start[np.argsort(0.5 * np.diag(Q) + c, kind="stable")[:count]] = 1.0
    value = float(0.5 * start @ Q @ start + c @ start)
    problem.rescale(max(abs(value), 1e-12 * float(np.abs(c).max() + np.diag(Q).max()), 1e-290))
    worker = SelectionWorker(problem, 0.0, 0.0, np.array([np.sign(value) if value else 1.0]), stop)
    worker.load(Subproblem(-np.inf, np.full(n, -1, np.int8), None, None))
    more = worker.run(1)
    x = worker.root_point() if more else np.where(np.isfinite(worker.best[0]), worker.selection, start)
    Qx = Q @ x
    h = Qx + c
    terms = 0.5 * float(np.abs(x) @ np.abs(Qx)) + np.concatenate([[0.0], np.cumsum(np.sort(np.abs(h))[::-1])])
    lower = np.concatenate([[0.0], np.cumsum(np.sort(h))]) - 0.5 * float(x @ Qx) - _ROUNDING * n * terms
    order = np.lexsort((h, -x))
    P = Q[np.ix_(order, order)]
    steps = 0.5 * np.diag(P) + c[order] + np.tril(P, -1).sum(1)
    return Outline(lower, np.concatenate([[0.0], np.cumsum(steps)]), order)


def joint_bounds(
    A: FloatArray, H: FloatArray, w: FloatArray, d: FloatArray, count: int, upper: float, stop: Int8Array = NEVER
) -> FloatArray:
    """Lower bounds on ½ w_Pᵀ(A_PP)⁻¹w_P, float64 (n+1,), from the perspective relaxation with `count` pruned.

    With R = H − diag(d) ⪰ 0, p = u − w at any u and s = Rp, ½ δᵀHδ ≥ sᵀδ − ½ pᵀRp + ½ δᵀDδ: a kept weight gives
    −s²/2d, and to prune it (δ = −w) costs ½ d (w − s/d)² more.

    Parameters
    ----------
    d : float64 (n,)
        As `outline_diagonal` gives it.
    upper : float
        A value that some selection has.
    """
    n = w.size
    s = 1 / np.sqrt(np.diag(A))
    scale = upper if 0 < upper < np.inf else 1.0
    problem = DenseJoint(A * s[:, None] * s, w * s / np.sqrt(scale), np.zeros(n, np.int64), np.array([n - count]))
    worker = JointWorker(problem, 0.0, 0.0, np.array([np.inf if scale == 1.0 else 1.0]), stop)
    worker.load(Subproblem(0.0, np.full(n, -1, np.int8), None, None))
    worker.run(1)
    u = worker.relaxed_point() * np.sqrt(scale) / s
    p = u - w
    R = H - np.diag(d)
    slope = R @ p
    half = 0.5 * slope**2 / d
    price = np.sort(0.5 * d * (w - slope / d) ** 2)
    lost = float(np.abs(p) @ np.abs(R) @ np.abs(p) + half.sum() + price.sum())
    base = -0.5 * float(p @ slope) - float(half.sum()) - _ROUNDING * n * lost
    return np.asarray(base + np.concatenate([[0.0], np.cumsum(price)]))


def outline_diagonal(A: FloatArray) -> FloatArray:
    """Diagonal d > 0, float64 (n,), with diag(d) ≼ A⁻¹, a little less than the largest multiple of 1/A_ii."""
    return (1 - 1e-6) * safe_diagonal(A)


def eliminated(A: FloatArray, H: FloatArray, w: FloatArray) -> tuple[FloatArray, IntArray]:
    """Values of pruning the first 0 … n weights, and their order by greedy elimination; O(n³)."""
    n = w.size
    order, losses = np.arange(n), np.empty(n)
    values = np.concatenate([[0.0], np.full(n, np.inf)])
    taken = eliminate(
        A.copy(), np.empty((n, n)), 0, w.copy(), A.diagonal().copy(), np.ones(n, bool), -1, n, order, losses
    )
    if taken < n or not np.isfinite(losses).all() or (losses < 0).any():  # near singular
        order = np.arange(n)
    else:
        # Rounding gathers over the steps; the values are those of selections that are looked at again.
        values[1:] = 0.5 * np.cumsum(losses) * (1 + _SLACK)
    values[n] = 0.5 * float(w @ H @ w)
    return values, order
