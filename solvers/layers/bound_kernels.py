"""Block-coordinate Frank-Wolfe for the relaxation behind `bound`, in numba.

Blocks of at most m columns; the 2^m kept sets of a block are enumerated in the order of their bit masks. Set κ is
its parent (κ without its highest bit i) with i added: with the Schur complement of B on the parent,
h_κᵀB_κκ⁻¹h_κ grows by (residual of i)² / pivot. Pivots and coefficients depend on B alone and serve all rows.
"""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.kernels.compilation import compiled, entry

_FAST = {"nnan", "nsz", "contract", "reassoc"}

entry_fast = compiled(fastmath=_FAST)
inner_fast = compiled(no_cpython_wrapper=True, fastmath=_FAST)


@entry
def subset_factors(B, starts, inverse_pivot, coefficient):
    """Fill (blocks, 2^m) inverse pivots and (blocks, 2^m, m) coefficients for the diagonal blocks of B (K, K)."""
    for k in range(starts.size - 1):
        first, m = starts[k], starts[k + 1] - starts[k]
        schur = np.empty((1 << m, m, m))
        for i in range(m):
            for j in range(m):
                schur[0, i, j] = B[first + i, first + j]
        high = 0
        for subset in range(1, 1 << m):
            if subset >> (high + 1):
                high += 1
            parent = schur[subset - (1 << high)]
            pivot = parent[high, high]
            inverse_pivot[k, subset] = 1.0 / pivot
            for j in range(high + 1, m):
                coefficient[k, subset, j] = parent[j, high] / pivot
                for i in range(high + 1, m):
                    schur[subset, i, j] = parent[i, j] - parent[i, high] * parent[high, j] / pivot


@inner_fast
def _subset_values(h, m, inverse_pivot, coefficient, residual, value):
    """h_κᵀB_κκ⁻¹h_κ of every subset κ of a block."""
    value[0] = 0.0
    for j in range(m):
        residual[0, j] = h[j]
    for high in range(m):
        bit = 1 << high
        for parent in range(bit):
            subset = parent + bit
            r = residual[parent, high]
            value[subset] = value[parent] + r * r * inverse_pivot[subset]
            for j in range(high + 1, m):
                residual[subset, j] = residual[parent, j] - coefficient[subset, j] * r


@inner_fast
def _fixed_values(h, w, B, first, m, residual, value):
    """2 h_κᵀw_κ − w_κᵀB_κκ w_κ of every subset κ of a block: the kept weights are not updated."""
    value[0] = 0.0
    for j in range(m):
        residual[0, j] = h[j]
    for high in range(m):
        bit = 1 << high
        wi = w[high]
        own = B[first + high, first + high] * wi
        for parent in range(bit):
            subset = parent + bit
            value[subset] = value[parent] + wi * (2.0 * residual[parent, high] - own)
            for j in range(high + 1, m):
                residual[subset, j] = residual[parent, j] - B[first + j, first + high] * wi


@inner_fast
def _minimiser(B, first, m, subset, h, v, A, index):
    """V with B_κκ v_κ = h_κ and zeros elsewhere."""
    k = 0
    for i in range(m):
        v[i] = 0.0
        if subset >> i & 1:
            index[k] = i
            k += 1
    for a in range(k):
        for b in range(a + 1):
            s = B[first + index[a], first + index[b]]
            for c in range(b):
                s -= A[a, c] * A[b, c]
            A[a, b] = np.sqrt(max(s, 1e-300)) if a == b else s / A[b, b]
    for a in range(k):
        s = h[index[a]]
        for c in range(a):
            s -= A[a, c] * v[index[c]]
        v[index[a]] = s / A[a, a]
    for a in range(k - 1, -1, -1):
        s = v[index[a]]
        for c in range(a + 1, k):
            s -= A[c, a] * v[index[c]]
        v[index[a]] = s / A[a, a]


@entry_fast
def sweep_rows(
    R, B, starts, inverse_pivot, coefficient, allowed, bits, w, fixed, hw, y, u, M, kept, price, sweeps, stop
):
    """`sweeps` cycles over the blocks of some rows, in place on y, u, M and kept; returns the sum of the gaps.

    Parameters
    ----------
    R, B : float64 (K, K)
        S = R + B, B block-diagonal.
    starts : int64 (blocks + 1,)
    allowed : bool (blocks, 2^m)
        Kept sets that the budget allows.
    bits : int64 (2^m,)
        Size of each set.
    w : float64 (rows, K)
    fixed : bool
        Whether kept weights stay at w (selection) or are updated (joint).
    hw : float64 (rows, K)
        B w.
    y : float64 (rows, K)
        R (u − w).
    u : float64 (rows, K)
        Mean of the mixture.
    M : float64 (rows, K, m)
        Its second moments within the blocks.
    kept : float64 (rows, blocks)
        Its mean number of kept weights.
    price : float64 (rows,)
        Of a kept weight.
    """
    K = R.shape[0]
    size = bits.size
    m_most = M.shape[2]
    residual, value = np.zeros((size, m_most)), np.zeros(size)
    A, index = np.zeros((m_most, m_most)), np.zeros(m_most, np.int64)
    h, v = np.zeros(m_most), np.zeros(m_most)
    total = 0.0
    for _sweep in range(sweeps):
        total = 0.0
        for k in range(starts.size - 1):
            if stop[0]:
                return total
            first, m = starts[k], starts[k + 1] - starts[k]
            for r in range(u.shape[0]):
                for i in range(m):
                    h[i] = hw[r, first + i] - y[r, first + i]
                if fixed:
                    _fixed_values(h, w[r, first:], B, first, m, residual, value)
                else:
                    _subset_values(h, m, inverse_pivot[k], coefficient[k], residual, value)
                best, chosen = -1e300, 0
                lam = price[r]
                for subset in range(1 << m):
                    if allowed[k, subset]:
                        now = value[subset] - lam * bits[subset]
                        if now > best:
                            best, chosen = now, subset
                if fixed:
                    for i in range(m):
                        v[i] = w[r, first + i] if chosen >> i & 1 else 0.0
                else:
                    _minimiser(B, first, m, chosen, h, v, A, index)
                gap = best + lam * kept[r, k]
                curve = 0.0
                for i in range(m):
                    gap -= 2.0 * h[i] * u[r, first + i]
                    di = v[i] - u[r, first + i]
                    for j in range(m):
                        gap += B[first + i, first + j] * M[r, first + i, j]
                        curve += di * R[first + i, first + j] * (v[j] - u[r, first + j])
                total += gap
                if gap <= 0.0:
                    continue
                tau = 1.0
                if 2.0 * curve > gap:
                    tau = gap / (2.0 * curve)
                row = y[r]
                for i in range(m):
                    d = tau * (v[i] - u[r, first + i])
                    u[r, first + i] += d
                    if d != 0.0:
                        line = R[first + i]
                        for c in range(K):
                            row[c] += d * line[c]
                    for j in range(m):
                        M[r, first + i, j] += tau * (v[i] * v[j] - M[r, first + i, j])
                kept[r, k] += tau * (bits[chosen] - kept[r, k])
    return total


@entry_fast
def best_by_count(B, starts, inverse_pivot, coefficient, allowed, bits, w, fixed, h, out):
    """Out (rows, blocks, m + 1): the largest value among the allowed sets of each size, −1e300 without."""
    size, m_most = bits.size, out.shape[2] - 1
    residual, value = np.zeros((size, m_most)), np.zeros(size)
    for k in range(starts.size - 1):
        first, m = starts[k], starts[k + 1] - starts[k]
        for r in range(h.shape[0]):
            if fixed:
                _fixed_values(h[r, first:], w[r, first:], B, first, m, residual, value)
            else:
                _subset_values(h[r, first:], m, inverse_pivot[k], coefficient[k], residual, value)
            line = out[r, k]
            line[:] = -1e300
            for subset in range(1 << m):
                if allowed[k, subset] and value[subset] > line[bits[subset]]:
                    line[bits[subset]] = value[subset]
