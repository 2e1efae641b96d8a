"""Inverses of principal submatrices: formed in the cheapest way, and updated without changing every entry."""

from __future__ import annotations

import numpy as np

from cbs_opt.curvature import Curvature
from cbs_opt.linalg import inverse_pd
from cbs_opt.typing import FloatArray, IntArray

_TERMS = 64  # rank-one terms that are kept before they are added up


def conditional_inverse(curvature: Curvature, k: int, index: IntArray) -> FloatArray | None:
    """[H_II]⁻¹ for weights I of block k, float64 (i, i), or None where H_II is singular.

    Parameters
    ----------
    curvature : Curvature
    k : int
    index : int64 (i,)
        Within the block.

    Notes
    -----
    By Woodbury where a factor has fewer gradients than I has weights: (I − ĜᵀĜ)/λ with Ĝ = L⁻¹G_I and
    LLᵀ = mλI + G_I G_Iᵀ, O(m² i + m i²) and one matrix product; O(i³) otherwise.
    """
    factor = curvature.as_factor()
    if factor is not None and factor.m < index.size and factor.damping > 0:
        from scipy.linalg import cholesky, solve_triangular

        G = factor.factor(k, index)
        M = G @ G.T
        M[np.diag_indices_from(M)] += factor.m * factor.damping
        half = solve_triangular(cholesky(M, lower=True), G, lower=True, check_finite=False)
        inverse = half.T @ half
        inverse *= -1.0 / factor.damping
        inverse[np.diag_indices_from(inverse)] += 1.0 / factor.damping
        return np.asarray(inverse)
    if index.size == curvature.block_sizes[k]:
        return np.array(curvature.inverse_block(k))
    return inverse_pd(curvature.submatrix(k, index, index))


class LazyInverse:
    """A symmetric positive definite T with access to single rows, changed by rank-one terms.

    T = base + Σ ± v vᵀ; the terms are added to the base by one matrix product when there are many, so that a
    change costs O(q) and a row O(terms · q), instead of O(q²) each.

    Parameters
    ----------
    matrix : float64 (q, q)
        Taken over, and changed in place.

    Attributes
    ----------
    diagonal : float64 (q,)
        Of T, always up to date.
    """

    def __init__(self, matrix: FloatArray) -> None:
        self._base = np.ascontiguousarray(matrix)
        self._size = matrix.shape[0]
        self.diagonal = matrix.diagonal().copy()
        self._terms = np.empty((_TERMS, matrix.shape[0]))
        self._signs = np.empty(_TERMS)
        self._count = 0

    def copy(self) -> LazyInverse:
        """An independent copy."""
        return LazyInverse(self.matrix().copy())

    def matrix(self) -> FloatArray:
        """T, float64 (q, q): a view that the next change makes stale."""
        self._add_up()
        return self._base[: self._size, : self._size]

    def row(self, s: int) -> FloatArray:
        """T[s], float64 (q,)."""
        terms = self._terms[: self._count, : self._size]
        row = self._base[s, : self._size] + (self._signs[: self._count] * terms[:, s]) @ terms
        row[s] = self.diagonal[s]
        return np.asarray(row)

    def replace(self, s: int, row: FloatArray, u: FloatArray, pivot: float) -> None:
        """Take out index s, of the given row, and put another one in its place.

        `u`, float64 (q,) with u[s] = 0, is the new one's row of U after s has gone, `pivot` its Schur complement.
        """
        t = row[s]
        new = u.copy()
        new[s] = -1.0
        self.diagonal += new**2 / pivot - row**2 / t
        self.diagonal[s] = 1.0 / pivot
        self._add(-1.0, row / np.sqrt(t))
        self._add(1.0, new / np.sqrt(pivot))

    def remove(self, s: int, row: FloatArray) -> None:
        """Take out index s, of the given row; the last index takes its place."""
        t, last = row[s], self._size - 1
        self.diagonal -= row**2 / t
        self._add(-1.0, row / np.sqrt(t))
        self.diagonal[s] = self.diagonal[last]
        self._terms[: self._count, s] = self._terms[: self._count, last]
        base, diagonal = self._base, self._base[last, last]
        base[s, : last + 1] = base[last, : last + 1]
        base[: last + 1, s] = base[: last + 1, last]
        base[s, s] = diagonal
        self.diagonal, self._size = self.diagonal[:last].copy(), last

    def append(self, u: FloatArray, pivot: float) -> None:
        """Add an index at the end: `u`, float64 (q,), is its row of U, `pivot` its Schur complement."""
        q = self._size
        if q == self._base.shape[0]:
            self._add_up()
            larger = np.zeros((q + _TERMS, q + _TERMS))
            larger[:q, :q] = self._base
            self._base, self._terms = larger, np.empty((_TERMS, q + _TERMS))
        self._base[q, : q + 1] = self._base[: q + 1, q] = 0.0
        self._terms[: self._count, q] = 0.0
        self._size = q + 1
        self.diagonal = np.append(self.diagonal + u**2 / pivot, 1.0 / pivot)
        self._add(1.0, np.append(u, -1.0) / np.sqrt(pivot))

    def _add(self, sign: float, vector: FloatArray) -> None:
        if self._count == _TERMS:
            self._add_up()
        self._terms[self._count, : self._size] = vector
        self._signs[self._count] = sign
        self._count += 1

    def _add_up(self) -> None:
        """Bring the terms into the base."""
        if self._count:
            terms = self._terms[: self._count, : self._size]
            base = self._base[: self._size, : self._size]
            base += (self._signs[: self._count, None] * terms).T @ terms
            self._count = 0
