"""Small dense linear algebra inside the trees, in numba."""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.kernels.compilation import entry, entry_fast, inner, inner_fast

__all__ = [
    "axpy",
    "cholesky",
    "cholesky_until",
    "entry",
    "entry_fast",
    "inner",
    "inner_fast",
    "invert_factor",
    "kth_largest",
    "solve",
]


@inner_fast
def axpy(y, a, x, m):
    """Add a·x to y on the first m entries."""
    for k in range(m):
        y[k] += a * x[k]


@inner_fast
def cholesky_rows(A, first, last):
    """Rows first … last of the factor of `cholesky`, whose rows before these are there."""
    for j in range(first, last):
        Aj = A[j]
        for i in range(j):
            Ai = A[i]
            s = 0.0
            for t in range(i):
                s += Aj[t] * Ai[t]
            Aj[i] = (Aj[i] - s) * Ai[i]
        s = 0.0
        for t in range(j):
            s += Aj[t] * Aj[t]
        Aj[j] = 1.0 / np.sqrt(max(Aj[j] - s, 1e-11))


ROWS_AT_ONCE = 64
"""Rows of a factorisation after which kernels look at a flag that tells them to stop."""


@inner_fast
def cholesky(A, k):
    """Factorise in place the k×k lower triangle of a matrix of unit diagonal; A[j, j] becomes 1 / pivot.

    Tiny pivots are lifted: the factor gives directions and estimates only, never a bound.
    """
    cholesky_rows(A, 0, k)


@inner
def cholesky_until(A, k, stop):
    """`cholesky`, unless stop[0] is set meanwhile; whether A is factorised."""
    for first in range(0, k, ROWS_AT_ONCE):
        if stop[0] != 0:
            return False
        cholesky_rows(A, first, min(first + ROWS_AT_ONCE, k))
    return True


@inner_fast
def solve(A, b, k):
    """Solve in place with the factor of `cholesky`."""
    for j in range(k):
        Aj = A[j]
        s = 0.0
        for t in range(j):
            s += Aj[t] * b[t]
        b[j] = (b[j] - s) * Aj[j]
    for j in range(k - 1, -1, -1):
        b[j] *= A[j, j]
        v = b[j]
        Aj = A[j]
        for t in range(j):
            b[t] -= v * Aj[t]


@inner_fast
def invert_factor(A, B, k):
    """B = inverse of the lower factor of `cholesky`, lower triangular too."""
    for a in range(k):
        Ba = B[a]
        Aa = A[a]
        for t in range(k):
            Ba[t] = 0.0
        for i in range(a):
            v = Aa[i]
            Bi = B[i]
            for t in range(i + 1):
                Ba[t] -= v * Bi[t]
        for t in range(a):
            Ba[t] *= Aa[a]
        Ba[a] = Aa[a]


@inner
def kth_largest(key, n, k):
    """The k-th largest (k = 1 … n) of key[:n], which is reordered; quickselect."""
    lo = 0
    hi = n - 1
    at = k - 1
    while lo < hi:
        pivot = key[(lo + hi) // 2]
        i = lo
        j = hi
        while i <= j:
            while key[i] > pivot:
                i += 1
            while key[j] < pivot:
                j -= 1
            if i <= j:
                t = key[i]
                key[i] = key[j]
                key[j] = t
                i += 1
                j -= 1
        if at <= j:
            hi = j
        elif at >= i:
            lo = i
        else:
            break
    return key[at]
