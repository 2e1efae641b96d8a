"""Other methods for one layer, implemented from their papers, for comparison with `solvers.layers`.

- Wanda, Sun et al., 2306.11695: prune the least |w| √S_ii; no update.
- SparseGPT, Frantar and Alistarh, 2301.00774: one pass over the columns with the Cholesky factor of S⁻¹; the mask
  of 128 columns at a time from w² / U_cc², over all rows; the error of a column is spread over those behind it.
- ALPS, Meng et al., 2406.07831: ADMM on unit-diagonal S with one eigendecomposition; ρ grows with the number of
  weights that entered or left the support since three iterations; conjugate gradients on the final support.
- SparseSwaps, 2512.10922: the best exchange of a pruned and a kept weight of a row, fixed weights, until none
  helps.

All take weights W (rows, K), the Hessian S (K, K) of every row, and either one number of weights to prune, or a
pattern (n, m), and return the mask, True = pruned, and the weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import lapack

from cbs_opt.solvers.kernels.compilation import entry
from cbs_opt.typing import BoolArray, FloatArray, IntArray

_BLOCK = 128  # columns of SparseGPT that share a mask
_EVERY = 3  # iterations of ADMM between two updates of ρ
_WARM = 30  # iterations before an unchanged support ends ADMM

Pattern = tuple[int, int]


def smallest(scores: FloatArray, count: int | None, pattern: Pattern | None = None) -> BoolArray:
    """The `count` smallest entries, or n of every m of a row; bool like `scores`."""
    if pattern is not None:
        n, m = pattern
        cells = scores.reshape(scores.shape[0], -1, m)
        return (np.argsort(np.argsort(cells, axis=2), axis=2) < n).reshape(scores.shape)
    assert count is not None
    out = np.zeros(scores.size, dtype=bool)
    if count:
        out[np.argpartition(scores.ravel(), count - 1)[:count]] = True
    return out.reshape(scores.shape)


def refit(W: FloatArray, S: FloatArray, pruned: BoolArray) -> FloatArray:
    """Exact refit of each row on its support by Cholesky factorisations."""
    B, out = W @ S, np.zeros_like(W)
    for r in range(W.shape[0]):
        kept = np.flatnonzero(~pruned[r])
        if kept.size:
            out[r, kept] = lapack.dposv(S[np.ix_(kept, kept)], B[r, kept])[1]
    return out


def magnitude(W: FloatArray, S: FloatArray, count: int | None, pattern: Pattern | None = None) -> BoolArray:
    """The smallest |w|."""
    return smallest(np.abs(W), count, pattern)


def wanda(W: FloatArray, S: FloatArray, per_row: IntArray) -> BoolArray:
    """The smallest |w| √S_ii of every row."""
    scores = np.abs(W) * np.sqrt(np.diag(S))
    return np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1) < per_row[:, None]


def sparsegpt(
    W: FloatArray, S: FloatArray, count: int | None, pattern: Pattern | None = None
) -> tuple[BoolArray, FloatArray]:
    """One pass of SparseGPT with blocks of 128 columns, without the refit."""
    K = W.shape[1]
    W = W.copy()
    factor = lapack.dpotrf(S, lower=1)[0]
    inverse = lapack.dpotri(factor, lower=1)[0]
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    U = np.ascontiguousarray(np.triu(lapack.dpotrf(inverse, lower=0)[0]))
    pruned = np.zeros(W.shape, dtype=bool)
    left = count
    for start in range(0, K, _BLOCK):
        stop = min(start + _BLOCK, K)
        part = W[:, start:stop].copy()
        mask = np.zeros(part.shape, dtype=bool)
        if pattern is None:
            assert left is not None and count is not None
            here = left if stop == K else round(count * (stop - start) / K)
            mask = smallest(part**2 / np.diag(U)[start:stop] ** 2, here)
            left -= here
        errors = np.empty_like(part)
        inner = np.ascontiguousarray(U[start:stop, start:stop])
        for c in range(stop - start):
            if pattern is not None and c % pattern[1] == 0:
                cell = slice(c, c + pattern[1])
                mask[:, cell] = smallest(
                    part[:, cell] ** 2 / np.diag(inner)[cell] ** 2, None, (pattern[0], pattern[1])
                )
            error = np.where(mask[:, c], part[:, c], 0.0) / inner[c, c]
            part[:, c:] -= error[:, None] * inner[c, c:]
            part[mask[:, c], c] = 0.0
            errors[:, c] = error
        W[:, start:stop], pruned[:, start:stop] = part, mask
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return pruned, W


def alps(
    W: FloatArray,
    S: FloatArray,
    count: int | None,
    pattern: Pattern | None = None,
    rho: float = 0.1,
    iterations: int = 300,
    gradients: int = 200,
    tolerance: float = 1e-12,
) -> tuple[BoolArray, FloatArray]:
    """ADMM with growing ρ, then conjugate gradients on the support (`gradients` at most), all rows at once."""
    scale = np.sqrt(np.diag(S))
    G = S / scale[:, None] / scale
    kind = W.dtype
    values, Q = np.linalg.eigh(G)
    V = W * scale
    target = V @ G
    D, dual = V.copy(), np.zeros_like(V)
    kept_number = W.size - (count if count is not None else 0)
    if pattern is not None:
        kept_number = W.size - W.size // pattern[1] * pattern[0]
    pruned = smallest(np.abs(D), count, pattern)
    before = ~pruned
    D[pruned] = 0.0
    for step in range(iterations):
        X = ((target - dual + rho * D) @ Q / (values + rho)) @ Q.T
        D = X + dual / rho
        pruned = smallest(np.abs(D), count, pattern)
        D[pruned] = 0.0
        dual += rho * (X - D)
        if (step + 1) % _EVERY == 0:
            changed = int((before != ~pruned).sum())
            if changed >= 0.1 * kept_number:
                rho *= 1.3
            elif changed >= 0.005 * kept_number:
                rho *= 1.2
            elif changed >= 1:
                rho *= 1.1
            elif step + 1 >= _WARM:
                break
            before = ~pruned
    kept = (~pruned).astype(kind)
    residual = (target - D @ G) * kept
    direction, energy = residual.copy(), np.einsum("rk,rk->r", residual, residual)
    goal = tolerance * energy
    for _ in range(gradients):
        if (energy <= goal).all():
            break
        image = (direction @ G) * kept
        bend = np.einsum("rk,rk->r", direction, image)
        length = np.where(bend > 0, energy / np.where(bend > 0, bend, 1), 0).astype(kind)
        D += length[:, None] * direction
        residual -= length[:, None] * image
        new = np.einsum("rk,rk->r", residual, residual)
        direction = residual + np.where(energy > 0, new / np.where(energy > 0, energy, 1), 0)[:, None] * direction
        energy = new
    return pruned, D / scale


@entry
def _best_exchanges(S: Any, w: Any, pruned: Any, limit: int) -> int:
    K = w.size
    effect = np.zeros(K)  # S w_P
    for i in range(K):
        if pruned[i]:
            for k in range(K):
                effect[k] += S[i, k] * w[i]
    for done in range(limit):
        best, out, back = 0.0, -1, -1
        for i in range(K):
            if pruned[i]:
                leaves = w[i] * (S[i, i] * w[i] - 2.0 * effect[i])
                for j in range(K):
                    if not pruned[j]:
                        change = leaves + w[j] * (S[j, j] * w[j] + 2.0 * (effect[j] - S[i, j] * w[i]))
                        if change < best:
                            best, out, back = change, j, i
        if out < 0 or best > -1e-12 * abs(w @ effect):
            return done
        pruned[out], pruned[back] = True, False
        for k in range(K):
            effect[k] += S[out, k] * w[out] - S[back, k] * w[back]
    return limit


def sparse_swaps(W: FloatArray, S: FloatArray, pruned: BoolArray, limit: int = 1 << 30) -> tuple[BoolArray, int]:
    """Best exchanges row by row from a warm start; the mask and the number of exchanges."""
    out, total = pruned.copy(), 0
    for r in range(W.shape[0]):
        total += _best_exchanges(S, W[r], out[r], limit)
    return out, total
