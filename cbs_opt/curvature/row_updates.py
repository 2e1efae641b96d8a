"""Best updates of many long rows that share one Hessian, by conjugate gradients.

Room: the core; used by `SharedBlocks` and by `solvers.layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbs_opt.interrupt import checkpoint
from cbs_opt.typing import BoolArray, FloatArray, IntArray

_ROWS = 256  # that go through one product together
_INNER = 60  # iterations in single precision between two residuals in double precision
_INNER_TOLERANCE = 1e-8  # of the energy of the residual
_TOLERANCE = 1e-16  # of that energy against its start, in the end
_CORRECTIONS = 5
_WORTH = 8.0  # rows of more than this times K^(2/3) kept weights are cheaper by gradients than by a factorisation
_LONG = 1000  # columns


def refit_by_gradients(
    S: NDArray[Any],
    W: NDArray[Any],
    pruned: BoolArray,
    start: NDArray[Any] | None = None,
    iterations: int = 60,
    tolerance: float = 1e-10,
    should_stop: Callable[[], bool] = lambda: False,
) -> NDArray[Any]:
    """Minimise ½ (x − w)ᵀ S (x − w) over x that is zero where pruned: all rows at once, one product per iteration.

    S : (K, K), W, pruned : (rows, K), in one dtype. Conjugate gradients with the preconditioner diag(S). A row is
    skipped once its residual has fallen by `tolerance` (in energy, relative to the start). Never worse than the
    start.
    """
    X: NDArray[Any] = (W if start is None else start) * (~pruned).astype(W.dtype)
    X += solve_on_support(S, (W - X) @ S, pruned, iterations, tolerance, should_stop)
    return X


def solve_on_support(
    S: NDArray[Any],
    right: NDArray[Any],
    pruned: BoolArray,
    iterations: int,
    tolerance: float,
    should_stop: Callable[[], bool] = lambda: False,
) -> NDArray[Any]:
    """X with S_QQ x_Q = right_Q on the kept weights Q of each row, approximately, and zero elsewhere."""
    kept = (~pruned).astype(right.dtype)
    inverse = 1.0 / np.maximum(np.diag(S), np.finfo(right.dtype).tiny)
    X = np.zeros_like(right)
    residual = right * kept
    Z = residual * inverse
    direction = Z.copy()
    energy = np.einsum("rk,rk->r", residual, Z)
    goal = tolerance * energy
    for _ in range(iterations):
        active = energy > np.maximum(goal, np.finfo(right.dtype).tiny)
        if should_stop() or not active.any():
            break
        image = direction @ S
        bend = np.einsum("rk,rk->r", direction, image)
        step = np.where(active & (bend > 0), energy / np.where(bend > 0, bend, 1), 0).astype(right.dtype)
        X += step[:, None] * direction
        image *= kept
        residual -= step[:, None] * image
        np.multiply(residual, inverse, out=Z)
        new = np.einsum("rk,rk->r", residual, Z)
        direction *= np.where(active, new / np.where(energy > 0, energy, 1), 0).astype(right.dtype)[:, None]
        direction += Z
        energy = np.where(active, new, energy)
    return X


def long_rows(pruned: BoolArray) -> BoolArray:
    """Which rows, bool (rows, K), keep so many weights that `update_rows` is faster than a factorisation each."""
    K = pruned.shape[1]
    return np.asarray((K > _LONG) & ((~pruned).sum(1) > _WORTH * K ** (2 / 3)))


def update_rows(S: FloatArray, W: FloatArray, pruned: BoolArray) -> tuple[FloatArray, IntArray]:
    """Best weights of rows to double precision, float64 (rows, K), and the rows where this failed, int64.

    Residuals are computed in double precision and corrected by conjugate gradients in single precision, until
    the energy of the residual has fallen by 1e-16. Where S is so ill-conditioned that this does not happen in a
    few corrections, a row is returned as failed. 2 rows · K² operations in single precision per iteration, about
    100 to 200 iterations in all.
    """
    scale = 1.0 / np.sqrt(np.maximum(np.diag(S), 1e-300))
    unit = (S * scale[:, None] * scale).astype(np.float32)
    out, failed = np.empty_like(W), []
    for first in range(0, W.shape[0], _ROWS):
        part = slice(first, first + _ROWS)
        X, P = np.where(pruned[part], 0.0, W[part]), pruned[part]
        goal, energy = None, np.zeros(X.shape[0])
        for _ in range(_CORRECTIONS):
            checkpoint()
            residual = np.where(P, 0.0, ((W[part] - X) @ S) * scale)
            energy = np.einsum("rk,rk->r", residual, residual)
            goal = _TOLERANCE * energy if goal is None else goal
            if (energy <= goal).all():
                break
            size = np.sqrt(np.maximum(energy, 1e-300))[:, None]
            single = (residual / size).astype(np.float32)
            move = solve_on_support(unit, single, P, _INNER, _INNER_TOLERANCE, _checkpoint_only)
            X += move * size * scale
        out[part] = X
        assert goal is not None
        failed.append(first + np.flatnonzero(energy > goal))
    return out, np.concatenate(failed) if failed else np.zeros(0, dtype=np.int64)


def _checkpoint_only() -> bool:
    checkpoint()
    return False
