"""What every form of the Hessian offers."""

from __future__ import annotations

import abc
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from cbs_opt.errors import InstanceError, UnboundedError
from cbs_opt.linalg import inverse_pd, solve_psd
from cbs_opt.typing import BoolArray, FloatArray, IntArray
from cbs_opt.view import html, text


class Curvature(abc.ABC):
    """Block-diagonal, symmetric, positive semidefinite Hessian H of the loss at the trained weights.

    Indices named `rows`, `columns` or `index` count within block k; vectors run over all n weights unless a
    method says otherwise. Everything is computed in float64, whatever the entries were stored in.

    Attributes
    ----------
    block_sizes : int64 (K,)
    offsets : int64 (K+1,)
        Block k holds the weights offsets[k] … offsets[k+1]-1.
    """

    kind: ClassVar[str]
    block_sizes: IntArray
    offsets: IntArray

    def _set_blocks(self, block_sizes: ArrayLike) -> None:
        sizes = np.asarray(block_sizes)
        if sizes.ndim != 1 or not np.issubdtype(sizes.dtype, np.integer):
            raise InstanceError(
                f"`block_sizes` must be a one-dimensional array of integers, got {sizes.dtype} of shape "
                f"{sizes.shape}"
            )
        if sizes.size == 0 or (sizes < 1).any():
            raise InstanceError("`block_sizes` must hold at least one block, and no empty one")
        self.block_sizes = sizes.astype(np.int64)
        self.offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.block_sizes)])

    @property
    def n(self) -> int:
        """Number of weights."""
        return int(self.offsets[-1])

    @property
    def number_of_blocks(self) -> int:
        """K."""
        return self.block_sizes.size

    def block_slice(self, k: int) -> slice:
        """The weights of block k."""
        return slice(int(self.offsets[k]), int(self.offsets[k + 1]))

    def facts(self) -> text.Facts:
        """Names and values for a person: the form, the blocks, and whatever a form has of its own."""
        blocks = f"{text.count(self.number_of_blocks, 'block')}, sizes {text.sizes(self.block_sizes)}"
        return [("curvature", self.kind.replace("_", " ")), ("blocks", blocks)]

    def __repr__(self) -> str:
        rest = "".join(f", {name} {value}" for name, value in self.facts()[2:])
        blocks = text.count(self.number_of_blocks, "block")
        return f"<{type(self).__name__}: {text.count(self.n, 'weight')} in {blocks}{rest}>"

    def _repr_html_(self) -> str:
        return html.facts(type(self).__name__, [("weights", f"{self.n:,}"), *self.facts()])

    # What a form of the Hessian must give ------------------------------------------------------------------

    @abc.abstractmethod
    def diagonal(self) -> FloatArray:
        """H_ii, float64 (n,)."""

    @abc.abstractmethod
    def inverse_diagonal(self) -> FloatArray:
        """[H⁻¹]_ii, float64 (n,). Raises `InstanceError` when a block is singular."""

    @abc.abstractmethod
    def block(self, k: int) -> FloatArray:
        """H of block k, float64 (b_k, b_k). May be a view: do not write to it."""

    @abc.abstractmethod
    def inverse_block(self, k: int) -> FloatArray:
        """H⁻¹ of block k, float64 (b_k, b_k). Raises `InstanceError` when the block is singular."""

    @abc.abstractmethod
    def columns(self, k: int, index: IntArray) -> FloatArray:
        """Columns of H of block k, float64 (b_k, len(index)), without forming the block where avoidable."""

    @abc.abstractmethod
    def submatrix(self, k: int, rows: IntArray, columns: IntArray) -> FloatArray:
        """H[rows, columns] of block k, float64 (len(rows), len(columns))."""

    @abc.abstractmethod
    def block_matmul(self, k: int, x: FloatArray) -> FloatArray:
        """H x for block k; `x` float64 (b_k,) or (b_k, r), the result has its shape."""

    @abc.abstractmethod
    def with_damping(self, damping: float) -> Curvature:
        """The same curvature with another damping; raises `UsageError` where damping is baked in."""

    # What follows from it ----------------------------------------------------------------------------------

    def matmul(self, x: FloatArray) -> FloatArray:
        """H x over all blocks; `x` float64 (n,) or (n, r), the result has its shape."""
        out = np.empty(x.shape, dtype=np.float64)
        for k in range(self.number_of_blocks):
            part = self.block_slice(k)
            out[part] = self.block_matmul(k, x[part])
        return out

    def block_quadratic(self, k: int, x: FloatArray) -> float:
        """xᵀ H x for block k, never negative; `x` float64 (b_k,)."""
        return max(float(x @ self.block_matmul(k, x)), 0.0)

    def best_update(self, k: int, w: FloatArray, pruned: BoolArray, linear: FloatArray | None) -> FloatArray:
        """The δ that minimises gᵀδ + ½ δᵀHδ with δ = −w on the pruned weights of block k (CBS-U).

        Parameters
        ----------
        k : int
        w : float64 (b_k,)
        pruned : bool (b_k,)
        linear : float64 (b_k,) or None
            The mean gradient g.

        Returns
        -------
        float64 (b_k,)
            Where H is singular on the kept weights: one of the minimisers.

        Raises
        ------
        UnboundedError
            When H is singular on the kept weights and `linear` decreases along its null space.

        Notes
        -----
        Solves H_KK δ_K = H_KP w_P − g_K on the kept weights K: O(q³/3 + b q) time for q kept weights.
        The paper's formula (eqs 10-12) works on the pruned side; both give the same δ.
        """
        delta = np.where(pruned, -w, 0.0)
        kept = np.flatnonzero(~pruned)
        if kept.size == 0 or (linear is None and not pruned.any()):
            return delta
        rhs = -self.block_matmul(k, delta)[kept]
        if linear is not None:
            rhs = rhs - linear[kept]
        delta[kept], consistent = solve_psd(self.submatrix(k, kept, kept), rhs)
        if linear is not None and not consistent:
            raise UnboundedError(unbounded_sentence(k))
        return delta

    def conditional_inverse_diagonal(self, k: int, kept: IntArray) -> FloatArray:
        """[H_KK⁻¹]_ii on the kept weights K of block k, float64 (len(kept),); O(q³) for q kept weights.

        Raises
        ------
        InstanceError
            When H is singular on them.
        """
        inverse = inverse_pd(self.submatrix(k, kept, kept))
        if inverse is None:
            raise self._singular(k)
        return inverse.diagonal().copy()

    def _singular(self, k: int) -> InstanceError:
        return InstanceError(
            f"block {k} of the Hessian is singular, so its inverse does not exist: a positive damping is needed"
        )


def unbounded_sentence(k: int) -> str:
    """Why block k has no best update."""
    return (
        f"block {k}: the update has no minimum, because the Hessian is singular and `linear` has a component "
        "in its null space: a positive damping is needed"
    )
