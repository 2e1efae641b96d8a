"""Block-coordinate Frank-Wolfe for the relaxation behind `bound`, in numba.

Blocks of at most m columns; the 2^m kept sets of a block are enumerated in the order of their bit masks. Set κ is
its parent (κ without its highest bit i) with i added: with the Schur complement of B on the parent,
h_κᵀB_κκ⁻¹h_κ grows by (residual of i)² / pivot. Pivots and coefficients depend on B alone and serve all rows.
"""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.kernels.compilation import compiled, entry

_SMALL, _REST = 0.1, 3  # of the mean gap: a block with less is left out of the next sweeps

_FAST = {"nnan", "nsz", "contract", "reassoc"}

entry_fast = compiled(fastmath=_FAST)
inner = compiled(no_cpython_wrapper=True)
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
    R,
    B,
    starts,
    inverse_pivot,
    coefficient,
    allowed,
    bits,
    w,
    scale,
    fixed,
    hw,
    y,
    u,
    M,
    kept,
    price,
    sweeps,
    close,
    stop,
):
    """At most `sweeps` cycles over the blocks of some rows, in place on y, u, M and kept.

    Returns the sum of the gaps of the last cycle, with the scales of the rows; at most `close` ends the cycles.

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
    scale : float64 (rows,)
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
    rest = np.zeros((u.shape[0], starts.size - 1), np.uint8)  # sweeps that a block is left out of
    for _sweep in range(sweeps):
        small = _SMALL * total / (u.shape[0] * (starts.size - 1))
        total = 0.0
        for k in range(starts.size - 1):
            if stop[0]:
                return total
            first, m = starts[k], starts[k + 1] - starts[k]
            for r in range(u.shape[0]):
                if rest[r, k] > 0:
                    rest[r, k] -= 1
                    continue
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
                total += gap * scale[r]
                if gap * scale[r] <= small:
                    rest[r, k] = _REST
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
        if total <= close:
            break
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


# Block-coordinate ascent of the split --------------------------------------------------------------------------


@inner
def _cholesky(A, m, L):
    """Lower factor of A (m, m) in L; False where A is not positive definite."""
    for i in range(m):
        for j in range(i + 1):
            s = A[i, j]
            for c in range(j):
                s -= L[i, c] * L[j, c]
            if i > j:
                L[i, j] = s / L[j, j]
            elif s > 0.0:
                L[i, i] = np.sqrt(s)
            else:
                return False
    return True


@inner
def _whiten(A, L, m, out):
    """L⁻¹ A L⁻ᵀ for a symmetric A (m, m)."""
    for j in range(m):
        for i in range(m):
            s = A[i, j]
            for c in range(i):
                s -= L[i, c] * out[c, j]
            out[i, j] = s / L[i, i]
    for i in range(m):
        for j in range(m):
            s = out[i, j]
            for c in range(j):
                s -= L[j, c] * out[i, c]
            out[i, j] = s / L[j, j]


@inner
def _eigen(A, m, Q):
    """Jacobi rotations: A (m, m) becomes diagonal, Q holds the eigenvectors in its columns."""
    for i in range(m):
        for j in range(m):
            Q[i, j] = 1.0 if i == j else 0.0
    for _cycle in range(30):
        off, all_of = 0.0, 0.0
        for i in range(m):
            all_of += A[i, i] * A[i, i]
            for j in range(i):
                off += A[i, j] * A[i, j]
        if off <= 1e-22 * all_of:
            return
        for i in range(1, m):
            for j in range(i):
                if A[i, j] == 0.0:
                    continue
                theta = (A[i, i] - A[j, j]) / (2.0 * A[i, j])
                t = 1.0 / (abs(theta) + np.sqrt(theta * theta + 1.0))
                if theta < 0.0:
                    t = -t
                c = 1.0 / np.sqrt(t * t + 1.0)
                s = t * c
                for k in range(m):
                    aj, ai = A[k, j], A[k, i]
                    A[k, j], A[k, i] = c * aj - s * ai, s * aj + c * ai
                for k in range(m):
                    aj, ai = A[j, k], A[i, k]
                    A[j, k], A[i, k] = c * aj - s * ai, s * aj + c * ai
                for k in range(m):
                    qj, qi = Q[k, j], Q[k, i]
                    Q[k, j], Q[k, i] = c * qj - s * qi, s * qj + c * qi


@inner
def _block_step(here, B, target, m, barrier, step, L, A, Q):
    """Step of B (m, m) toward W = target / barrier, which leaves at least a twentieth of B; False for none."""
    if not _cholesky(here, m, L):
        return False
    _whiten(target, L, m, A)
    _eigen(A, m, Q)
    # In the metric of `here` the step is diagonal: 1 − μ/ω for each eigenvalue ω of the target.
    for j in range(m):
        for i in range(m - 1, -1, -1):  # Q ← L⁻ᵀ Q
            s = Q[i, j]
            for c in range(i + 1, m):
                s -= L[c, i] * Q[c, j]
            Q[i, j] = s / L[i, i]
    for i in range(m):
        for j in range(i + 1):
            s = 0.0
            for c in range(m):
                growth = 1.0 - barrier / max(A[c, c], 1e-300)
                s += min(max(growth, -4.0), 0.8) * Q[i, c] * Q[j, c]
            step[i, j] = s
            step[j, i] = s
    if not _cholesky(B, m, L):
        return False
    _whiten(step, L, m, A)
    _eigen(A, m, Q)
    smallest = 0.0
    for i in range(m):
        smallest = min(smallest, A[i, i])
    if smallest < -0.95:
        for i in range(m):
            for j in range(m):
                step[i, j] *= -0.95 / smallest
    return True


@entry
def blocks_are_definite(B, starts):
    """Whether all diagonal blocks of B are positive definite."""
    most = 0
    for k in range(starts.size - 1):
        most = max(most, starts[k + 1] - starts[k])
    L = np.zeros((most, most))
    for k in range(starts.size - 1):
        if not _cholesky(B[starts[k] : starts[k + 1], starts[k] : starts[k + 1]], starts[k + 1] - starts[k], L):
            return False
    return True


@entry
def ascend_blocks(W, B, target, starts, barrier):
    """One cycle over the blocks of B toward W_kk = target_k / barrier, W = (S − B)⁻¹, in place on B and W.

    A step X of block k changes W by W_:k (I − X W_kk)⁻¹ X W_k:. These changes are listed and multiplied out
    together, so that most of the work, 2 K³ operations, is in matrix products.

    Parameters
    ----------
    W, B : float64 (K, K), in place
    target : float64 (K, m)
    starts : int64 (blocks + 1,)
    barrier : float
    """
    K, most = target.shape
    width = 8 * most
    left, right, used = np.zeros((width, K)), np.zeros((width, K)), 0
    small = np.zeros((9, most, most))
    here, block, wanted, step, L, A, Q, middle, M = (
        small[0], small[1], small[2], small[3], small[4], small[5], small[6], small[7], small[8],
    )  # fmt: skip
    for k in range(starts.size - 1):
        first, m = starts[k], starts[k + 1] - starts[k]
        if used + m > width:
            W += np.dot(left[:used].T, right[:used])
            used = 0
        rows = left[used : used + m]
        rows[:] = W[first : first + m]
        if used:
            rows += np.dot(np.ascontiguousarray(left[:used, first : first + m]).T, right[:used])
        for i in range(m):
            for j in range(m):
                here[i, j] = 0.5 * (rows[i, first + j] + rows[j, first + i])
                block[i, j] = B[first + i, first + j]
                wanted[i, j] = 0.5 * (target[first + i, j] + target[first + j, i])
        if not _block_step(here, block, wanted, m, barrier, step, L, A, Q):
            continue
        # (I − X W_kk)⁻¹ X by Gauss-Jordan elimination with pivots.
        for i in range(m):
            for j in range(m):
                s = 1.0 if i == j else 0.0
                for c in range(m):
                    s -= step[i, c] * here[c, j]
                M[i, j], middle[i, j] = s, step[i, j]
        for c in range(m):
            pivot = c
            for i in range(c + 1, m):
                if abs(M[i, c]) > abs(M[pivot, c]):
                    pivot = i
            for j in range(m):
                M[c, j], M[pivot, j] = M[pivot, j], M[c, j]
                middle[c, j], middle[pivot, j] = middle[pivot, j], middle[c, j]
            scale = 1.0 / M[c, c]
            for j in range(m):
                M[c, j] *= scale
                middle[c, j] *= scale
            for i in range(m):
                factor = M[i, c]
                if i != c and factor != 0.0:
                    for j in range(m):
                        M[i, j] -= factor * M[c, j]
                        middle[i, j] -= factor * middle[c, j]
        right[used : used + m] = np.dot(np.ascontiguousarray(middle[:m, :m]), rows)
        for i in range(m):
            for j in range(m):
                B[first + i, first + j] += step[i, j]
        used += m
    W += np.dot(left[:used].T, right[:used])
