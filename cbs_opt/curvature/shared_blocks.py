"""Blocks that share one stored Hessian up to a factor: the rows of a layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cbs_opt.curvature.base import LARGE_BLOCK, Curvature, SharedRows
from cbs_opt.curvature.row_updates import Pace, factored_rows, long_rows, update_rows
from cbs_opt.errors import InstanceError
from cbs_opt.interrupt import checkpoint
from cbs_opt.typing import BoolArray, FloatArray, IntArray
from cbs_opt.view import text

_CACHE_BYTES = 1 << 30  # of inverses of stored blocks
_BATCH_BYTES = 1 << 27  # of the systems of one batch of updates
_LARGEST_SCALE = 1e100  # of a block; beyond it products overflow
_FEW = 2.0  # of a row with fewer pruned weights than kept ones by this factor the stored block knows best
_BATCH_LARGEST = 96  # weights of a block; beyond this LAPACK alone keeps a core busy


class SharedBlocks(Curvature):
    """H with the blocks H_k = block_scale_k · S_{shared_k}.

    Parameters
    ----------
    stored : Curvature
        The stored blocks S, in one of the other forms.
    shared : int64 (K,)
        The stored block that block k uses; every stored block is used.
    block_scale : float (K,), optional
        Positive; 1 by default.

    Raises
    ------
    InstanceError
        Wrong shape or type, an index without a stored block, an unused stored block, a scale that is not positive
        and finite.

    Notes
    -----
    Memory and checks are those of the stored blocks. Products with all blocks of one stored block are one matrix
    product; its inverse is computed once, and cached while the cached inverses are below 1 GiB in total.
    """

    format_version = 2

    def __init__(self, stored: Curvature, shared: ArrayLike, block_scale: ArrayLike | None = None) -> None:
        if stored.indefinite_blocks:
            raise InstanceError(
                f"stored block {stored.indefinite_blocks[0]} must be positive semidefinite, but it is indefinite: "
                "only blocks that are not shared may be"
            )
        self.stored = stored
        self.kind = stored.kind  # type: ignore[misc]
        self.shared = _indices(shared, stored.number_of_blocks)
        self.block_scale = _scales(block_scale, self.shared.size)
        self._set_blocks(stored.block_sizes[self.shared])
        self._inverses: OrderedDict[int, FloatArray] = OrderedDict()
        order = np.argsort(self.shared, kind="stable")
        cuts = np.cumsum(np.bincount(self.shared, minlength=stored.number_of_blocks))[:-1]
        self._rows = np.split(order, cuts)

    @property
    def number_of_stored(self) -> int:
        """Number of stored blocks."""
        return self.stored.number_of_blocks

    def facts(self) -> text.Facts:
        """Names and values for a person: those of all blocks, and what is stored."""
        scaled = ", each times a factor a block" if (self.block_scale != 1.0).any() else ", shared"
        stored = f"{text.count(self.number_of_stored, 'block')}{scaled}"
        return [*super().facts(), ("stored", stored), *self.stored.facts()[2:]]

    def rows(self, s: int) -> IntArray:
        """The blocks that use stored block s, int64, increasing."""
        return self._rows[s]

    def gathered(self, s: int) -> IntArray:
        """The weights of the blocks of stored block s, int64 (len(rows(s)), b)."""
        return self.offsets[self._rows[s]][:, None] + np.arange(self.stored.block_sizes[s])

    def _each(self) -> Iterator[tuple[int, slice | IntArray, int, FloatArray]]:
        """Stored block, its weights row by row, number of rows, and their scales."""
        for s, rows in enumerate(self._rows):
            b = int(self.stored.block_sizes[s])
            index: slice | IntArray
            if rows[-1] - rows[0] + 1 == rows.size:  # one after the other in memory
                start = int(self.offsets[rows[0]])
                index = slice(start, start + rows.size * b)
            else:
                index = self.gathered(s).ravel()
            yield s, index, rows.size, self.block_scale[rows]

    def stored_inverse(self, s: int) -> FloatArray:
        """S⁻¹ of stored block s, float64 (b, b); O(b³) the first time. Do not write to it."""
        if s in self._inverses:
            self._inverses.move_to_end(s)
            return self._inverses[s]
        self._inverses[s] = self.stored.inverse_block(s)
        kept = sum(inverse.nbytes for inverse in self._inverses.values())
        while kept > _CACHE_BYTES and len(self._inverses) > 1:
            kept -= self._inverses.popitem(last=False)[1].nbytes
        return self._inverses[s]

    def shared_rows(self) -> list[SharedRows]:
        """The rows of each stored block."""
        return [
            SharedRows(self.gathered(s), self.stored.block(s), self.block_scale[self._rows[s]])
            for s in range(self.number_of_stored)
        ]

    # The interface of all kinds ------------------------------------------------------------------------------

    def _of(self, k: int) -> tuple[int, float]:
        return int(self.shared[k]), float(self.block_scale[k])

    def diagonal(self) -> FloatArray:
        """H_ii, float64 (n,)."""
        return self._spread(self.stored.diagonal(), self.block_scale)

    def inverse_diagonal(self) -> FloatArray:
        """[H⁻¹]_ii, float64 (n,); O(b³) per stored block."""
        inverses = [self.stored_inverse(s).diagonal() for s in range(self.number_of_stored)]
        return self._spread(np.concatenate(inverses), 1.0 / self.block_scale)

    def _spread(self, values: FloatArray, factor: FloatArray) -> FloatArray:
        """Values over the stored weights, copied to all blocks, times a factor per block, float64 (n,)."""
        out = np.empty(self.n)
        for s, index, _, _ in self._each():
            out[index] = np.outer(factor[self._rows[s]], values[self.stored.block_slice(s)]).ravel()
        return out

    def block(self, k: int) -> FloatArray:
        """H of block k; a view where its scale is 1."""
        s, scale = self._of(k)
        S = self.stored.block(s)
        return S if scale == 1.0 else scale * S

    def inverse_block(self, k: int) -> FloatArray:
        """H⁻¹ of block k."""
        s, scale = self._of(k)
        inverse = self.stored_inverse(s)
        return inverse if scale == 1.0 else inverse / scale

    def columns(self, k: int, index: IntArray) -> FloatArray:
        """Columns of H of block k."""
        s, scale = self._of(k)
        return scale * self.stored.columns(s, index)

    def submatrix(self, k: int, rows: IntArray, columns: IntArray) -> FloatArray:
        """H[rows, columns] of block k."""
        s, scale = self._of(k)
        return scale * self.stored.submatrix(s, rows, columns)

    def block_matmul(self, k: int, x: FloatArray) -> FloatArray:
        """H x for block k."""
        s, scale = self._of(k)
        return scale * self.stored.block_matmul(s, x)

    def matmul(self, x: FloatArray) -> FloatArray:
        """H x over all blocks: one matrix product per stored block."""
        out = np.empty(x.shape, dtype=np.float64)
        for s, index, rows, scales in self._each():
            b, columns = int(self.stored.block_sizes[s]), x.shape[1:]
            X = np.moveaxis(x[index].reshape(rows, b, *columns), 0, 1).reshape(b, -1)
            Y = self.stored.block_matmul(s, X).reshape(b, rows, *columns)
            Y = np.moveaxis(Y, 1, 0) * scales.reshape(rows, 1, *(1 for _ in columns))
            out[index] = Y.reshape(rows * b, *columns)
        return out

    def block_quadratic(self, k: int, x: FloatArray) -> float:
        """xᵀ H x for block k."""
        s, scale = self._of(k)
        return scale * self.stored.block_quadratic(s, x)

    def quadratic(self, x: FloatArray) -> float:
        """xᵀ H x over all blocks; negative rounding errors of a block count as 0."""
        sizes = zip(self._rows, self.stored.block_sizes, strict=True)
        if not any(rows.size >= b > LARGE_BLOCK for rows, b in sizes):
            return float(self.block_quadratics(x).sum())
        total = 0.0  # tr S XᵀX: half the multiplications of a product with S
        for s, index, rows, scales in self._each():
            X = x[index].reshape(rows, -1) * np.sqrt(scales)[:, None]
            total += max(0.0, float(np.einsum("ij,ij->", self.stored.block(s), X.T @ X)))
        return total

    def block_quadratics(self, x: FloatArray) -> FloatArray:
        """xᵀ H x of each block, never negative, float64 (K,); one matrix product per stored block."""
        out = np.empty(self.number_of_blocks)
        for s, index, rows, scales in self._each():
            X = x[index].reshape(rows, -1)
            out[self._rows[s]] = scales * np.einsum("ri,ri->r", X, self.stored.block_matmul(s, X.T).T)
        return np.maximum(out, 0.0)

    def best_update(self, k: int, w: FloatArray, pruned: BoolArray, linear: FloatArray | None) -> FloatArray:
        """The best move of block k: that of the stored block, with `linear` divided by the scale."""
        s, scale = self._of(k)
        return self.stored.best_update(s, w, pruned, None if linear is None else linear / scale)

    def best_weights(self, w: FloatArray, pruned: BoolArray, linear: FloatArray | None) -> FloatArray:
        """The weights after the best update; small blocks that share a stored one are solved in batches."""
        return self.improved_weights(w, pruned, linear, None)[0]

    def improved_weights(
        self,
        w: FloatArray,
        pruned: BoolArray,
        linear: FloatArray | None,
        start: NDArray[Any] | None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> tuple[FloatArray, bool]:
        """That of all kinds; rows start from `start` where that helps, and may be stopped. See `row_updates`."""
        updated, complete, pace = np.zeros(self.n), True, Pace(should_stop)
        for s, index, rows, scales in self._each():
            b = int(self.stored.block_sizes[s])
            W, P = w[index].reshape(rows, b), pruned[index].reshape(rows, b)
            G = None if linear is None else linear[index].reshape(rows, b) / scales[:, None]
            done = _in_batches(self.stored.block(s), W, P) if G is None and b <= _BATCH_LARGEST < rows else None
            if done is None:
                begin = None if start is None else start[index].reshape(rows, b)
                done, finished = self._updated_rows(s, W, P, G, begin, pace)
                complete = complete and finished
            updated[index] = done.ravel()
        updated[pruned] = 0.0
        return updated, complete

    def _updated_rows(
        self,
        s: int,
        W: FloatArray,
        P: BoolArray,
        G: FloatArray | None,
        start: NDArray[Any] | None,
        pace: Pace,
    ) -> tuple[FloatArray, bool]:
        """Best weights of the rows of stored block s, and whether they are: not where it was told to stop."""
        done, complete = np.where(P, np.float64(0), W if start is None else start), True
        factor = self.stored.as_factor()
        low_rank = factor is not None and factor.m < P.shape[1]  # its systems are smaller than S
        long, few = long_rows(P, start is not None), low_rank | (_FEW * P.sum(1) < (~P).sum(1))
        rest = [np.flatnonzero(few & ~long)]
        for chosen, by_gradients in ((long, True), (~long & ~few, False)):
            if not chosen.any():
                continue
            at = slice(None) if chosen.all() else np.flatnonzero(chosen)  # a slice copies nothing
            g, begin = None if G is None else G[at], None if start is None else start[at]
            S = self.stored.block(s)
            if by_gradients:
                found = update_rows(S, W[at], P[at], g, begin, pace.should_stop)
            else:
                found = factored_rows(S, W[at], P[at], g, begin, pace)
            done[at], complete = found.weights, complete and not found.stopped
            rest.append(np.arange(P.shape[0])[at][found.failed])
        for r in np.concatenate(rest).tolist():
            if P.shape[1] > LARGE_BLOCK:
                checkpoint()
            if not complete or pace.over(float(P.shape[1]) ** 3 / 3):
                return done, False
            done[r] = W[r] + self.stored.best_update(s, W[r], P[r], None if G is None else G[r])
        return done, complete

    def conditional_inverse_diagonal(self, k: int, kept: IntArray) -> FloatArray:
        """[H_KK⁻¹]_ii on the kept weights K of block k."""
        s, scale = self._of(k)
        return self.stored.conditional_inverse_diagonal(s, kept) / scale

    def pattern(self, k: int) -> BoolArray:
        """That of the stored block."""
        return self.stored.pattern(int(self.shared[k]))

    def coupled(self, k: int) -> BoolArray:
        """Those of the stored block."""
        return self.stored.coupled(int(self.shared[k]))

    def connected_components(self, k: int, index: IntArray) -> IntArray:
        """Those of the stored block."""
        return self.stored.connected_components(int(self.shared[k]), index)

    def empty_columns(self, k: int, index: IntArray) -> BoolArray:
        """Those of the stored block."""
        return self.stored.empty_columns(int(self.shared[k]), index)

    def indefiniteness(self) -> FloatArray:
        """That of the stored blocks, float64 (n,)."""
        return self._spread(self.stored.indefiniteness(), self.block_scale)

    def diagonal_split(self, should_stop: Callable[[], bool] = lambda: False) -> FloatArray | None:
        """That of the stored blocks, float64 (n,); O(b³) per stored block."""
        split = self.stored.diagonal_split(should_stop)
        return None if split is None else self._spread(split, self.block_scale)

    @property
    def damping(self) -> float | None:
        """That of the stored blocks."""
        return self.stored.damping

    def with_damping(self, damping: float) -> SharedBlocks:
        """The same blocks with another damping of the stored ones; it is scaled as they are."""
        return SharedBlocks(self.stored.with_damping(damping), self.shared, self.block_scale)

    def describe(self) -> str:
        """The form of the stored blocks, and how many there are."""
        many = "1 stored block" if self.number_of_stored == 1 else f"{self.number_of_stored} stored blocks"
        return f"{self.stored.describe()}, {many}"

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays of the stored blocks, `shared`, and `block_scale` where it is not 1 throughout."""
        arrays = {**self.stored.arrays(), "shared": self.shared}
        if (self.block_scale != 1.0).any():
            arrays["block_scale"] = self.block_scale
        return arrays


def _in_batches(S: FloatArray, W: FloatArray, P: BoolArray) -> FloatArray | None:
    """Best weights of rows with one Hessian, float64 (R, b), on the kept side; None where it is singular.

    Rows and columns of pruned weights are replaced by the identity, so that all systems have the same size.
    """
    b = S.shape[0]
    diagonal = S.diagonal()
    if (diagonal <= 0).any():
        return None
    scale = 1.0 / np.sqrt(diagonal)
    scaled = S * scale[:, None] * scale
    out = np.empty_like(W)
    size = max(1, _BATCH_BYTES // (8 * b * b))
    for first in range(0, W.shape[0], size):
        part = slice(first, first + size)
        kept = ~P[part]
        rhs = np.where(kept, (np.where(kept, 0.0, W[part]) @ S) * scale, 0.0)
        system = np.where(kept[:, :, None] & kept[:, None, :], scaled, np.eye(b))
        try:
            L = np.linalg.cholesky(system)
        except np.linalg.LinAlgError:
            return None
        half = np.linalg.solve(L, rhs[:, :, None])
        move = np.linalg.solve(np.swapaxes(L, 1, 2), half)[:, :, 0] * scale
        out[part] = np.where(kept, W[part] + move, 0.0)
    return out


def stored_sizes(block_sizes: IntArray, shared: ArrayLike) -> IntArray:
    """Sizes of the stored blocks, int64, from those of all blocks.

    Raises
    ------
    InstanceError
        When `shared` has another length or type, leaves a stored block unused, or assigns two sizes to it.
    """
    index = np.asarray(shared)
    if index.shape != block_sizes.shape:
        raise InstanceError(f"`shared` must have one entry per block, {block_sizes.size}, got {index.shape}")
    number = int(index.max()) + 1 if index.size and np.issubdtype(index.dtype, np.integer) else 0
    if number > block_sizes.size:
        raise InstanceError(f"`shared` must hold numbers below {block_sizes.size}, got {number - 1}")
    index = _indices(index, number)
    sizes = np.zeros(number, dtype=np.int64)
    sizes[index] = block_sizes
    if (sizes[index] != block_sizes).any():
        k = int(np.argmax(sizes[index] != block_sizes))
        raise InstanceError(
            f"`shared`: blocks of one stored block must have the same size, stored block {index[k]} has blocks of "
            f"{block_sizes[k]} and of {sizes[index[k]]} weights"
        )
    return sizes


def _indices(shared: ArrayLike, number: int) -> IntArray:
    index = np.asarray(shared)
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer) or index.size == 0:
        raise InstanceError(f"`shared` must be an array of integers, got {index.dtype} of shape {index.shape}")
    if index.min() < 0 or index.max() >= number:
        raise InstanceError(
            f"`shared` must hold numbers from 0 to {number - 1}, the stored blocks, got {index.min()} to "
            f"{index.max()}"
        )
    index = index.astype(np.int64)
    used = np.bincount(index, minlength=number) > 0
    if not used.all():
        raise InstanceError(f"`shared`: no block uses the stored block {int(np.argmin(used))}")
    index.flags.writeable = False
    return index


def _scales(block_scale: ArrayLike | None, blocks: int) -> FloatArray:
    scale = np.ones(blocks) if block_scale is None else np.asarray(block_scale)
    if scale.shape != (blocks,) or not np.issubdtype(scale.dtype, np.floating):
        raise InstanceError(
            f"`block_scale` must be float of length {blocks}, got {scale.dtype} of shape {scale.shape}"
        )
    scale = scale.astype(np.float64)
    if not ((scale >= 1 / _LARGEST_SCALE) & (scale <= _LARGEST_SCALE)).all():
        raise InstanceError(
            f"`block_scale` must hold numbers from {1 / _LARGEST_SCALE:g} to {_LARGEST_SCALE:g}, got "
            f"{scale.min():g} to {scale.max():g}"
        )
    scale.flags.writeable = False
    return scale
