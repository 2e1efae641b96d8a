"""Eigenvalues of the blocks of a curvature: all, or the largest ones of large blocks."""

from __future__ import annotations

import numpy as np

from cbs_opt.curvature.base import Curvature
from cbs_opt.typing import FloatArray

DENSE = 1500
"""Blocks of up to this size are decomposed completely."""

LARGEST = 60
"""Number of eigenvalues computed for larger blocks, from the largest on."""


def block_spectrum(curvature: Curvature, k: int) -> tuple[FloatArray, bool]:
    """Eigenvalues of block k in decreasing order, and whether these are all.

    O(b³) time up to `DENSE` weights; beyond that from the m × m matrix GGᵀ/m of a gradient factor, or the largest
    by Lanczos.
    """
    b = int(curvature.block_sizes[k])
    if b <= DENSE:
        return np.asarray(np.linalg.eigvalsh(curvature.block(k))[::-1], dtype=np.float64), True
    factor = curvature.as_factor()
    if factor is not None and factor.m <= DENSE:
        gram = np.zeros((factor.m, factor.m))
        part = factor.block_slice(k)
        for _, piece in factor.pieces(part.start, part.stop):
            gram += piece @ piece.T
        values = np.linalg.eigvalsh(gram / factor.m)[::-1]
        return np.maximum(values, 0.0) + factor.damping, False
    from scipy.sparse.linalg import LinearOperator, eigsh

    operator = LinearOperator((b, b), matvec=lambda x: curvature.block_matmul(k, np.ravel(x)), dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(b)
    found = eigsh(operator, k=LARGEST, which="LA", v0=start, return_eigenvectors=False, tol=1e-4)
    return np.sort(found)[::-1], False
