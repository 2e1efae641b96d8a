"""The relaxation behind lower bounds for layers: a block-diagonal matrix below the stored Hessian.

With S = R + B, R positive semidefinite and B block-diagonal with small blocks, the doubled loss of a row is
(v − w)ᵀR(v − w) + (v − w)ᵀB(v − w). The first term is at least its tangent at any u, which leaves a problem for
each block, solved over all kept sets κ of the block. With h = Bw − R(u − w) and a price λ for each kept weight,

    loss ≥ −(u − w)ᵀR(u − w) − 2 wᵀR(u − w) + wᵀBw − Σ_blocks max_κ (h_κᵀB_κκ⁻¹h_κ − λ|κ|) − λ · (number kept).

With fixed weights (selection) the value of a kept set is 2 h_κᵀw_κ − w_κᵀB_κκ w_κ instead of its maximum over v.
Blocks of one column give the perspective bound for a diagonal D = B; larger blocks convexify the correlations
inside of them exactly. The best u is found by block-coordinate Frank-Wolfe steps, B by block-coordinate
ascent in Σ ⟨Ω_k, B_k⟩ + μ log det(S − B), where Ω, the derivative of the bound in B, is the covariance of the
mixture of kept sets, summed over the rows: the semidefinite program of the best B.
"""

from __future__ import annotations

import copy

import numpy as np
from scipy.linalg import lapack

import cbs_opt.solvers.layers.bound_kernels as kernels
from cbs_opt.solvers.layers.parallel import RowPool, StopFlag
from cbs_opt.solvers.layers.problem import Layer, LayerBudget
from cbs_opt.typing import BoolArray, FloatArray, IntArray

BLOCK = 9  # columns of a block
_LIFT = 0.02  # of [S⁻¹]_kk in Ω
_CHUNK = 16  # rows that go through a sweep together


def correlated_blocks(S: FloatArray, size: int) -> tuple[IntArray, IntArray]:
    """Columns grouped greedily by the size of their correlations: an order (K,), and where blocks start in it."""
    K = S.shape[0]
    root = 1 / np.sqrt(np.maximum(np.diag(S), 1e-300))
    strength = np.abs(S * root[:, None] * root)
    rows, columns = np.triu_indices(K, 1)
    strong = strength[rows, columns]
    number = min(strong.size, 40 * K)
    order = np.argpartition(-strong, number - 1)[:number] if number < strong.size else np.arange(strong.size)
    order = order[np.argsort(-strong[order], kind="stable")]
    member = np.arange(K)
    groups: dict[int, list[int]] = {i: [i] for i in range(K)}
    for pair in order:
        a, b = int(member[rows[pair]]), int(member[columns[pair]])
        if a != b and len(groups[a]) + len(groups[b]) <= size:
            member[groups[b]] = a
            groups[a] += groups.pop(b)
    blocks = sorted(groups.values(), key=min)
    # Small left-overs are put together: an empty correlation costs nothing.
    merged: list[list[int]] = []
    for block in sorted(blocks, key=len, reverse=True):
        home = next((m for m in merged if len(m) + len(block) <= size), None) if len(block) < size else None
        if home is None:
            merged.append(list(block))
        else:
            home += block
    return np.concatenate([np.sort(b) for b in merged]), np.cumsum([0] + [len(b) for b in merged])


def _inverse(A: FloatArray) -> FloatArray | None:
    """The inverse of a positive definite A, however close to singular, which is overwritten; None if it is not."""
    factor, info = lapack.dpotrf(A.T, lower=1, clean=0, overwrite_a=1)  # of a symmetric matrix: no copy
    if info:
        return None
    inverse = lapack.dpotri(factor, lower=1, overwrite_c=1)[0].T
    return np.asarray(np.triu(inverse) + np.triu(inverse, 1).T)


class LayerRelaxation:
    """The relaxation of one layer for one B, with a mixture for each row.

    Parameters
    ----------
    layer : Layer
    budget : LayerBudget
        Only whether it is a pattern matters here; then the blocks are made of whole cells.
    displacement : float64 (rows, K)
        Weights of an incumbent, the start of u.
    size : int
        Columns of a block at most.
    fixed : bool
        Whether kept weights are not updated: the bound is then one on the selection loss.
    """

    def __init__(
        self, layer: Layer, budget: LayerBudget, displacement: FloatArray, size: int = BLOCK, fixed: bool = False
    ) -> None:
        self.layer, self.fixed = layer, fixed
        self.rows = np.arange(layer.rows)
        if budget.pattern is None:
            self.order, self.starts = correlated_blocks(layer.hessian, size)
        else:
            m = budget.pattern[1]
            width = m * max(1, size // m)
            self.order = np.arange(layer.columns)
            self.starts = np.append(np.arange(0, layer.columns, width), layer.columns)
        self.S = np.ascontiguousarray(layer.hessian[np.ix_(self.order, self.order)])
        self.w = np.ascontiguousarray(layer.weights[:, self.order])
        self.scale = layer.scale
        self.m = int(np.diff(self.starts).max())
        self.blocks = self.starts.size - 1
        self.bits = np.array([int(s).bit_count() for s in range(1 << self.m)], dtype=np.int64)
        self.allowed = self._allowed(budget)
        self.B = self._first()
        self.u = np.ascontiguousarray(displacement[:, self.order])
        rows = self.w.shape[0]
        self.M = np.zeros((rows, self.w.shape[1], self.m))
        self.kept = np.zeros((rows, self.blocks))
        for k in range(self.blocks):
            a, b = self.starts[k], self.starts[k + 1]
            self.M[:, a:b, : b - a] = self.u[:, a:b, None] * self.u[:, None, a:b]
            self.kept[:, k] = (self.u[:, a:b] != 0).sum(1)
        inverse = np.linalg.inv(self.S)
        self.lift = np.zeros((self.S.shape[0], self.m))
        for a, b in zip(self.starts[:-1], self.starts[1:], strict=True):
            self.lift[a:b, : b - a] = inverse[a:b, a:b]
        self.refactor()

    def of_row(self, r: int) -> LayerRelaxation:
        """The relaxation of one row, with a mixture and a B of its own from here on."""
        part = copy.copy(self)
        part.rows = self.rows[r : r + 1]
        for name in ("w", "scale", "u", "M", "kept", "hw", "y"):
            setattr(part, name, getattr(self, name)[r : r + 1].copy())
        part.B = self.B.copy()
        return part

    def blocks_of(self) -> FloatArray:
        """The diagonal blocks of B, (K, m)."""
        out = np.zeros((self.B.shape[0], self.m))
        for a, b in zip(self.starts[:-1], self.starts[1:], strict=True):
            out[a:b, : b - a] = self.B[a:b, a:b]
        return out

    def set_blocks(self, blocks: FloatArray) -> None:
        """B with these diagonal blocks, (K, m), as from `blocks_of`; the caller calls `refactor`."""
        self.B = np.zeros_like(self.S)
        for a, b in zip(self.starts[:-1], self.starts[1:], strict=True):
            self.B[a:b, a:b] = blocks[a:b, : b - a]

    def _allowed(self, budget: LayerBudget) -> BoolArray:
        allowed = np.zeros((self.blocks, 1 << self.m), dtype=bool)
        for k, m in enumerate(np.diff(self.starts)):
            allowed[k, : 1 << m] = True
        if budget.pattern is not None:
            n, m = budget.pattern
            subsets = np.arange(1 << self.m)
            for k, width in enumerate(np.diff(self.starts)):
                for cell in range(width // m):
                    allowed[k] &= self.bits[subsets >> (cell * m) & ((1 << m) - 1)] == m - n
        return allowed

    def _first(self) -> FloatArray:
        """θ times the diagonal blocks of S, θ the largest that keeps S − B positive semidefinite."""
        B, inverse_root = np.zeros_like(self.S), np.zeros_like(self.S)
        for a, b in zip(self.starts[:-1], self.starts[1:], strict=True):
            part = slice(a, b)
            B[part, part] = self.S[part, part]
            values, vectors = np.linalg.eigh(self.S[part, part])
            values = np.maximum(values, 1e-300)
            inverse_root[part, part] = vectors / np.sqrt(values) @ vectors.T
        theta = float(np.linalg.eigvalsh(inverse_root @ self.S @ inverse_root)[0])
        return np.asarray(B * max(theta * (1 - 1e-6), 1e-12))

    def is_valid(self, B: FloatArray) -> bool:
        """Whether S − B is positive definite by more than the rounding of its Cholesky factorisation."""
        margin = 1e-15 * self.S.shape[0] * float(np.diag(self.S).max())
        rest = self.S - B
        rest[np.diag_indices_from(rest)] -= margin
        return lapack.dpotrf(rest.T, lower=1, overwrite_a=1, clean=0)[1] == 0 and bool(
            kernels.blocks_are_definite(B, self.starts)
        )

    def refactor(self) -> None:
        """What depends on B: R, the factors of all subsets, Bw, and y from scratch."""
        self.R = self.S - self.B
        self.inverse_pivot = np.zeros((self.blocks, 1 << self.m))
        self.coefficient = np.zeros((self.blocks, 1 << self.m, self.m))
        kernels.subset_factors(self.B, self.starts, self.inverse_pivot, self.coefficient)
        largest = np.maximum.reduceat(np.diag(self.B), self.starts[:-1])
        self.condition = np.ones(self.blocks)
        if not self.fixed:  # fixed weights need no pivots
            self.condition = np.clip(largest * self.inverse_pivot.max(1), 1.0, 1e200)
        self.hw = self.w @ self.B
        self.y = (self.u - self.w) @ self.R

    def sweep(self, price: FloatArray, sweeps: int, close: float, pool: RowPool) -> None:
        """At most so many Frank-Wolfe cycles on all rows, until the sum of their gaps is at most `close`.

        price : (rows,) of a kept weight, doubled, without the row's scale; close : doubled, with the scales.
        """
        chunks = [slice(i, i + _CHUNK) for i in range(0, self.w.shape[0], _CHUNK)]
        share = close / len(chunks)
        pool.map(lambda i: self.sweep_rows(chunks[i], price, sweeps, share, pool.flag), range(len(chunks)))

    def sweep_rows(self, rows: slice, price: FloatArray, sweeps: int, close: float, flag: StopFlag) -> float:
        """Cycles on some rows, in the calling thread; the sum of the gaps left in the last one."""
        return float(
            kernels.sweep_rows(
                self.R, self.B, self.starts, self.inverse_pivot, self.coefficient, self.allowed, self.bits,
                self.w[rows], self.scale[rows], self.fixed, self.hw[rows], self.y[rows], self.u[rows],
                self.M[rows], self.kept[rows], price[rows], sweeps, close, flag,
            )
        )  # fmt: skip

    def tables_of_rows(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Constants (rows,), block values by number kept (rows, blocks, m + 1), rounding errors (rows,).

        The rounding errors have the scales of the rows, the others have not.
        """
        self.y = (self.u - self.w) @ self.R
        h = self.hw - self.y
        out = np.empty((self.w.shape[0], self.blocks, self.m + 1))
        kernels.best_by_count(
            self.B, self.starts, self.inverse_pivot, self.coefficient, self.allowed, self.bits, self.w, self.fixed,
            h, out,
        )  # fmt: skip
        terms = (self.u + self.w) * self.y, self.w * self.hw
        constant = terms[1].sum(1) - terms[0].sum(1)
        sizes = np.abs(terms[0]).sum(1) + np.abs(terms[1]).sum(1) + np.abs(h * self.w).sum(1)
        # The digits that the values of a block lose grow with its condition.
        sizes += 0.01 * self.m * (np.maximum(out.max(2), 0) @ self.condition)
        return constant, out, 1e-13 * self.scale * sizes

    def tables(self) -> tuple[FloatArray, FloatArray, float]:
        """The same with the sum of the rounding errors."""
        constant, out, rounding = self.tables_of_rows()
        return constant, out, float(rounding.sum())

    # The best B ----------------------------------------------------------------------------------------------

    def covariance(self) -> FloatArray:
        """Ω, (K, m): for each block the covariance of the mixtures, summed over the rows with their scales."""
        out = np.einsum("r,rkj->kj", self.scale, self.M)
        for a, b in zip(self.starts[:-1], self.starts[1:], strict=True):
            part = self.u[:, a:b]
            out[a:b, : b - a] -= (part * self.scale[:, None]).T @ part
        return np.asarray(out)

    def improve_blocks(self, omega: FloatArray | None, barrier: float) -> None:
        """One cycle of block steps towards W_kk = Ω_k / μ, W = (S − B)⁻¹.

        Ω is lifted by a small multiple of [S⁻¹]_kk, so that B stays away from zero where the mixtures have no
        variance; that alone is taken without Ω. A step that rounding has spoilt is shortened until S − B is
        positive definite. The caller calls `refactor` before the next sweep.

        omega : (K, m), in units in which the sum of its products with B is about K; barrier : μ.
        """
        old = self.B
        target = self.lift if omega is None else _LIFT * self.lift + omega
        B, W = old.copy(), _inverse(self.S - old)
        if W is None:
            return
        kernels.ascend_blocks(W, B, target, self.starts, barrier)
        for length in (1.0, 0.9, 0.6, 0.3, 0.1, 0.01):
            self.B = old + length * (B - old)
            if self.is_valid(self.B):
                return
        self.B = old

    def first_blocks(self) -> None:
        """A first B, for Ω = [S⁻¹]_kk."""
        for barrier in (1.0, 0.7, 0.5, 0.4, 0.3, 0.2):
            self.improve_blocks(None, barrier)
        self.refactor()
