"""Best updates of many rows that share one Hessian, by factorisations, or by conjugate gradients for long rows.

Room: the core; used by `SharedBlocks` and by `solvers.layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbs_opt.interrupt import checkpoint
from cbs_opt.threads import library_threads
from cbs_opt.typing import BoolArray, FloatArray, IntArray

INNER = 60
"""Iterations in single precision between two residuals in double precision."""

INNER_TOLERANCE = 1e-8
"""Of the energy of the residual, for those iterations."""

TOLERANCE = 1e-14
"""Of that energy against its start, in the end."""

CORRECTIONS = 5
"""Residuals in double precision at most."""

_ROWS = 256  # that go through one product together
_COMPACT = 0.8  # share of unfinished rows below which the finished ones are left out of the products
_WORTH = 8.0  # rows of more than this times K^(2/3) kept weights are cheaper by gradients than by a factorisation
_WORTH_FROM_START = 3.0  # the same where the weights are near the best ones to start with
_LONG = 1000  # columns
_TINY = 64  # columns below which the libraries take one thread of their own accord
ROW_OVERHEAD = 2e5
"""Operations that take as long as what a row costs beside its products."""

_UNASKED = 1e9  # operations between two questions whether to stop
_SMALLEST_PIVOT = 1e-7  # of a unit-diagonal system: below it a row is singular to working precision


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
    out = np.zeros_like(right)
    rows, X = np.arange(right.shape[0]), np.zeros_like(right)  # those that are not finished
    residual = right * kept
    Z = residual * inverse
    direction = Z.copy()
    energy = np.einsum("rk,rk->r", residual, Z)
    goal = np.maximum(tolerance * energy, np.finfo(right.dtype).tiny)
    for _ in range(iterations):
        active = energy > goal
        if should_stop() or not active.any():
            break
        if active.sum() <= _COMPACT * rows.size:
            out[rows[~active]] = X[~active]
            rows, X, kept, residual, Z = rows[active], X[active], kept[active], residual[active], Z[active]
            direction, energy, goal, active = direction[active], energy[active], goal[active], active[active]
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
    out[rows] = X
    return out


def long_rows(pruned: BoolArray, started: bool = False) -> BoolArray:
    """Which rows, bool (rows,), keep so many weights that `update_rows` is faster than a factorisation each.

    pruned : (rows, K); started : whether weights near the best ones are known.
    """
    K = pruned.shape[1]
    worth = _WORTH_FROM_START if started else _WORTH
    return np.asarray((K > _LONG) & ((~pruned).sum(1) > worth * K ** (2 / 3)))


@dataclass(frozen=True)
class Updated:
    """Best weights of rows.

    Attributes
    ----------
    weights : float64 (rows, K)
    failed : int64
        Rows whose residual did not fall far enough, as S is too ill-conditioned for single precision, or whose
        factorisation failed.
    stopped : bool
        Whether the run was told to stop: the weights fit the masks, but are not the best of all rows.
    """

    weights: FloatArray
    failed: IntArray
    stopped: bool


class Pace:
    """Asks whether to stop after every 10⁹ operations or so: what takes less time is finished in any case.

    Parameters
    ----------
    should_stop : callable
    """

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self.should_stop, self._done = should_stop, 0.0

    def over(self, operations: float) -> bool:
        """Whether to stop before work of so many operations."""
        self._done += operations
        if self._done < _UNASKED:
            return False
        self._done = 0.0
        return self.should_stop()


def factored_rows(
    S: FloatArray,
    W: FloatArray,
    pruned: BoolArray,
    linear: FloatArray | None = None,
    start: NDArray[Any] | None = None,
    pace: Pace | None = None,
) -> Updated:
    """Best weights of rows by one Cholesky factorisation each, on the kept side.

    Parameters are those of `update_rows`. Rows that are singular to working precision fail. Where `pace` is over,
    the rows that are left keep the weights of `start`, or the given ones.

    Notes
    -----
    2 rows · K² operations for the right sides in products of 256 rows, then q²·K + q³/3 for each row that keeps q.
    """
    from scipy.linalg import lapack

    diagonal = np.diag(S)
    scale = 1.0 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    unit = S * scale[:, None] * scale
    out = np.where(pruned, np.float64(0), W if start is None else start)
    failed: list[int] = []
    for first in range(0, W.shape[0], _ROWS):
        checkpoint()
        part = slice(first, first + _ROWS)
        right = np.where(pruned[part], W[part], 0.0) @ S
        if linear is not None:
            right -= linear[part]
        right *= scale
        with _single_thread(S.shape[0]):
            for r in range(first, min(first + _ROWS, W.shape[0])):
                kept = np.flatnonzero(~pruned[r])
                if kept.size == 0:
                    continue
                if pace is not None and pace.over(kept.size**3 / 3 + kept.size**2 + ROW_OVERHEAD):
                    return Updated(out, np.zeros(0, dtype=np.int64), True)
                system, b = unit[kept[:, None], kept].T, right[r - first, kept]
                L, move, info = lapack.dposv(system, b, lower=1, overwrite_a=1)
                if info != 0 or not L.diagonal().min() > _SMALLEST_PIVOT:
                    failed.append(r)
                else:
                    out[r, kept] = W[r, kept] + move * scale[kept]
    return Updated(out, np.array(failed, dtype=np.int64), False)


def _single_thread(columns: int) -> AbstractContextManager[object]:
    """Linear algebra with one thread: several wait for each other on the systems of single rows."""
    return nullcontext() if columns < _TINY else library_threads(1)


def update_rows(
    S: FloatArray,
    W: FloatArray,
    pruned: BoolArray,
    linear: FloatArray | None = None,
    start: NDArray[Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Updated:
    """Best weights of rows to double precision.

    Parameters
    ----------
    S : float64 (K, K)
    W, pruned : (rows, K)
    linear : float64 (rows, K), optional
        First-order term, divided by the scale of the row.
    start : float (rows, K), optional
        Weights near the best ones, of which nothing is assumed.
    should_stop : callable
        Asked before every iteration on 256 rows; True leaves the weights as they are.

    Notes
    -----
    Residuals are computed in double precision and corrected by conjugate gradients in single precision, until
    the energy of the residual is 1e-14 of what it is where the kept weights do not move: the loss is then exact to
    about 1e-14 times the condition number of S. Where that does not happen in a few corrections, a row is returned
    as failed. 2 rows · K² operations in single precision per iteration: 100 to 200 iterations from W, a few from
    weights that a solver has refitted.
    """
    scale = 1.0 / np.sqrt(np.maximum(np.diag(S), 1e-300))
    unit = (S * scale[:, None] * scale).astype(np.float32)
    out, failed, stopped = np.empty_like(W), [], False

    def asked() -> bool:
        nonlocal stopped
        checkpoint()
        stopped = stopped or should_stop()
        return stopped

    for first in range(0, W.shape[0], _ROWS):
        part = slice(first, first + _ROWS)
        P, w = pruned[part], W[part]
        X = np.where(P, np.float64(0), w if start is None else start[part])
        out[part] = X
        if asked():
            continue
        goal = None if start is None else TOLERANCE * _energy_of_masking(unit, w / scale, P)
        energy = np.zeros(X.shape[0])
        for _ in range(CORRECTIONS):
            residual = (w - X) @ S if linear is None else (w - X) @ S - linear[part]
            residual = np.where(P, 0.0, residual * scale)
            energy = np.einsum("rk,rk->r", residual, residual)
            goal = TOLERANCE * energy if goal is None else goal
            left = np.flatnonzero(energy > goal)
            if left.size == 0 or asked():
                break
            size = np.sqrt(np.maximum(energy[left], 1e-300))[:, None]
            single = (residual[left] / size).astype(np.float32)
            enough = max(INNER_TOLERANCE, 0.1 * float((goal[left] / energy[left]).min()))
            move = solve_on_support(unit, single, P[left], INNER, enough, asked)
            X[left] += move * size * scale
        out[part] = X
        assert goal is not None
        failed.append(first + np.flatnonzero(energy > goal))
    rows = np.concatenate(failed) if failed and not stopped else np.zeros(0, dtype=np.int64)
    return Updated(out, rows, stopped)


def _energy_of_masking(unit: NDArray[Any], W: FloatArray, pruned: BoolArray) -> FloatArray:
    """Energy of the residual where the kept weights do not move, in single precision, float64 (rows,)."""
    residual = np.where(pruned, W, 0.0).astype(np.float32) @ unit
    residual[pruned] = 0
    return np.asarray(np.einsum("rk,rk->r", residual, residual, dtype=np.float64))
