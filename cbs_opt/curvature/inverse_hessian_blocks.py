"""Dense blocks of the inverse Hessian, the form of WoodFisher and of the paper."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cbs_opt.curvature.base import LARGE_BLOCK, Curvature, Member, components_of
from cbs_opt.curvature.flat import check_flat, flatten
from cbs_opt.curvature.registry import register_curvature
from cbs_opt.interrupt import checkpoint
from cbs_opt.linalg import inverse_pd, solve_psd
from cbs_opt.typing import BoolArray, FloatArray, IntArray, RealArray

_CACHE_BYTES = 1 << 30  # inverted blocks kept in memory
_OTHERS = 10.0  # how much larger the error of other selections may be than that of one
_WIDE_ENTRIES = 1 << 20  # of a piece in extended precision
_BATCH_BYTES = 1 << 28  # of one batch of equal blocks
_BATCH_LARGEST = 128  # beyond this size LAPACK alone keeps a core busy


@register_curvature("inverse_hessian")
class InverseHessianBlocks(Curvature):
    """H given through dense blocks of H⁻¹.

    A block of H is computed by inversion when it is first needed, O(b_k³), and cached while the cached blocks
    are below 1 GiB in total.

    Parameters
    ----------
    flat : float32 or float64 (Σ b_k²,)
        The blocks of H⁻¹ in order, each in row-major order; may be memory-mapped.
    block_sizes : int64 (K,)

    Raises
    ------
    InstanceError
        Wrong size, NaN or infinity, a block that is not symmetric or not positive definite.
    """

    members: ClassVar[Mapping[str, Member]] = {"inverse_hessian": Member("float", ("n2",))}

    def __init__(self, flat: RealArray, block_sizes: ArrayLike) -> None:
        self._set_blocks(block_sizes)
        self.flat, _ = check_flat("inverse_hessian", flat, self.block_sizes, definite=True)
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.block_sizes**2)])
        self._inverted: OrderedDict[int, FloatArray] = OrderedDict()

    @classmethod
    def from_blocks(cls, blocks: Sequence[ArrayLike]) -> InverseHessianBlocks:
        """Build from a list of square matrices, the blocks of H⁻¹."""
        return cls(*flatten(blocks))

    def inverse_block(self, k: int) -> FloatArray:
        """H⁻¹ of block k, as stored."""
        b = int(self.block_sizes[k])
        stored = self.flat[self._starts[k] : self._starts[k + 1]].reshape(b, b)
        return stored.astype(np.float64, copy=False)

    def inverse_diagonal(self) -> FloatArray:
        """[H⁻¹]_ii, float64 (n,)."""
        return np.concatenate([self.inverse_block(k).diagonal() for k in self.blocks_in_turn()])

    def block(self, k: int) -> FloatArray:
        """H of block k; O(b_k³) the first time."""
        if k in self._inverted:
            self._inverted.move_to_end(k)
            return self._inverted[k]
        H = inverse_pd(self.inverse_block(k))
        if H is None:
            raise self._singular(k)
        self._inverted[k] = H
        kept = sum(block.nbytes for block in self._inverted.values())
        while kept > _CACHE_BYTES and len(self._inverted) > 1:
            kept -= self._inverted.popitem(last=False)[1].nbytes
        return H

    def diagonal(self) -> FloatArray:
        """H_ii, float64 (n,)."""
        return np.concatenate([self.block(k).diagonal() for k in self.blocks_in_turn()])

    def columns(self, k: int, index: IntArray) -> FloatArray:
        """Columns of H of block k."""
        return self.block(k)[:, index]

    def submatrix(self, k: int, rows: IntArray, columns: IntArray) -> FloatArray:
        """H[rows, columns] of block k."""
        return self.block(k)[np.ix_(rows, columns)]

    def block_matmul(self, k: int, x: FloatArray) -> FloatArray:
        """H x for block k, by the inverted block."""
        return np.asarray(self.block(k) @ x)

    def best_update(self, k: int, w: FloatArray, pruned: BoolArray, linear: FloatArray | None) -> FloatArray:
        """The best move of block k, on the side, pruned or kept, that has the smaller system.

        On the pruned side, eqs 10-12 of the paper: δ = u − H⁻¹_{:,P} ([H⁻¹]_PP)⁻¹ (w_P + u_P), where
        u = −H⁻¹g is the unconstrained minimiser (0 without `linear`); O(p³/3 + p b) time for p pruned weights.
        """
        index = np.flatnonzero(pruned)
        if index.size > w.size - index.size and k in self._inverted:
            return super().best_update(k, w, pruned, linear)
        inverse = self.inverse_block(k)
        free = np.zeros_like(w) if linear is None else -(inverse @ linear)
        multipliers, _ = solve_psd(inverse[np.ix_(index, index)], w[index] + free[index])
        delta = free - inverse[:, index] @ multipliers
        delta[index] = -w[index]
        return np.asarray(delta)

    def best_weights(self, w: FloatArray, pruned: BoolArray, linear: FloatArray | None) -> FloatArray:
        """The weights after the best update; small blocks of equal size are solved in batches."""
        updated = np.zeros(self.n)
        sizes, counts = np.unique(self.block_sizes, return_counts=True)
        in_batches = sizes[(counts > 1) & (sizes <= _BATCH_LARGEST)]
        for b in in_batches.tolist():
            blocks = np.flatnonzero(self.block_sizes == b)
            for chunk in np.array_split(blocks, 1 + blocks.size * b * b * 8 // _BATCH_BYTES):
                index = self.offsets[chunk][:, None] + np.arange(b)
                inverse = np.stack([self.inverse_block(int(k)) for k in chunk])
                g = None if linear is None else linear[index]
                updated[index] = weight_update(inverse, w[index], pruned[index], g)
        for k in np.flatnonzero(~np.isin(self.block_sizes, in_batches)).tolist():
            if k and self.block_sizes[k] > LARGE_BLOCK:
                checkpoint()
            part = self.block_slice(k)
            g = None if linear is None else linear[part]
            updated[part] = w[part] + self.best_update(k, w[part], pruned[part], g)
        updated[pruned] = 0.0
        return updated

    def relative_error(self, delta: FloatArray) -> float:
        """From the residual of the inversion of the blocks that have been inverted, in extended precision.

        With S the stored block, T its computed inverse and r = δ − STδ, the exact δᵀS⁻¹δ is δᵀ(Tδ + Tr) to first
        order. That is the error at one δ, and a multiple of it is returned, for others. O(Σ b_k²).
        """
        error = total = 0.0
        for k, T in self._inverted.items():
            part = delta[self.block_slice(k)]
            product = T @ part
            wide = product.astype(np.longdouble)
            inverse = self.inverse_block(k)
            step = max(1, _WIDE_ENTRIES // part.size)
            pieces = [inverse[i : i + step].astype(np.longdouble) @ wide for i in range(0, part.size, step)]
            r = (part - np.concatenate(pieces)).astype(np.float64)
            error += abs(float(product @ r))
            total += float(part @ product)
        return _OTHERS * error / total if total > 0 else 0.0

    def pattern(self, k: int) -> BoolArray:
        """The pattern of H⁻¹, which has the same connected components as H."""
        return np.asarray(self.inverse_block(k) != 0)

    def connected_components(self, k: int, index: IntArray) -> IntArray:
        """Those of H⁻¹; weights outside of `index` stay in the graph."""
        labels = components_of(self.pattern(k))[index]
        return np.unique(labels, return_inverse=True)[1].astype(np.int64)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The flat array of the blocks of H⁻¹."""
        return {"inverse_hessian": self.flat}

    def of_block(self, k: int) -> InverseHessianBlocks:
        """Block k alone, a view."""
        return InverseHessianBlocks(self.flat[self._starts[k] : self._starts[k + 1]], self.block_sizes[k : k + 1])

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], block_sizes: ArrayLike) -> Self:
        """Build from the array `inverse_hessian`."""
        return cls(arrays["inverse_hessian"], block_sizes)


def weight_update(
    h_inv: FloatArray, w: FloatArray, pruned: BoolArray, linear: FloatArray | None = None
) -> FloatArray:
    """Best weights of a batch of equal blocks; CBS-U, eqs 10-12.

    The system of every block is extended to the same size b by the identity in the rows and columns of the kept
    weights, and scaled to a unit diagonal, so that one batched LAPACK call solves them all.

    Parameters
    ----------
    h_inv : float64 (R, b, b)
    w : float64 (R, b)
    pruned : bool (R, b)
    linear : float64 (R, b), optional

    Returns
    -------
    float64 (R, b)
        w + u − H⁻¹_{:,P} ([H⁻¹]_PP)⁻¹ (w_P + u_P), u = −H⁻¹g; O(R b³) time, O(R b²) memory.
    """
    free = w if linear is None else w - np.einsum("rij,rj->ri", h_inv, linear)
    scale = 1.0 / np.sqrt(np.einsum("rii->ri", h_inv))
    both = pruned[:, :, None] & pruned[:, None, :]
    system = np.where(both, h_inv * scale[:, :, None] * scale[:, None, :], np.eye(w.shape[1]))
    rhs = np.where(pruned, free * scale, 0.0)
    multipliers = np.linalg.solve(system, rhs[:, :, None])[:, :, 0] * scale
    return np.where(pruned, 0.0, free - np.einsum("rij,rj->ri", h_inv, multipliers))
