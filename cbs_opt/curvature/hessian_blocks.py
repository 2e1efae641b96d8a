"""Dense blocks of the Hessian itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cbs_opt.curvature.base import Curvature, Member
from cbs_opt.curvature.flat import check_flat, flatten
from cbs_opt.curvature.registry import register_curvature
from cbs_opt.linalg import inverse_pd
from cbs_opt.typing import FloatArray, IntArray, RealArray
from cbs_opt.view import text

_EIGEN_LIMIT = 2000  # of larger blocks the tolerance of their check is taken


@register_curvature("hessian")
class HessianBlocks(Curvature):
    """H given as dense blocks.

    Blocks may be indefinite: the selection loss is defined for them, the joint loss is not.

    Parameters
    ----------
    flat : float32 or float64 (Σ b_k²,)
        The blocks in order, each in row-major order; may be memory-mapped.
    block_sizes : int64 (K,)

    Raises
    ------
    InstanceError
        Wrong size, NaN or infinity, a block that is not symmetric.

    Notes
    -----
    Memory: `flat`, and a float64 copy of the current block if the entries are float32.
    """

    members: ClassVar[Mapping[str, Member]] = {"hessian": Member("float", ("n2",))}

    def __init__(self, flat: RealArray, block_sizes: ArrayLike) -> None:
        self._set_blocks(block_sizes)
        self.flat, self._indefinite = check_flat("hessian", flat, self.block_sizes, definite=False)
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.block_sizes**2)])

    @classmethod
    def from_blocks(cls, blocks: Sequence[ArrayLike]) -> HessianBlocks:
        """Build from a list of square matrices."""
        return cls(*flatten(blocks))

    def _raw(self, k: int) -> RealArray:
        b = int(self.block_sizes[k])
        return self.flat[self._starts[k] : self._starts[k + 1]].reshape(b, b)

    def facts(self) -> text.Facts:
        """Names and values for display; which blocks are indefinite, if any is."""
        indefinite = [("indefinite", text.count(len(self._indefinite), "block"))] if self._indefinite else []
        return [*super().facts(), *indefinite]

    @property
    def indefinite_blocks(self) -> tuple[int, ...]:
        """The blocks with a negative eigenvalue, beyond the rounding of their entries."""
        return tuple(self._indefinite)

    def block_quadratic(self, k: int, x: FloatArray) -> float:
        """xᵀ H x for block k, float64 (b_k,); negative only where the block is indefinite."""
        value = float(x @ self.block_matmul(k, x))
        return value if k in self._indefinite else max(value, 0.0)

    def diagonal(self) -> FloatArray:
        """H_ii, float64 (n,)."""
        return np.concatenate([self._raw(k).diagonal() for k in self.blocks_in_turn()]).astype(float)

    def inverse_diagonal(self) -> FloatArray:
        """[H⁻¹]_ii, float64 (n,); O(Σ b_k³)."""
        return np.concatenate([self.inverse_block(k).diagonal() for k in self.blocks_in_turn()])

    def block(self, k: int) -> FloatArray:
        """H of block k."""
        return self._raw(k).astype(np.float64, copy=False)

    def inverse_block(self, k: int) -> FloatArray:
        """H⁻¹ of block k; O(b_k³)."""
        inverse = inverse_pd(self.block(k))
        if inverse is None:
            raise self._singular(k)
        return inverse

    def columns(self, k: int, index: IntArray) -> FloatArray:
        """Columns of H of block k, read as rows, which are contiguous in memory."""
        return self._raw(k)[index].T.astype(np.float64)

    def submatrix(self, k: int, rows: IntArray, columns: IntArray) -> FloatArray:
        """H[rows, columns] of block k."""
        return self._raw(k)[np.ix_(rows, columns)].astype(np.float64)

    def block_matmul(self, k: int, x: FloatArray) -> FloatArray:
        """H x for block k."""
        return np.asarray(self.block(k) @ x)

    def indefiniteness(self) -> FloatArray:
        """Nonzero on indefinite blocks and on float32 blocks that rounding makes indefinite; float64 (n,)."""
        out = np.zeros(self.n)
        single = self.flat.dtype == np.float32
        for k in range(self.number_of_blocks):
            if single or k in self._indefinite:
                H = self.block(k)
                if H.shape[0] <= _EIGEN_LIMIT or k in self._indefinite:
                    smallest = float(np.linalg.eigvalsh(H)[0])
                else:
                    smallest = -10.0 * H.shape[0] * float(np.finfo(np.float32).eps) * float(H.diagonal().max())
                out[self.block_slice(k)] = max(-smallest, 0.0)
        return out

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The flat array of the blocks."""
        return {"hessian": self.flat}

    def of_block(self, k: int) -> HessianBlocks:
        """Block k alone, a view."""
        return HessianBlocks(self.flat[self._starts[k] : self._starts[k + 1]], self.block_sizes[k : k + 1])

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], block_sizes: ArrayLike) -> Self:
        """Build from the array `hessian`."""
        return cls(arrays["hessian"], block_sizes)
