"""Products with Q = diag(w) H diag(w) and parts of it, block by block, without forming it where it is large."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Protocol

import numpy as np

from cbs_opt.curvature import GradientFactor
from cbs_opt.instance import Instance
from cbs_opt.interrupt import checkpoint, question
from cbs_opt.memory import require_bytes
from cbs_opt.solvers.kernels import selection_numba as kernels
from cbs_opt.solvers.kernels import sweeps_numba as sweep_kernels
from cbs_opt.solvers.kernels.threads import run_tasks
from cbs_opt.solvers.problem.presolve import Component
from cbs_opt.typing import FloatArray, IntArray, RealArray

DENSE_BYTES = 1 << 28
"""All blocks of a gradient factor together are expanded when their squares fit into this."""

PARALLEL_PRODUCT = 50_000
"""Variables beyond which a product from scratch is computed in threads."""

DOUBLE_BYTES = 1 << 30
"""Rows of a gradient factor are kept in float64 up to this size in all, in float32 beyond."""


_PIECE = 1 << 22  # entries of gradients that are transposed at a time


class Block(Protocol):
    """Q of one component, (b, b)."""

    size: int

    def diagonal(self) -> FloatArray:
        """Q_ii, float64 (b,)."""

    def add_product(self, index: IntArray, value: FloatArray, out: FloatArray) -> None:
        """Add Q[:, index] @ value to `out`, float64 (b,)."""

    def submatrix(self, index: IntArray) -> FloatArray:
        """Q[index, index], float64."""

    def cross(self, rows: IntArray, columns: IntArray) -> FloatArray:
        """Q[rows, columns], float64."""


class DiagonalBlock:
    """Q = diag(values); zeros for the uncoupled weights of a presolved problem, whose cost is linear."""

    def __init__(self, values: FloatArray) -> None:
        self.values = values
        self.size = values.size

    def diagonal(self) -> FloatArray:
        """Q_ii."""
        return self.values

    def add_product(self, index: IntArray, value: FloatArray, out: FloatArray) -> None:
        """O(len(index))."""
        out[index] += self.values[index] * value

    def submatrix(self, index: IntArray) -> FloatArray:
        """A diagonal matrix."""
        return np.diag(self.values[index])

    def cross(self, rows: IntArray, columns: IntArray) -> FloatArray:
        """Zero unless row and column are the same weight."""
        return np.where(rows[:, None] == columns[None, :], self.values[rows][:, None], 0.0)


class DenseBlock:
    """Q held as a matrix, float64 (b, b)."""

    def __init__(self, Q: FloatArray) -> None:
        self.Q = np.ascontiguousarray(Q)
        self.size = Q.shape[0]

    def diagonal(self) -> FloatArray:
        """Q_ii."""
        return self.Q.diagonal().copy()

    def add_product(self, index: IntArray, value: FloatArray, out: FloatArray) -> None:
        """O(b len(index)); Q is symmetric, so rows are read."""
        kernels.add_rows(self.Q, index, value, out)

    def submatrix(self, index: IntArray) -> FloatArray:
        """A copy of the rows and columns."""
        return self.Q[np.ix_(index, index)]

    def cross(self, rows: IntArray, columns: IntArray) -> FloatArray:
        """A copy of the entries."""
        return self.Q[np.ix_(rows, columns)]


class FactorBlock:
    """Q = A Aᵀ + diag(ridge), with one row of A, w_i g_i / √m, for each weight.

    Parameters
    ----------
    rows : float32 or float64 (b, m)
        Sums are accumulated in float64 either way.
    ridge : float64 (b,)
        λ w_i².
    """

    def __init__(self, rows: RealArray, ridge: FloatArray) -> None:
        self.rows, self.ridge = rows, ridge
        self.size = rows.shape[0]

    def diagonal(self) -> FloatArray:
        """Q_ii; O(m b)."""
        return np.asarray(kernels.row_norms(self.rows) + self.ridge)

    def add_product(self, index: IntArray, value: FloatArray, out: FloatArray) -> None:
        """O(m (b + len(index)))."""
        kernels.add_dots(self.rows, kernels.combine_rows(self.rows, index, value), out)
        out[index] += self.ridge[index] * value

    def submatrix(self, index: IntArray) -> FloatArray:
        """O(m len(index)²)."""
        A = self.rows[index].astype(np.float64, copy=False)
        Q = A @ A.T
        Q[np.diag_indices(index.size)] += self.ridge[index]
        return np.asarray(Q)

    def cross(self, rows: IntArray, columns: IntArray) -> FloatArray:
        """O(m) per entry."""
        Q = self.rows[rows].astype(np.float64) @ self.rows[columns].astype(np.float64).T
        return np.asarray(Q + np.where(rows[:, None] == columns[None, :], self.ridge[rows][:, None], 0.0))


class Columns:
    """The blocks of a presolved problem in one index range; no terms across blocks.

    Attributes
    ----------
    starts : int64 (K+1,)
        Block k holds the variables starts[k] … starts[k+1]-1.
    diagonal : float64 (r,)
    block_of : int64 (r,)
    """

    def __init__(self, blocks: list[Block], threads: int = 1, parallel_product: int = PARALLEL_PRODUCT) -> None:
        self.blocks, self.threads, self.parallel_product = blocks, threads, parallel_product
        sizes = np.array([block.size for block in blocks], dtype=np.int64)
        self.starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
        self.diagonal = np.concatenate([np.zeros(0), *(block.diagonal() for block in blocks)])
        self.block_of = np.repeat(np.arange(sizes.size), sizes)

    @property
    def n(self) -> int:
        """Number of variables."""
        return int(self.starts[-1])

    def split(self, index: IntArray) -> Iterator[tuple[int, Block, slice, IntArray]]:
        """Yield block number, block, slice of `index`, local indices; `index` sorted by block."""
        blocks, first = np.unique(self.block_of[index], return_index=True)
        for b, start, stop in zip(blocks.tolist(), first, [*first[1:], index.size][: first.size], strict=True):
            yield b, self.blocks[b], slice(start, stop), index[start:stop] - self.starts[b]

    def add_product(self, index: IntArray, value: FloatArray, out: FloatArray) -> None:
        """Add Q[:, index] @ value to `out`, float64 (r,)."""
        for b, block, part, local in self.split(index):
            block.add_product(local, value[part], out[self.starts[b] : self.starts[b + 1]])

    def product(self, x: FloatArray) -> FloatArray:
        """Q x from scratch, float64 (r,)."""
        out = np.zeros(self.n)

        def add(part: slice, halted: Callable[[], bool]) -> None:
            index = part.start + np.flatnonzero(x[part])
            self.add_product(index, x[index], out)

        # Nearly equal parts, cut at the blocks; the sums do not depend on where the cuts are.
        parts = 4 * self.threads if self.n > self.parallel_product else 1
        cuts = np.unique(self.starts[np.searchsorted(self.starts, np.linspace(0, self.n, parts + 1))])
        tasks = [partial(add, slice(int(a), int(b))) for a, b in pairwise(cuts.tolist())]
        run_tasks(self.threads if len(tasks) > 1 else 1, tasks, lambda: False)
        return out


def columns_of(
    instance: Instance,
    components: Sequence[Component],
    scale: float,
    threads: int = 1,
    dense_bytes: int = DENSE_BYTES,
    double_bytes: int = DOUBLE_BYTES,
) -> Columns:
    """Build the blocks of presolved components, in units of `scale`.

    Notes
    -----
    Memory: Σ b² for dense curvature and for gradient factors with Σ 8b² ≤ `dense_bytes`; O(m r) otherwise, in
    float32 where float64 would take more than `double_bytes`.
    """
    factor = instance.curvature.as_factor()
    sizes = [component.index.size for component in components if component.coupled]
    expanded = factor is None or sum(8 * size**2 for size in sizes) <= dense_bytes
    if factor is None:
        require_bytes(sum(8.0 * size**2 for size in sizes), "all dense blocks at once")
    double = expanded or (factor is not None and 8 * sum(sizes) * factor.m <= double_bytes)
    blocks: list[Block] = [DiagonalBlock(np.zeros(0))] * len(components)

    def make(k: int, halted: Callable[[], bool]) -> None:
        blocks[k] = _block(instance, components[k], scale, expanded, double, halted)

    # Dense blocks are multiplied by BLAS, which has threads of its own.
    run_tasks(1 if expanded else threads, [partial(make, k) for k in range(len(components))], question())
    checkpoint()
    return Columns(blocks, threads)


def _block(
    instance: Instance,
    component: Component,
    scale: float,
    expanded: bool,
    double: bool,
    halted: Callable[[], bool],
) -> Block:
    curvature = instance.curvature
    if not component.coupled:
        return DiagonalBlock(np.zeros(component.index.size))
    w = instance.weights[component.index]
    part = curvature.block_slice(component.block)
    local = component.index - part.start
    gradients = curvature.as_factor()
    if gradients is None:
        whole = local.size == part.stop - part.start
        H = curvature.block(component.block) if whole else curvature.submatrix(component.block, local, local)
        return DenseBlock(H * w[:, None] * (w / scale))
    rows = _rows(gradients, component.block, local, w / np.sqrt(gradients.m * scale), double, halted)
    factor = FactorBlock(rows, gradients.damping * w**2 / scale)
    return DenseBlock(factor.submatrix(np.arange(w.size))) if expanded else factor


def _rows(
    curvature: GradientFactor,
    k: int,
    local: IntArray,
    factor: FloatArray,
    double: bool,
    halted: Callable[[], bool],
) -> RealArray:
    """Rows w_i g_i of the weights `local`, in pieces between which it may be told to break off."""
    rows = np.empty((local.size, curvature.m), np.float64 if double else np.float32)
    width = max(1, _PIECE // curvature.m)
    for first in range(0, local.size, width):
        if first and halted():
            break
        piece = slice(first, first + width)
        sweep_kernels.scaled_transpose(
            curvature.gradients, local[piece] + curvature.offsets[k], factor[piece], rows[piece]
        )
    return rows
