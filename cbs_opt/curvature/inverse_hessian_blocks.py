"""Dense blocks of the inverse Hessian, the form of WoodFisher and of the paper."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from cbs_opt.curvature.base import Curvature
from cbs_opt.curvature.flat import check_flat, flatten
from cbs_opt.errors import UsageError
from cbs_opt.linalg import inverse_pd, solve_psd
from cbs_opt.typing import BoolArray, FloatArray, IntArray, RealArray

_CACHE_BYTES = 1 << 30  # inverted blocks kept in memory


class InverseHessianBlocks(Curvature):
    """H given through dense blocks of H⁻¹.

    A block of H is made by inversion when it is first asked for, O(b_k³), and kept while the blocks kept
    together stay below 1 GiB.

    Parameters
    ----------
    flat : float32 or float64 (Σ b_k²,)
        The blocks of H⁻¹ one after the other, each row by row; may be memory-mapped.
    block_sizes : int64 (K,)

    Raises
    ------
    InstanceError
        Wrong size, NaN or infinity, a block that is not symmetric or not positive definite.
    """

    kind = "inverse_hessian"

    def __init__(self, flat: RealArray, block_sizes: ArrayLike) -> None:
        self._set_blocks(block_sizes)
        self.flat = check_flat("inverse_hessian", flat, self.block_sizes, definite=True)
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
        return np.concatenate([self.inverse_block(k).diagonal() for k in range(self.number_of_blocks)])

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
        return np.concatenate([self.block(k).diagonal() for k in range(self.number_of_blocks)])

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
        u = −H⁻¹g is the free minimiser (0 without `linear`); O(p³/3 + p b) time for p pruned weights.
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

    def with_damping(self, damping: float) -> InverseHessianBlocks:
        """Not possible: dense blocks have their damping inside."""
        raise UsageError("`damping` is already inside `inverse_hessian` blocks and cannot be changed")
