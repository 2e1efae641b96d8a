"""What the exact solver is given: an instance brought to dense pieces, with the way back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cbs_opt.errors import SolverError
from cbs_opt.instance import Instance
from cbs_opt.losses import joint_loss
from cbs_opt.solvers.problem.presolve import Coupling
from cbs_opt.solvers.problem.reduced import ReducedProblem
from cbs_opt.solvers.trees.joint_worker import condition
from cbs_opt.solvers.trees.tables import JointPiece, Piece, SelectionPiece, SeparablePiece
from cbs_opt.typing import BoolArray, FloatArray, IntArray

MAX_WEIGHTS = 2000
"""Largest dense piece."""


def too_large(size: int, what: str) -> SolverError:
    """The sentence for a piece beyond `MAX_WEIGHTS`."""
    return SolverError(
        f"solver 'exact' takes at most {MAX_WEIGHTS} weights that hang together, {what} has {size}: "
        "'search', 'joint' and 'relax' have no such limit"
    )


class SelectionCase:
    """The presolved selection problem, dense or in pieces.

    Attributes
    ----------
    dense : bool
        One tree over all open weights; else `pieces`.
    index : int64 (r,)
        Open weights, piece after piece.
    """

    def __init__(self, instance: Instance) -> None:
        self.problem = ReducedProblem(instance)
        problem, presolved = self.problem, self.problem.presolved
        self.index, self.n = presolved.index, problem.n
        full = [c for c in presolved.components if c.coupling is Coupling.FULL]
        groups = int((problem.budget > 0).sum()) > 1
        self.dense = groups or (len(full) <= 1 and self.n <= MAX_WEIGHTS)
        if self.dense and self.n > MAX_WEIGHTS:
            raise too_large(self.n, "this instance, whose groups tie all its blocks together,")
        for component in full:
            if component.index.size > MAX_WEIGHTS:
                raise too_large(component.index.size, f"block {component.block}")
        self.scale = presolved.scale
        self.offset = presolved.offset
        self.nonnegative = instance.linear is None

    def matrix(self) -> FloatArray:
        """Q of all open weights, float64 (r, r), in units of the presolve."""
        Q = np.zeros((self.n, self.n))
        for block, start in zip(self.problem.columns.blocks, self.problem.columns.starts[:-1], strict=True):
            part = slice(int(start), int(start) + block.size)
            Q[part, part] = block.submatrix(np.arange(block.size))
        return 0.5 * (Q + Q.T)

    def pieces(self) -> list[Piece | SeparablePiece]:
        """One per component; free and diagonal weights cost each by itself."""
        out: list[Piece | SeparablePiece] = []
        columns = self.problem.columns
        for component, block, start in zip(
            self.problem.presolved.components, columns.blocks, columns.starts[:-1], strict=True
        ):
            c = self.problem.linear[int(start) : int(start) + block.size]
            if component.coupling is Coupling.FULL:
                Q = block.submatrix(np.arange(block.size))
                out.append(SelectionPiece(0.5 * (Q + Q.T), c))
            else:
                out.append(SeparablePiece(0.5 * block.diagonal() + c))
        return out

    def first(self) -> BoolArray:
        """The cheapest by the diagonal, bool (n,)."""
        problem = self.problem
        return problem.expand(problem.smallest(0.5 * problem.columns.diagonal + problem.linear))

    def expand(self, y: IntArray) -> BoolArray:
        """The selection of y, int8 (r,)."""
        return self.problem.expand(y.astype(np.float64))

    def value(self, pruned: BoolArray) -> float:
        """The loss, in units of the instance."""
        return self.problem.original.value(pruned)

    def rounding(self, pruned: BoolArray) -> float:
        """A bound on what sums over the instance may lose, in its units."""
        original = self.problem.original
        x = pruned.astype(np.float64)
        gradient = original.gradient(x)
        terms = np.abs(x * (gradient - original.c)).sum() + np.abs(x * original.c).sum()
        return 1e-14 * float(terms)


@dataclass
class JointBlock:
    """The open weights of one block after its fixed ones: their A = H⁻¹, H and free minimiser."""

    index: IntArray
    A: FloatArray
    H: FloatArray
    w: FloatArray


class JointCase:
    """The joint problem, dense or in pieces; attributes as `SelectionCase`."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        curvature, n = instance.curvature, instance.n
        group = instance.budget.group_of(n)
        fixed = np.zeros(n, np.int8) if instance.fixed is None else instance.fixed.copy()
        left = instance.budget.per_group - np.bincount(group[fixed == 1], minlength=instance.budget.per_group.size)
        count = np.bincount(group[fixed == 0], minlength=left.size)
        fixed[(fixed == 0) & (left == 0)[group]] = -1
        fixed[(fixed == 0) & (left == count)[group]] = 1
        self.base = fixed == 1
        self.left = instance.budget.per_group - np.bincount(group[self.base], minlength=left.size)
        sizes = [int((fixed[curvature.block_slice(k)] == 0).sum()) for k in range(curvature.number_of_blocks)]
        many = int((self.left > 0).sum()) > 1
        self.dense = many or np.count_nonzero(sizes) <= 1
        largest = sum(sizes) if self.dense else max(sizes)
        if largest > MAX_WEIGHTS or int(curvature.block_sizes.max()) > 2 * MAX_WEIGHTS:
            what = "the instance" if self.dense else "a block"
            raise too_large(max(largest, int(curvature.block_sizes.max())), what)
        self.offset, self.scale = 0.0, 1.0
        self.blocks: list[JointBlock] = []
        for k, size in enumerate(sizes):
            part = curvature.block_slice(k)
            if size or self.base[part].any() or instance.linear is not None:
                self._reduce(k, fixed[part])
        self.index = np.concatenate([np.zeros(0, np.int64), *(block.index for block in self.blocks)])
        self.n = self.index.size
        self.group = group[self.index]
        self.keep = np.bincount(self.group, minlength=self.left.size) - self.left
        self.nonnegative = instance.linear is None

    def _reduce(self, k: int, fixed: IntArray) -> None:
        """Take the fixed weights of block k out; what they cost goes into the offset."""
        curvature, part = self.instance.curvature, self.instance.curvature.block_slice(k)
        A = curvature.inverse_block(k)
        w = self.instance.weights[part]
        if self.instance.linear is not None:
            g = self.instance.linear[part]
            move = A @ g
            w = w - move
            self.offset -= 0.5 * float(g @ move)
        fixings = np.where(fixed == 1, 0, np.where(fixed == -1, 1, -1)).astype(np.int8)
        open_, inner, minimiser, extra = condition(A, w, fixings)
        self.offset += extra
        if not open_.size:
            return
        if open_.size == w.size:
            H = curvature.block(k)
        else:
            s = 1 / np.sqrt(np.diag(inner))
            H = np.linalg.inv(inner * s[:, None] * s) * s[:, None] * s
        self.blocks.append(JointBlock(part.start + open_, inner, H, minimiser))

    def matrices(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """A, H, float64 (r, r), and the free minimiser (r,) of all open weights."""
        A, H = np.zeros((self.n, self.n)), np.zeros((self.n, self.n))
        start = 0
        for block in self.blocks:
            part = slice(start, start + block.w.size)
            A[part, part], H[part, part] = block.A, block.H
            start = part.stop
        return A, H, np.concatenate([block.w for block in self.blocks])

    def pieces(self) -> list[Piece | SeparablePiece]:
        """One per block."""
        return [JointPiece(block.A, block.H, block.w) for block in self.blocks]

    def first(self) -> BoolArray:
        """The weights that OBS finds cheapest, bool (n,)."""
        pruned = self.base.copy()
        for a in range(self.left.size):
            at = np.flatnonzero(self.group == a)
            price = np.concatenate([b.w**2 / np.diag(b.A) for b in self.blocks])[at] if at.size else np.zeros(0)
            pruned[self.index[at[np.argsort(price, kind="stable")[: self.left[a]]]]] = True
        return pruned

    def expand(self, y: IntArray) -> BoolArray:
        """The selection of y, int8 (r,)."""
        pruned = self.base.copy()
        pruned[self.index[y > 0]] = True
        return pruned

    def value(self, pruned: BoolArray) -> float:
        """The loss, by the evaluator."""
        return joint_loss(self.instance, pruned)

    def rounding(self, pruned: BoolArray) -> float:
        """A bound on what the offset and its cancellation may lose."""
        return 1e-14 * (abs(self.offset) + abs(self.value(pruned) - self.offset)) if self.offset else 0.0
