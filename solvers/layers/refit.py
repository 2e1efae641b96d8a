"""Best values of the kept weights of many rows: factorisations for small layers, conjugate gradients for large ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.linalg import lapack

from cbs_opt.solvers.layers.problem import Layer
from cbs_opt.typing import BoolArray, FloatArray, RealArray


def refit_row(S: FloatArray, b: FloatArray, w: FloatArray, pruned: BoolArray) -> tuple[FloatArray, float]:
    """Minimiser of ½ (v − w)ᵀ S (v − w) over v that is zero where pruned, and its doubled loss.

    S : (K, K), b = S w, w, pruned : (K,). O(q³) for q kept weights. A small ridge is added where the factorisation
    fails, so that the answer is then feasible but not the best; its loss is the true one all the same.
    """
    kept = np.flatnonzero(~pruned)
    out = np.zeros(w.size)
    if kept.size:
        M = S[np.ix_(kept, kept)]
        ridge = 0.0
        for _ in range(12):
            _, x, info = lapack.dposv(M + ridge * np.eye(kept.size) if ridge else M, b[kept], lower=0)
            if info == 0 and np.isfinite(x).all():
                out[kept] = x
                break
            ridge = max(100.0 * ridge, 1e-14 * float(np.trace(M)) / kept.size, 1e-300)
    change = out - w
    return out, float(change @ (S @ change))


def refit_by_gradients(
    S: RealArray,
    W: RealArray,
    pruned: BoolArray,
    start: RealArray | None = None,
    iterations: int = 60,
    tolerance: float = 1e-10,
    should_stop: Callable[[], bool] = lambda: False,
) -> RealArray:
    """Preconditioned conjugate gradients on all rows at once, one product with S an iteration.

    S : (K, K), W, pruned : (rows, K), in one dtype. The preconditioner is diag(S). A row is left alone once its
    residual has fallen by `tolerance` (in energy, relative to the start). Never worse than the start.
    """
    kept = (~pruned).astype(W.dtype)
    inverse = 1.0 / np.maximum(np.diag(S), np.finfo(W.dtype).tiny)
    X = (W if start is None else start) * kept
    residual = ((W - X) @ S) * kept
    Z = residual * inverse
    direction = Z.copy()
    energy = np.einsum("rk,rk->r", residual, Z)
    goal = tolerance * energy
    for _ in range(iterations):
        active = energy > np.maximum(goal, np.finfo(W.dtype).tiny)
        if should_stop() or not active.any():
            break
        image = direction @ S
        bend = np.einsum("rk,rk->r", direction, image)
        step = np.where(active & (bend > 0), energy / np.where(bend > 0, bend, 1), 0).astype(W.dtype)
        X += step[:, None] * direction
        image *= kept
        residual -= step[:, None] * image
        np.multiply(residual, inverse, out=Z)
        new = np.einsum("rk,rk->r", residual, Z)
        direction *= np.where(active, new / np.where(energy > 0, energy, 1), 0).astype(W.dtype)[:, None]
        direction += Z
        energy = np.where(active, new, energy)
    return X


def refit_layer(layer: Layer, pruned: BoolArray, rows: range | None = None) -> FloatArray:
    """Exact refit of some rows, float64 (len(rows), K)."""
    rows = range(layer.rows) if rows is None else rows
    b = layer.weights[rows.start : rows.stop] @ layer.hessian
    return np.array(
        [refit_row(layer.hessian, b[i], layer.weights[r], pruned[r])[0] for i, r in enumerate(rows)]
    ).reshape(len(rows), layer.columns)
