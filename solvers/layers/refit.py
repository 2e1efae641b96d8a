"""Best values of the kept weights of many rows: by factorisations, or by conjugate gradients in large layers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.linalg import lapack

from cbs_opt.curvature.row_updates import ROW_OVERHEAD, factored_rows, long_rows, refit_by_gradients, update_rows
from cbs_opt.solvers.layers.problem import Layer, row_losses
from cbs_opt.typing import BoolArray, FloatArray, IntArray

_ROW_COST, _LITTLE = 4e6, 8e9  # operations: overhead of a row; what is done exactly at any rate
_LONG_REFIT = 150  # products of a long row with S, from its original weights
_FACTOR_COST = 8.0  # an operation of a small factorisation relative to one of a large float32 product


def refit_row(S: FloatArray, b: FloatArray, w: FloatArray, pruned: BoolArray) -> tuple[FloatArray, float]:
    """Minimiser of ½ (v − w)ᵀ S (v − w) over v that is zero where pruned, and its doubled loss.

    S : (K, K), b = S w, w, pruned : (K,). O(q³) for q kept weights. A small ridge is added where the factorisation
    fails, so that the answer is then feasible but not the best; its loss is the true one all the same.
    """
    out = _solve(S, b, np.flatnonzero(~pruned))
    change = out - w
    return out, float(change @ (S @ change))


def _solve(S: FloatArray, b: FloatArray, kept: IntArray) -> FloatArray:
    """X with S_QQ x_Q = b_Q on the kept weights Q and zeros elsewhere."""
    out = np.zeros(b.size)
    if kept.size:
        M = S[kept[:, None], kept]
        ridge = 0.0
        for _ in range(12):
            _, x, info = lapack.dposv(M + ridge * np.eye(kept.size) if ridge else M, b[kept], lower=0)
            if info == 0 and np.isfinite(x).all():
                out[kept] = x
                break
            ridge = max(100.0 * ridge, 1e-14 * float(np.trace(M)) / kept.size, 1e-300)
    return out


def refit_layer(layer: Layer, pruned: BoolArray, start: FloatArray | None = None) -> FloatArray:
    """Exact refit of all rows, float64 (rows, K): by factorisations, or by gradients where rows are long.

    start : float (rows, K), optional, weights near the best ones, for long rows.
    """
    long, out = long_rows(pruned, start is not None), np.empty_like(layer.weights)
    for method, chosen in ((update_rows, long), (factored_rows, ~long)):
        if (index := np.flatnonzero(chosen)).size:
            begin = None if start is None else start[index]
            found = method(layer.hessian, layer.weights[index], pruned[index], start=begin)
            out[index] = found.weights
            for r in index[found.failed].tolist():
                out[r] = refit_row(layer.hessian, layer.weights[r] @ layer.hessian, layer.weights[r], pruned[r])[0]
    return out


def seconds_of_refit(layers: list[Layer], masks: list[BoolArray], clock: Callable[[], float]) -> float:
    """Seconds that an exact refit of all rows takes, about: two rows of the most expensive layer are timed."""
    works = []
    for layer, mask in zip(layers, masks, strict=True):
        q, K = (~mask).sum(1).astype(np.float64), float(layer.columns)
        works.append(np.where(long_rows(mask), _LONG_REFIT * K**2, q**3 / 3 + q**2 + K**2 + ROW_OVERHEAD))
    k = int(np.argmax([work.sum() for work in works]))
    layer, rows = layers[k], np.argsort(-works[k])[:2]
    part = Layer(layer.weights[rows], layer.hessian, layer.scale[rows])
    began = clock()
    refit_layer(part, masks[k][rows])
    seconds = clock() - began
    return seconds * float(sum(work.sum() for work in works)) / float(works[k][rows].sum() + layer.columns**2)


def brief_refit(layer: Layer, pruned: BoolArray, start: FloatArray, iterations: int) -> float:
    """Loss of a layer after a few conjugate gradients in float32 from given weights, (rows, K).

    The loss of the weights found is exact in float64.
    """
    S, W = layer.hessian.astype(np.float32), layer.weights.astype(np.float32)
    found = refit_by_gradients(S, W, pruned, start.astype(np.float32), iterations, 1e-9)
    return float(row_losses(layer, np.where(pruned, 0.0, found.astype(np.float64))).sum())


def quick_refit(
    layer: Layer,
    pruned: BoolArray,
    start: FloatArray | None = None,
    iterations: int = 30,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[FloatArray, bool]:
    """Losses of the rows, (rows,), by an exact refit or by conjugate gradients in float32, whichever is faster.

    Also returns whether the refit was exact. The losses are those of the weights found, in float64, so that they
    are never below the true joint losses by more than rounding. start : float64 (rows, K), weights to start from.
    """
    q, K = float((~pruned).sum(1).mean()), layer.columns
    factor = layer.rows * (q**3 / 3 * _FACTOR_COST + _ROW_COST)
    if factor < max(iterations * layer.rows * 2 * K**2, _LITTLE):
        return row_losses(layer, refit_layer(layer, pruned)), True
    S, W = layer.hessian.astype(np.float32), layer.weights.astype(np.float32)
    first = None if start is None else start.astype(np.float32)
    found = refit_by_gradients(S, W, pruned, first, iterations, 1e-7, should_stop)
    return row_losses(layer, np.where(pruned, 0.0, found.astype(np.float64))), False
