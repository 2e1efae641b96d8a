"""The Hessian as a sum of gradient products: the empirical Fisher matrix, never formed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cbs_opt.curvature.base import Curvature, Member, unbounded_sentence
from cbs_opt.curvature.flat import real_array
from cbs_opt.curvature.registry import register_curvature
from cbs_opt.errors import InstanceError, UnboundedError, UsageError
from cbs_opt.interrupt import checkpoint
from cbs_opt.linalg import cholesky_lower, solve_psd
from cbs_opt.typing import BoolArray, FloatArray, IntArray, RealArray
from cbs_opt.view import text

_CHUNK_BYTES = 1 << 26  # float64 copies of large gradients are made in chunks of this size
_COPY_BYTES = 1 << 29  # and of smaller ones once and for all
_CHUNK_PRODUCTS = 1 << 30  # multiplications between two checkpoints
_LARGEST = 1e150  # of an entry, whose square must be finite
_SAMPLES = 16  # between two checkpoints
_MOST_COMPONENTS = 1000  # of more than one weight, of one block; the rest is left together


@register_curvature("gradients")
class GradientFactor(Curvature):
    """H = λI + GᵀG/m, with G's columns cut at the block borders and no cross terms between blocks.

    Parameters
    ----------
    gradients : float32 or float64 (m, n)
        G, one row for the gradient of each sample or mini-batch; may be memory-mapped.
    damping : float
        λ ≥ 0. With λ = 0 and m < b_k the block is singular: selection is fine, the inverse does not exist.
    block_sizes : int64 (K,), optional
        One block of all n weights by default.

    Raises
    ------
    InstanceError
        Wrong shape, NaN or infinity, a negative damping.

    Notes
    -----
    H is never formed, except by `block`. Products cost O(m b) per vector and read G in chunks, so that G may be
    larger than memory.
    """

    members: ClassVar[Mapping[str, Member]] = {
        "gradients": Member("float", (None, "n")),
        "damping": Member("float", ()),
    }

    def __init__(self, gradients: RealArray, damping: float, block_sizes: ArrayLike | None = None) -> None:
        gradients = real_array("gradients", gradients)
        if gradients.ndim != 2 or gradients.shape[0] < 1:
            raise InstanceError(f"`gradients` must have shape (m, n) with at least one row, got {gradients.shape}")
        self._set_blocks([gradients.shape[1]] if block_sizes is None else block_sizes)
        if gradients.shape[1] != self.n:
            raise InstanceError(
                f"`gradients` must have shape (m, {self.n}), the sum of `block_sizes`, got {gradients.shape}"
            )
        self.gradients = gradients
        self._damping = _check_damping(damping)
        self._float64: FloatArray | None = None
        self._inverse_diagonal: FloatArray | None = None
        if gradients.dtype == np.float64:
            self._float64 = np.asarray(gradients, dtype=np.float64)
        elif gradients.size * 8 <= _COPY_BYTES:
            self._float64 = gradients.astype(np.float64)
        for columns, piece in self.pieces(0, self.n):
            if not np.isfinite(piece).all():
                raise InstanceError(
                    f"`gradients` has NaN or infinite entries in columns {columns.start} … {columns.stop - 1}"
                )
            if np.abs(piece).max(initial=0.0) > _LARGEST:
                raise InstanceError(
                    f"`gradients` has entries above {_LARGEST:g} in columns {columns.start} … {columns.stop - 1}, "
                    "whose squares overflow: rescale the loss"
                )

    def facts(self) -> text.Facts:
        """Names and values for display."""
        return [*super().facts(), ("gradients", f"{self.m:,}"), ("damping", f"{self.damping:g}")]

    @property
    def damping(self) -> float:
        """λ."""
        return self._damping

    @property
    def m(self) -> int:
        """Number of gradients."""
        return int(self.gradients.shape[0])

    def pieces(self, start: int, stop: int, size: int | None = None) -> Iterator[tuple[slice, FloatArray]]:
        """Iterate over G's columns start … stop-1 in float64 chunks (m, c) of at most `size` bytes.

        Without `size` a chunk is a view where a float64 copy is kept.
        """
        source = self.gradients if self._float64 is None else self._float64
        width = max(1, (size or _CHUNK_BYTES) // (8 * self.m))
        for first in range(start, stop, width):
            if first > start:  # a checkpoint for every chunk but the first, so that small problems have none
                checkpoint()
            columns = slice(first, min(first + width, stop))
            yield columns, source[:, columns].astype(np.float64, copy=False)

    def factor(self, k: int, index: IntArray) -> FloatArray:
        """G[:, index] of block k in float64, (m, len(index))."""
        source = self.gradients if self._float64 is None else self._float64
        return source[:, index + self.offsets[k]].astype(np.float64, copy=False)

    def project(self, k: int, x: FloatArray) -> FloatArray:
        """G x for block k; `x` float64 (b_k,) or (b_k, r), the result (m,) or (m, r)."""
        start, stop = int(self.offsets[k]), int(self.offsets[k + 1])
        out = np.zeros((self.m, *x.shape[1:]))
        for columns, piece in self.pieces(start, stop):
            out += piece @ x[columns.start - start : columns.stop - start]
        return out

    def back_project(self, k: int, r: FloatArray) -> FloatArray:
        """Gᵀ r for block k; `r` float64 (m,) or (m, s), the result (b_k,) or (b_k, s)."""
        start, stop = int(self.offsets[k]), int(self.offsets[k + 1])
        out = np.empty((stop - start, *r.shape[1:]))
        for columns, piece in self.pieces(start, stop):
            out[columns.start - start : columns.stop - start] = piece.T @ r
        return out

    def diagonal(self) -> FloatArray:
        """H_ii, float64 (n,); O(m n)."""
        out = np.empty(self.n)
        for columns, piece in self.pieces(0, self.n):
            out[columns] = np.einsum("si,si->i", piece, piece) / self.m
        return out + self.damping

    def inverse_diagonal(self) -> FloatArray:
        """[H⁻¹]_ii, float64 (n,), by Woodbury where m < b_k: O(m³ + m² n) once; budgets share it."""
        if self._inverse_diagonal is None:
            out = np.empty(self.n)
            for k in self.blocks_in_turn():
                out[self.block_slice(k)] = self.conditional_inverse_diagonal(k, np.arange(self.block_sizes[k]))
            out.flags.writeable = False
            self._inverse_diagonal = out
        return self._inverse_diagonal

    def conditional_inverse_diagonal(self, k: int, kept: IntArray) -> FloatArray:
        """[H_KK⁻¹]_ii on the kept weights, by Woodbury where they are more than m: O(m² q)."""
        from scipy.linalg import solve_triangular

        if kept.size <= self.m or self.damping == 0:
            return super().conditional_inverse_diagonal(k, kept)
        gram = np.zeros((self.m, self.m))
        width = self._products()
        chunks = [kept[first : first + width] for first in range(0, kept.size, width)]
        for number, chunk in enumerate(chunks):
            if number:
                checkpoint()
            G = self.factor(k, chunk)
            gram += G @ G.T
        L = self._factored(gram, k)
        out = []
        for number, chunk in enumerate(chunks):
            if number:
                checkpoint()
            half = solve_triangular(L, self.factor(k, chunk), lower=True)
            out.append((1.0 - np.einsum("si,si->i", half, half)) / self.damping)
        return np.concatenate(out)

    def _gram(self, k: int) -> FloatArray:
        """G Gᵀ of block k, float64 (m, m)."""
        part = self.block_slice(k)
        gram = np.zeros((self.m, self.m))
        for _, piece in self.pieces(part.start, part.stop, 8 * self.m * self._products()):
            gram += piece @ piece.T
        return gram

    def _products(self) -> int:
        """Columns whose products G Gᵀ are worth a checkpoint: m² flops each."""
        return max(1, min(_CHUNK_BYTES // (8 * self.m), _CHUNK_PRODUCTS // self.m**2))

    def _factored(self, gram: FloatArray, k: int) -> FloatArray:
        """L with LLᵀ = G Gᵀ + mλI."""
        L = cholesky_lower(gram + self.m * self.damping * np.eye(self.m))
        if L is None:
            raise self._singular(k)
        return L

    def block(self, k: int) -> FloatArray:
        """H of block k, formed: O(m b_k²) time, O(b_k²) memory."""
        G = self.gradients[:, self.block_slice(k)].astype(np.float64)
        H = G.T @ G / self.m
        H[np.diag_indices_from(H)] += self.damping
        return np.asarray(H)

    def inverse_block(self, k: int) -> FloatArray:
        """H⁻¹ of block k, formed; by Woodbury where m < b_k: O(m³ + m b_k²)."""
        from scipy.linalg import solve_triangular

        from cbs_opt.linalg import inverse_pd

        b = int(self.block_sizes[k])
        if self.m < b and self.damping > 0:
            L = self._factored(self._gram(k), k)
            G = self.gradients[:, self.block_slice(k)].astype(np.float64)
            half = solve_triangular(L, G, lower=True)
            return np.asarray((np.eye(b) - half.T @ half) / self.damping)
        inverse = None if self.m < b else inverse_pd(self.block(k))
        if inverse is None:
            raise self._singular(k)
        return inverse

    def columns(self, k: int, index: IntArray) -> FloatArray:
        """Columns of H of block k: O(m b_k) each."""
        out = self.back_project(k, self.factor(k, index)) / self.m
        out[index, np.arange(index.size)] += self.damping
        return out

    def submatrix(self, k: int, rows: IntArray, columns: IntArray) -> FloatArray:
        """H[rows, columns] of block k: O(m) per entry."""
        left, right = self.factor(k, rows), self.factor(k, columns)
        width = max(1, _CHUNK_BYTES // (8 * max(rows.size, self.m)))
        if columns.size <= width:
            out = left.T @ right / self.m
        else:  # the same product in pieces
            out = np.empty((rows.size, columns.size))
            for first in range(0, columns.size, width):
                checkpoint()
                np.matmul(left.T, right[:, first : first + width], out=out[:, first : first + width])
            out /= self.m
        if self.damping:
            out[rows[:, None] == columns[None, :]] += self.damping
        return np.asarray(out)

    def block_matmul(self, k: int, x: FloatArray) -> FloatArray:
        """H x for block k: O(m b_k) per vector."""
        return self.back_project(k, self.project(k, x)) / self.m + self.damping * x

    def block_quadratic(self, k: int, x: FloatArray) -> float:
        """xᵀHx = ‖Gx‖²/m + λ‖x‖² for block k."""
        projected = self.project(k, x)
        return float(projected @ projected) / self.m + self.damping * float(x @ x)

    def best_update(self, k: int, w: FloatArray, pruned: BoolArray, linear: FloatArray | None) -> FloatArray:
        """The best move of block k, by the kept weights or by the gradients, whichever are fewer.

        With K the kept weights, c = G_P w_P and M = G_K G_Kᵀ + mλI, (m, m), the push-through identity gives
        δ_K = G_Kᵀ M⁻¹ c − H_KK⁻¹ g_K, without the cancellation of Woodbury's formula in the first term.
        O(m³/3 + m² q) time for q > m kept weights, O(q³/3 + m q²) otherwise.
        """
        kept = ~pruned
        if int(kept.sum()) <= self.m:
            return super().best_update(k, w, pruned, linear)
        start = int(self.offsets[k])
        delta = np.where(pruned, -w, 0.0)
        if linear is None and not pruned.any():
            return delta
        M = np.zeros((self.m, self.m))
        for columns, piece in self.pieces(start, int(self.offsets[k + 1]), 8 * self.m * self._products()):
            G_K = piece[:, kept[columns.start - start : columns.stop - start]]
            M += G_K @ G_K.T
        M[np.diag_indices_from(M)] += self.m * self.damping
        coefficients, _ = solve_psd(M, -self.project(k, delta))
        move = self.back_project(k, coefficients)
        if linear is not None:
            move -= self._inverse_times(k, np.where(kept, linear, 0.0), kept, M)
        delta[kept] = move[kept]
        return delta

    def _inverse_times(self, k: int, g: FloatArray, kept: BoolArray, M: FloatArray) -> FloatArray:
        """H_KK⁻¹ g on the kept weights, by M = G_K G_Kᵀ + mλI; `g` is zero elsewhere."""

        def back(r: FloatArray) -> FloatArray:
            return np.where(kept, self.back_project(k, r), 0.0)

        if self.damping > 0:

            def solve(right: FloatArray) -> FloatArray:
                return (right - back(solve_psd(M, self.project(k, right))[0])) / self.damping

            x = solve(g)
            # One step of refinement: the difference above loses digits where λ is small.
            return x + solve(g - np.where(kept, self.block_matmul(k, x), 0.0))
        a, _ = solve_psd(M, self.project(k, g))
        if np.linalg.norm(g - back(a)) > 1e-6 * np.linalg.norm(g):
            raise UnboundedError(unbounded_sentence(k))
        return self.m * back(solve_psd(M, a)[0])

    def with_damping(self, damping: float) -> GradientFactor:
        """The same gradients with another λ; shares the memory."""
        try:
            damping = _check_damping(damping)
        except InstanceError as error:
            raise UsageError(str(error)) from None
        other = object.__new__(GradientFactor)
        other.gradients, other._damping, other._float64 = self.gradients, damping, self._float64
        other.block_sizes, other.offsets = self.block_sizes, self.offsets
        other._inverse_diagonal = None
        return other

    def describe(self) -> str:
        """The number of gradients, and the damping."""
        return f"{self.m} gradients, damping {self.damping:g}"

    def as_factor(self) -> GradientFactor:
        """Itself."""
        return self

    def pattern(self, k: int) -> BoolArray:
        """Two weights are adjacent if some sample has nonzero gradients for both; O(m b_k²)."""
        touches = (self.gradients[:, self.block_slice(k)] != 0).astype(np.float32)
        return np.asarray(touches.T @ touches > 0)

    def coupled(self, k: int) -> BoolArray:
        """The weights with a nonzero gradient; O(m b_k). Weights that share no sample are included."""
        return np.asarray(self.gradients[:, self.block_slice(k)].any(axis=0))

    def connected_components(self, k: int, index: IntArray) -> IntArray:
        """Components of the graph of weights and samples: each sample connects the weights with nonzero gradients.

        O(m b_k). Components of one weight are always separated; of the others the largest `_MOST_COMPONENTS`.
        """
        start = int(self.offsets[k])
        touches = self.gradients[:, start + index[0] : start + index[-1] + 1] != 0
        if index[-1] - index[0] + 1 != index.size:
            touches = np.compress(np.isin(np.arange(index[0], index[-1] + 1), index), touches, axis=1)
        touched = touches.any(axis=0)  # on the others only the damping acts
        labels = np.arange(index.size)
        for number, sample in enumerate(touches):
            if number % _SAMPLES == _SAMPLES - 1:
                checkpoint()
            joined = np.unique(labels[sample])
            if joined.size > 1:
                name = np.arange(index.size)
                name[joined] = joined[0]
                labels = name[labels]
                if (labels[touched] == joined[0]).all():
                    break
        sizes = np.bincount(labels, minlength=index.size)
        coupled = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes > 1)]
        if coupled.size > _MOST_COMPONENTS:
            name = np.arange(index.size)
            name[coupled[_MOST_COMPONENTS:]] = coupled[-1]
            labels = name[labels]
        return np.unique(labels, return_inverse=True)[1].astype(np.int64)

    def empty_columns(self, k: int, index: IntArray) -> BoolArray:
        """Always: a diagonal entry is a sum of squares."""
        return np.ones(index.size, dtype=bool)

    def damping_advice(self) -> str:
        """A damping that makes H regular, as the end of a sentence, or why none can be named."""
        mean = float(self.diagonal().mean())
        if mean == 0:
            return "all its gradients are zero"
        if not 1e-3 * mean >= np.finfo(np.float64).tiny:
            return "its gradients are too small for float64: rescale them"
        return f"a damping of {1e-3 * mean:.1g} (a thousandth of the mean diagonal of H) would do"

    def diagonal_split(self, should_stop: Callable[[], bool] = lambda: False) -> FloatArray | None:
        """λI."""
        return np.full(self.n, self.damping) if self.damping > 0 else None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The gradients and the damping."""
        return {"gradients": self.gradients, "damping": np.array(self.damping)}

    def of_block(self, k: int) -> GradientFactor:
        """Block k alone: its columns of G."""
        return GradientFactor(self.gradients[:, self.block_slice(k)], self._damping, self.block_sizes[k : k + 1])

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], block_sizes: ArrayLike) -> Self:
        """Build from the arrays `gradients` and `damping`."""
        return cls(arrays["gradients"], float(arrays["damping"]), block_sizes)


def _check_damping(damping: float) -> float:
    try:
        value = float(damping)
    except (TypeError, ValueError):
        value = np.nan
    if not (np.isfinite(value) and value >= 0):
        raise InstanceError(f"`damping` must be a finite number ≥ 0, got {damping!r}")
    return value
