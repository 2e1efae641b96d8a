"""The interface of all forms of the Hessian."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cbs_opt.errors import InstanceError, UnboundedError, UsageError
from cbs_opt.interrupt import checkpoint
from cbs_opt.linalg import inverse_pd, solve_psd
from cbs_opt.typing import BoolArray, FloatArray, IntArray
from cbs_opt.view import html, text

if TYPE_CHECKING:
    from cbs_opt.curvature.gradient_factor import GradientFactor

LARGE_BLOCK = 500
"""Weights of a block from which on the work on it is worth a `checkpoint`."""

_EIGEN_LIMIT = 2000  # blocks up to this size get a diagonal part from an eigenvalue of the scaled Hessian


class Member(NamedTuple):
    """An array of an instance file.

    Attributes
    ----------
    type : str
        "float" (float32 or float64), "integer" or "int8".
    shape : tuple
        A number for a fixed length, None for any, "n" for the number of weights that are stored, "n2" for the
        entries of all stored blocks, Σ b_k².
    """

    type: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class SharedRows:
    """Blocks that are multiples of one stored Hessian: the rows of a layer.

    Attributes
    ----------
    index : int64 (rows, b)
        The weights of each row among all n.
    hessian : float64 (b, b)
        S. Do not write to it.
    scale : float64 (rows,)
        H of row r is scale_r · S.
    """

    index: IntArray
    hessian: FloatArray
    scale: FloatArray


class Curvature(abc.ABC):
    """Block-diagonal, symmetric Hessian H of the loss at the trained weights, positive semidefinite as a rule.

    Only kinds that override `indefinite_blocks` may have blocks with negative eigenvalues.

    The methods after the abstract ones have defaults for dense blocks; a kind of curvature overrides those for
    which it has a faster algorithm. `register_curvature` adds a kind to the file format.

    Indices named `rows`, `columns` or `index` count within block k; vectors run over all n weights unless a
    method states otherwise. Everything is computed in float64, whatever the stored type.

    Attributes
    ----------
    kind : str
        Its name in the file format; set by `register_curvature`.
    members : mapping of str to Member
        The arrays that store it in an instance file; the first one identifies the kind.
    format_version : int
        Version of the file format that can hold it.
    block_sizes : int64 (K,)
    offsets : int64 (K+1,)
        Block k holds the weights offsets[k] … offsets[k+1]-1.
    """

    kind: ClassVar[str]
    members: ClassVar[Mapping[str, Member]] = {}
    format_version: ClassVar[int] = 1
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

    @property
    def number_of_stored(self) -> int:
        """Number of blocks that are stored: fewer where blocks share one."""
        return self.number_of_blocks

    def block_slice(self, k: int) -> slice:
        """The weights of block k."""
        return slice(int(self.offsets[k]), int(self.offsets[k + 1]))

    def blocks_in_turn(self) -> Iterator[int]:
        """The numbers of the blocks, with a `checkpoint` between large ones."""
        for k in range(self.number_of_blocks):
            if k and self.block_sizes[k] > LARGE_BLOCK:
                checkpoint()
            yield k

    def facts(self) -> text.Facts:
        """Names and values for display: the form, the blocks, and properties of the form."""
        blocks = f"{text.count(self.number_of_blocks, 'block')}, sizes {text.sizes(self.block_sizes)}"
        return [("curvature", self.kind.replace("_", " ")), ("blocks", blocks)]

    def __repr__(self) -> str:
        rest = "".join(f", {name} {value}" for name, value in self.facts()[2:])
        blocks = text.count(self.number_of_blocks, "block")
        return f"<{type(self).__name__}: {text.count(self.n, 'weight')} in {blocks}{rest}>"

    def _repr_html_(self) -> str:
        return html.facts(type(self).__name__, [("weights", f"{self.n:,}"), *self.facts()])

    # What a form of the Hessian must provide --------------------------------------------------------------

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

    # How it is stored ---------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays of `members`, as an instance file holds them.

        Raises
        ------
        InstanceError
            When this kind of curvature has no place in the file format.
        """
        raise InstanceError(
            f"a curvature of the kind {type(self).__name__} cannot be written: it has no `arrays` method; see "
            "`cbs_opt.register_curvature` and docs/extending.md for what a kind of curvature needs"
        )

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], block_sizes: ArrayLike) -> Self:
        """Build from the result of `arrays`; raises `InstanceError` as the constructor does."""
        raise InstanceError(f"a curvature of the kind {cls.__name__} cannot be read: it lacks `from_arrays`")

    @property
    def damping(self) -> float | None:
        """λ of a curvature λI + …, None if a damping, if any, is part of the blocks."""
        return None

    def with_damping(self, damping: float) -> Curvature:
        """The same curvature with another damping; raises `UsageError` if damping is part of the blocks."""
        raise UsageError(f"`damping` is already inside dense `{self.kind}` blocks and cannot be changed")

    def describe(self) -> str:
        """A short description for the log: the form in which H is given."""
        return self.kind.replace("_", " ")

    def as_factor(self) -> GradientFactor | None:
        """H as λI + GᵀG/m with the gradients G if it has this form, else None."""
        return None

    def shared_rows(self) -> list[SharedRows] | None:
        """All blocks as rows that share stored Hessians if the curvature has this form, else None."""
        return None

    def of_block(self, k: int) -> Curvature | None:
        """Block k alone, as it is stored; None where its dense H says the same."""
        return None

    # What is known of its structure -------------------------------------------------------------------------

    def pattern(self, k: int) -> BoolArray:
        """Which entries of block k may be nonzero, bool (b_k, b_k), up to connected components.

        The connected components of this graph must be those of H; O(b_k²) memory. A default for dense blocks.
        """
        return np.asarray(self.block(k) != 0)

    def coupled(self, k: int) -> BoolArray:
        """Which weights of block k are coupled to another one by a nonzero entry of H, bool (b_k,)."""
        pattern = self.pattern(k)
        return np.asarray(np.count_nonzero(pattern, axis=0) > pattern.diagonal())

    def connected_components(self, k: int, index: IntArray) -> IntArray:
        """Connected component, 0, 1, …, of each of the weights `index` of block k, int64 (len(index),).

        Weights in different components are uncoupled. Weights outside of `index` may or may not connect others:
        the result may have fewer components than the graph.
        """
        return components_of(self.submatrix(k, index, index) != 0)

    def empty_columns(self, k: int, index: IntArray) -> BoolArray:
        """Whether columns of H of block k whose diagonal entry is 0 are 0 throughout, bool (len(index),).

        True in exact arithmetic; forms that are semidefinite only up to rounding must check.
        """
        return ~np.asarray((self.columns(k, index) != 0).any(axis=0))

    def indefiniteness(self) -> FloatArray:
        """How far below zero the smallest eigenvalue of the block of each weight may lie, float64 (n,).

        Zero except for `indefinite_blocks`, and for entries stored in single precision, whose rounding may make a
        block indefinite.
        """
        return np.zeros(self.n)

    @property
    def indefinite_blocks(self) -> tuple[int, ...]:
        """The blocks that are not positive semidefinite. None, unless a kind allows them."""
        return ()

    @property
    def is_convex(self) -> bool:
        """Whether H is positive semidefinite, so that the best update exists."""
        return not self.indefinite_blocks

    def relative_error(self, delta: FloatArray) -> float:
        """An estimate, from above, of the relative error of δᵀHδ that comes from the form in which H is stored.

        Dense blocks of H and gradients give it to the rounding of sums: 0.

        Parameters
        ----------
        delta : float64 (n,)
        """
        return 0.0

    def diagonal_split(self, should_stop: Callable[[], bool] = lambda: False) -> FloatArray | None:
        """A diagonal D > 0 with H − D positive semidefinite, float64 (n,), or None if none is known.

        For a dense block the larger, by its trace, of σ I and θ diag(H), where σ and θ are the smallest
        eigenvalues of H and of H scaled to a unit diagonal, a little reduced for rounding. O(Σ b_k³).
        """
        out = np.empty(self.n)
        for k in range(self.number_of_blocks):
            if self.block_sizes[k] > _EIGEN_LIMIT or should_stop():
                return None
            part = diagonal_below(self.block(k))
            if part is None:
                return None
            out[self.block_slice(k)] = part
        return out

    # What follows from it ----------------------------------------------------------------------------------

    def matmul(self, x: FloatArray) -> FloatArray:
        """H x over all blocks; `x` float64 (n,) or (n, r), the result has its shape."""
        out = np.empty(x.shape, dtype=np.float64)
        for k in self.blocks_in_turn():
            part = self.block_slice(k)
            out[part] = self.block_matmul(k, x[part])
        return out

    def block_quadratic(self, k: int, x: FloatArray) -> float:
        """xᵀ H x for block k, float64 (b_k,); never negative unless the block is indefinite."""
        return max(float(x @ self.block_matmul(k, x)), 0.0)

    def quadratic(self, x: FloatArray) -> float:
        """xᵀ H x over all blocks, float64 (n,); never negative unless a block is indefinite."""
        return sum(self.block_quadratic(k, x[self.block_slice(k)]) for k in self.blocks_in_turn())

    def best_weights(self, w: FloatArray, pruned: BoolArray, linear: FloatArray | None) -> FloatArray:
        """The weights after the best update of all blocks (CBS-U), float64 (n,); see `best_update`."""
        updated = np.empty(self.n)
        for k in self.blocks_in_turn():
            part = self.block_slice(k)
            g = None if linear is None else linear[part]
            updated[part] = w[part] + self.best_update(k, w[part], pruned[part], g)
        updated[pruned] = 0.0
        return updated

    def improved_weights(
        self,
        w: FloatArray,
        pruned: BoolArray,
        linear: FloatArray | None,
        start: NDArray[Any] | None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> tuple[FloatArray, bool]:
        """`best_weights` from weights near the best ones, float (n,), where that takes less time.

        Returns the weights, float64 (n,), and whether they are the best: not where `should_stop` ended the work.
        """
        return self.best_weights(w, pruned, linear), True

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
    """The error of a block k without a best update."""
    return (
        f"block {k}: the update has no minimum, because the Hessian is singular and `linear` has a component "
        "in its null space: a positive damping is needed"
    )


def components_of(pattern: Any) -> IntArray:
    """Connected component of each vertex of a graph with a symmetric adjacency matrix, bool (b, b); int64 (b,)."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    if len(pattern) == 0 or pattern[0].all():
        return np.zeros(len(pattern), dtype=np.int64)
    return np.asarray(connected_components(csr_array(pattern), directed=False)[1], dtype=np.int64)


def diagonal_below(H: FloatArray) -> FloatArray | None:
    """A diagonal d > 0, float64 (b,), with H − diag(d) positive semidefinite, or None; see `diagonal_split`."""
    diagonal = H.diagonal()
    if (diagonal <= 0).any():
        return None
    scale = 1.0 / np.sqrt(diagonal)
    slack = 1e-12 * H.shape[0]
    theta = float(np.linalg.eigvalsh(H * scale[:, None] * scale)[0]) - slack
    sigma = float(np.linalg.eigvalsh(H)[0]) - slack * float(diagonal.max())
    out = theta * diagonal if theta * diagonal.sum() > sigma * diagonal.size else np.full(diagonal.size, sigma)
    return out if out.min() > 0 else None
