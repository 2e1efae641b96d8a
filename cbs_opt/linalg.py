"""Symmetric positive (semi)definite systems, for the forms of the curvature and the update."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbs_opt.interrupt import checkpoint
from cbs_opt.typing import FloatArray

SYMMETRY_TOLERANCE = 1e-5
"""Largest |A - Aᵀ| accepted, relative to the largest entry: the accuracy of float32 products."""

_SMALLEST_PIVOT = 1e-7  # of a unit-diagonal matrix: its square is what rounding leaves of a zero pivot
_PANEL = 768  # columns of a large factorisation between two checkpoints
_CHOLESKY_LIMIT = 4096  # above this size definiteness is probed by Lanczos instead of proven by Cholesky


def solve_psd(A: FloatArray, rhs: FloatArray) -> tuple[FloatArray, bool]:
    """Solve A x = rhs for a symmetric positive semidefinite A.

    A is first scaled to a unit diagonal, which makes Cholesky reliable for badly scaled weights. When it is
    singular to working precision, the pseudo-inverse gives the least-squares solution of the scaled system.

    Parameters
    ----------
    A : float64 (b, b)
    rhs : float64 (b,) or (b, r)

    Returns
    -------
    x : float64, shape of `rhs`
    consistent : bool
        False when A is singular and `rhs` is not in its range, so that no solution exists.

    Notes
    -----
    O(b³/3) time, O(b²) memory; the pseudo-inverse costs about ten times more.
    """
    from scipy.linalg import cho_solve, eigh

    if A.shape[0] == 0:
        return np.zeros_like(rhs), True
    diagonal = A.diagonal()
    scale = 1.0 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    column_scale = scale if rhs.ndim == 1 else scale[:, None]
    unit = A * scale[:, None] * scale[None, :]
    b = column_scale * rhs
    factor = cholesky_lower(unit)
    if factor is not None and factor.diagonal().min() > _SMALLEST_PIVOT:
        return column_scale * cho_solve((factor, True), b, check_finite=False), True
    values, vectors = eigh(unit, check_finite=False)
    keep = values > values[-1] * A.shape[0] * np.finfo(np.float64).eps * 10
    V = vectors[:, keep]
    coefficients = V.T @ b
    residual = float(np.linalg.norm(b - V @ coefficients))
    consistent = residual <= 1e-6 * max(float(np.linalg.norm(b)), 1e-300)
    inverse = 1.0 / values[keep]
    x = V @ (coefficients * (inverse if rhs.ndim == 1 else inverse[:, None]))
    return column_scale * x, consistent


def inverse_pd(A: FloatArray) -> FloatArray | None:
    """Inverse of a symmetric positive definite matrix, or None when Cholesky finds it is not; O(b³)."""
    from scipy.linalg import lapack

    diagonal = A.diagonal()
    if A.shape[0] == 0:
        return A.copy()
    if not (diagonal > 0).all():
        return None
    scale = 1.0 / np.sqrt(diagonal)
    factor = cholesky_lower(A * scale[:, None] * scale[None, :])
    if factor is None or factor.diagonal().min() < _SMALLEST_PIVOT:
        return None
    if A.shape[0] > 2 * _PANEL:
        full = inverse_of_cholesky(factor)
        return np.asarray(full * scale[:, None] * scale[None, :], dtype=np.float64)
    inverse, info = lapack.dpotri(factor, lower=1, overwrite_c=1)
    if info != 0:
        return None
    lower = np.tril(inverse)
    full = lower + lower.T
    full[np.diag_indices_from(full)] *= 0.5
    return np.asarray(full * scale[:, None] * scale[None, :], dtype=np.float64)


def cholesky_lower(A: NDArray[Any]) -> NDArray[Any] | None:
    """L with A = LLᵀ and zeros above its diagonal, in the dtype of A (float32 or float64), or None.

    Large matrices are factored in panels with a `checkpoint` after each; O(b³/3) time, one copy of A.
    """
    from scipy.linalg import blas, lapack

    single = A.dtype == np.float32
    potrf = lapack.spotrf if single else lapack.dpotrf
    b = A.shape[0]
    if b <= 2 * _PANEL:
        L, info = potrf(A, lower=1, clean=1)
        return L if info == 0 else None
    trsm = blas.strsm if single else blas.dtrsm
    L = np.array(A, order="F")
    for start in range(0, b, _PANEL):
        checkpoint()
        stop = min(start + _PANEL, b)
        pivot, info = potrf(L[start:stop, start:stop], lower=1, clean=1)
        if info != 0:
            return None
        L[start:stop, start:stop] = pivot
        if stop < b:
            below = trsm(1.0, pivot, L[stop:, start:stop], side=1, lower=1, trans_a=1)
            L[stop:, start:stop] = below
            for first in range(stop, b, _PANEL):
                last = min(first + _PANEL, b)
                L[first:, first:last] -= below[first - stop :] @ below[first - stop : last - stop].T
                checkpoint()
        L[:start, start:stop] = 0.0
    return L


def inverse_of_cholesky(L: NDArray[Any]) -> NDArray[Any]:
    """(LLᵀ)⁻¹ in panels with a `checkpoint` after each; O(b³) time, two further matrices, dtype of L."""
    from scipy.linalg import blas

    trsm = blas.strsm if L.dtype == np.float32 else blas.dtrsm
    b = L.shape[0]
    half = np.zeros_like(L, order="F")  # L⁻¹
    for start in range(0, b, _PANEL):
        checkpoint()
        stop = min(start + _PANEL, b)
        unit = np.zeros((b - start, stop - start), dtype=L.dtype, order="F")
        unit[np.arange(stop - start), np.arange(stop - start)] = 1.0
        half[start:, start:stop] = trsm(1.0, L[start:, start:], unit, side=0, lower=1, overwrite_b=1)
    out = np.empty((b, b), dtype=L.dtype)
    for start in range(0, b, _PANEL):
        checkpoint()
        stop = min(start + _PANEL, b)
        out[start:, start:stop] = half[start:, start:].T @ half[start:, start:stop]
        out[start:stop, start:] = out[start:, start:stop].T
    return out


def is_positive(A: FloatArray, *, definite: bool, precision: float) -> bool:
    """Whether a symmetric matrix is positive (semi)definite to the `precision` of its entries.

    Parameters
    ----------
    A : float64 (b, b)
    definite : bool
        Require positive definite; otherwise semidefinite, then eigenvalues down to −10·b·precision of the
        largest diagonal entry count as zero.
    precision : float
        Relative rounding of the entries: the machine epsilon of the type they were stored in.

    Notes
    -----
    Verified by Cholesky, O(b³/3), up to 4096 rows; above that Lanczos searches for a negative eigenvalue, O(b²).
    """
    from scipy.linalg import lapack

    b = A.shape[0]
    if b == 0:
        return True
    diagonal = A.diagonal()
    if (diagonal < 0).any() or (definite and (diagonal == 0).any()):
        return False
    largest = float(diagonal.max())
    if largest == 0:
        return not A.any()
    if b > _CHOLESKY_LIMIT:
        return bool(_smallest_ritz_value(A) >= -10 * b * precision * largest)
    if definite:
        scale = 1.0 / np.sqrt(diagonal)
        _, info = lapack.dpotrf(A * scale[:, None] * scale[None, :], lower=1)
    else:
        shifted = A.copy()
        shifted[np.diag_indices(b)] += 10 * b * precision * largest
        _, info = lapack.dpotrf(shifted, lower=1, overwrite_a=1)
    return bool(info == 0)


def _smallest_ritz_value(A: FloatArray, steps: int = 30) -> float:
    """Upper estimate of the smallest eigenvalue: the smallest Ritz value after `steps` Lanczos steps."""
    rng = np.random.default_rng(0)
    basis = np.zeros((steps, A.shape[0]))
    alpha, beta = np.zeros(steps), np.zeros(steps)
    v = rng.standard_normal((A.shape[0],))
    v /= np.linalg.norm(v)
    taken = 0
    for k in range(steps):
        basis[k] = v
        taken = k + 1
        w = A @ v
        alpha[k] = w @ v
        w -= basis[:taken].T @ (basis[:taken] @ w)
        w -= basis[:taken].T @ (basis[:taken] @ w)
        beta[k] = np.linalg.norm(w)
        if beta[k] <= 1e-12 * abs(alpha).max():
            break
        v = w / beta[k]
    tridiagonal = np.diag(alpha[:taken]) + np.diag(beta[: taken - 1], 1) + np.diag(beta[: taken - 1], -1)
    return float(np.linalg.eigvalsh(tridiagonal)[0])
