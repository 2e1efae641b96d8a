"""Lower bounds for layers: one block-diagonal matrix below the stored Hessian serves all its rows.

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

import cbs_opt.solvers.layers.bound_kernels as kernels
from cbs_opt.solvers.layers.incumbent import Incumbent
from cbs_opt.solvers.layers.parallel import RowPool
from cbs_opt.solvers.layers.problem import Layer, LayerBudget
from cbs_opt.typing import BoolArray, FloatArray, IntArray

BLOCK = 9  # columns of a block
_LIFT = 0.02  # of [S⁻¹]_kk in Ω
_MEMORY = 0.5  # weight of the previous Ω relative to the current one
_BARRIER = 3e-3  # least μ
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

    def split(self, parts: int) -> list[LayerRelaxation]:
        """The rows in `parts` groups, each with a B of its own from here on."""
        out = []
        for rows in np.array_split(np.arange(self.w.shape[0]), min(parts, self.w.shape[0])):
            part = copy.copy(self)
            part.rows = self.rows[rows]
            for name in ("w", "scale", "u", "M", "kept", "hw", "y"):
                setattr(part, name, np.ascontiguousarray(getattr(self, name)[rows]))
            out.append(part)
        return out

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
        try:
            np.linalg.cholesky(self.S - B - margin * np.eye(self.S.shape[0]))
            for a, b in zip(self.starts[:-1], self.starts[1:], strict=True):
                np.linalg.cholesky(B[a:b, a:b])
        except np.linalg.LinAlgError:
            return False
        return True

    def refactor(self) -> None:
        """What depends on B: R, the factors of all subsets, Bw, and y from scratch."""
        self.R = self.S - self.B
        self.inverse_pivot = np.zeros((self.blocks, 1 << self.m))
        self.coefficient = np.zeros((self.blocks, 1 << self.m, self.m))
        kernels.subset_factors(self.B, self.starts, self.inverse_pivot, self.coefficient)
        self.hw = self.w @ self.B
        self.y = (self.u - self.w) @ self.R

    def sweep(self, price: FloatArray, sweeps: int, pool: RowPool) -> None:
        """Frank-Wolfe cycles on all rows; price : (rows,) of a kept weight, doubled, without the row's scale."""
        chunks = [slice(i, i + _CHUNK) for i in range(0, self.w.shape[0], _CHUNK)]

        def task(i: int) -> None:
            rows = chunks[i]
            kernels.sweep_rows(
                self.R, self.B, self.starts, self.inverse_pivot, self.coefficient, self.allowed, self.bits,
                self.w[rows], self.fixed, self.hw[rows], self.y[rows], self.u[rows], self.M[rows],
                self.kept[rows], price[rows], sweeps, pool.flag,
            )  # fmt: skip

        pool.map(task, range(len(chunks)))

    def tables(self) -> tuple[FloatArray, FloatArray, float]:
        """Constants of the rows (rows,), block values by number kept (rows, blocks, m + 1), rounding error."""
        self.y = (self.u - self.w) @ self.R
        h = self.hw - self.y
        out = np.empty((self.w.shape[0], self.blocks, self.m + 1))
        kernels.best_by_count(
            self.B, self.starts, self.inverse_pivot, self.coefficient, self.allowed, self.bits, self.w, self.fixed,
            h, out,
        )  # fmt: skip
        terms = (self.u + self.w) * self.y, self.w * self.hw
        constant = terms[1].sum(1) - terms[0].sum(1)
        sizes = self.scale @ (np.abs(terms[0]).sum(1) + np.abs(terms[1]).sum(1) + np.abs(h * self.w).sum(1))
        return constant, out, 1e-13 * float(sizes)

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
        B = old.copy()
        W = np.linalg.inv(self.S - B)
        parts = list(zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True))
        for a, b in parts:
            m = b - a
            target = self.lift[a:b, :m] if omega is None else _LIFT * self.lift[a:b, :m] + omega[a:b, :m]
            target = 0.5 * (target + target.T)
            here = 0.5 * (W[a:b, a:b] + W[a:b, a:b].T)
            try:
                root = np.linalg.cholesky(here)
                low = np.linalg.cholesky(0.9 * B[a:b, a:b])
            except np.linalg.LinAlgError:
                continue
            # In the metric of `here` the step is diagonal: 1 − μ/ω for each eigenvalue ω of the target.
            try:
                root = np.linalg.cholesky(here)
                low = np.linalg.cholesky(0.95 * B[a:b, a:b])
            except np.linalg.LinAlgError:
                continue
            inverse_root = np.linalg.inv(root)
            values, vectors = np.linalg.eigh(inverse_root @ target @ inverse_root.T)
            growth = np.clip(1 - barrier / np.maximum(values, 1e-300), -4.0, 0.8)
            lift = inverse_root.T @ vectors
            step = lift * growth @ lift.T
            inverse_low = np.linalg.inv(low)
            smallest = float(np.linalg.eigvalsh(inverse_low @ step @ inverse_low.T)[0])
            step *= min(1.0, -1.0 / smallest) if smallest < 0 else 1.0
            B[a:b, a:b] += step
            columns = W[:, a:b].copy()
            W += columns @ np.linalg.solve(np.eye(m) - step @ here, step) @ columns.T
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


def lagrangian_bound(
    tables: list[tuple[FloatArray, FloatArray, float]],
    scales: list[FloatArray],
    kept: int,
) -> tuple[float, float]:
    """The bound on the objective at the best price over all layers, and that price (doubled, with the scale).

    kept : how many weights stay. The price minimises a convex piecewise linear function: bisection of its slope.
    """
    values = [scale[:, None, None] * best for (_, best, _), scale in zip(tables, scales, strict=True)]

    def at(price: float) -> tuple[float, int]:
        total, number = price * kept, 0
        for value in values:
            shifted = value - price * np.arange(value.shape[2])
            choice = shifted.argmax(2)
            total += float(np.take_along_axis(shifted, choice[:, :, None], 2).sum())
            number += int(choice.sum())
        return total, number

    low, high = 0.0, max(float(v.max()) for v in values) + 1e-300
    for _ in range(45):
        middle = 0.5 * (low + high)
        _, number = at(middle)
        if number > kept:
            low = middle
        else:
            high = middle
        if number == kept:
            break
    price = min((low, middle, high), key=lambda p: at(p)[0])
    constant = sum(float(scale @ c) for (c, _, _), scale in zip(tables, scales, strict=True))
    total, _ = at(price)
    rounding = sum(t[2] for t in tables) + 1e-13 * abs(total)
    return 0.5 * (constant - total - rounding), price


class BoundSearch:
    """Bounds for all layers under their budget: Frank-Wolfe sweeps, steps of B and of the prices alternate.

    Parameters
    ----------
    layers : list of Layer
    budget : LayerBudget
    incumbent : Incumbent
        Its masks are the start; it receives the bounds.
    weights : list of float64 (rows, K)
        The refitted weights of the incumbent.
    pool : RowPool
    size : int
        Columns of a block at most.
    fixed : bool
        Whether kept weights are not updated (selection).
    price : float
        First price of a weight under one budget, in units of the objective; 0 for the one of the first bound.

    Attributes
    ----------
    value : float
        The last bound, which may be negative.
    """

    def __init__(
        self,
        layers: list[Layer],
        budget: LayerBudget,
        incumbent: Incumbent,
        weights: list[FloatArray],
        pool: RowPool,
        size: int = BLOCK,
        fixed: bool = False,
        price: float = 0.0,
    ) -> None:
        self.value = -np.inf
        self.budget, self.incumbent, self.pool = budget, incumbent, pool
        self._fixed = fixed
        self.parts: list[LayerRelaxation] = []
        self.layers = layers
        self._displacements, self._size = weights, size
        self.prices: list[FloatArray] = []
        if price > 0 and budget.total is not None:
            self.prices = [2 * price / layer.scale for layer in layers]
        self.barrier = 0.3
        self.omega: list[FloatArray | None] = [None] * len(layers)
        self.layer_of: list[int] = []

    def _kept_rows(self) -> list[FloatArray] | None:
        """The number of kept weights of each row, if the budget determines it."""
        if self.budget.per_row is None:
            return None
        return [
            (part.w.shape[1] - np.asarray(self.budget.per_row[k])[part.rows]).astype(np.float64)
            for k, part in zip(self.layer_of, self.parts, strict=True)
        ]

    def prepare(self) -> bool:
        """Relaxations and a first B for each layer; False if stopped."""
        for layer, displacement in zip(self.layers, self._displacements, strict=True):
            part = LayerRelaxation(layer, self.budget, displacement, self._size, self._fixed)
            if self.pool.stopped():
                return False
            part.first_blocks()
            self.parts.append(part)
            self.layer_of.append(len(self.layer_of))
            if self.pool.stopped():
                return False
        self.bound()
        return True

    def bound(self) -> float:
        """The bound at the present mixtures, reported."""
        tables = [part.tables() for part in self.parts]
        scales = [part.scale for part in self.parts]
        if self.budget.total is not None:
            kept = sum(layer.weights.size for layer in self.layers) - self.budget.total
            value, price = lagrangian_bound(tables, scales, kept)
            if not self.prices:
                self.prices = [price / scale for scale in scales]
        elif (kept_rows := self._kept_rows()) is not None:
            value, prices = 0.0, []
            for table, scale, kept_row in zip(tables, scales, kept_rows, strict=True):
                constant, best, rounding = table
                rows = [
                    lagrangian_bound([(constant[r : r + 1], best[r : r + 1], 0.0)], [scale[r : r + 1]], int(k))
                    for r, k in enumerate(kept_row)
                ]
                value += sum(row[0] for row in rows) - 0.5 * rounding
                prices.append(np.array([row[1] for row in rows]) / scale)
            if not self.prices:
                self.prices = prices
        else:
            value = 0.0
            for (constant, best, rounding), scale in zip(tables, scales, strict=True):
                value += 0.5 * (float(scale @ (constant - best.max(2).sum(1))) - rounding)
            if not self.prices:
                self.prices = [np.zeros(scale.size) for scale in scales]
        self.value = value
        self.incumbent.offer_bound(max(value, 0.0))  # S is positive semidefinite: 0 is a bound
        return value

    def step(self, sweeps: int) -> bool:
        """Sweeps at the present B and prices, the bound, then a step of both; False if stopped."""
        for part, price in zip(self.parts, self.prices, strict=True):
            part.sweep(price, sweeps, self.pool)
        self.bound()
        if self.pool.stopped():
            return False
        self._step_prices()
        unit = max(2 * self.incumbent.objective / len(self.parts), 1e-300)

        def improve(k: int) -> None:
            part, old = self.parts[k], self.omega[k]
            new = part.covariance() * (part.S.shape[0] / unit)
            omega = new if old is None else _MEMORY * old + (1 - _MEMORY) * new
            part.improve_blocks(omega, self.barrier)
            part.refactor()
            self.omega[k] = omega

        if not self.pool.map(improve, range(len(self.parts))):
            return False
        self.barrier = max(0.8 * self.barrier, _BARRIER)
        return True

    def split(self, parts: int) -> None:
        """From here on each layer's rows fall into `parts` groups, each with a B of its own."""
        new: list[LayerRelaxation] = []
        layer_of, prices = [], []
        for part, k, price in zip(self.parts, self.layer_of, self.prices, strict=True):
            offset = part.rows[0] if part.rows.size else 0
            for piece in part.split(parts):
                new.append(piece)
                layer_of.append(k)
                prices.append(np.ascontiguousarray(price[piece.rows - offset]))
        self.parts, self.layer_of, self.prices = new, layer_of, prices
        self.omega = [None] * len(new)

    def _step_prices(self) -> None:
        """Prices follow the numbers of kept weights of the mixtures, which are the slope of the bound in them."""
        if self.budget.total is not None:
            kept = sum(layer.weights.size for layer in self.layers) - self.budget.total
            ratio = sum(float(part.kept.sum()) for part in self.parts) / max(kept, 1e-9)
            factor = float(np.clip(ratio, 0.6, 1.6))
            self.prices = [np.maximum(price, 1e-300) * factor for price in self.prices]
        elif (kept_rows := self._kept_rows()) is not None:
            self.prices = [
                np.maximum(price, 1e-300) * np.clip(part.kept.sum(1) / np.maximum(kept, 1e-9), 0.6, 1.6)
                for price, part, kept in zip(self.prices, self.parts, kept_rows, strict=True)
            ]
