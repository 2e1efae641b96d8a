"""The joint problem of the undecided weights in dense blocks, and the conversion to and from the instance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cbs_opt.instance import Instance
from cbs_opt.losses import joint_loss
from cbs_opt.memory import require_bytes
from cbs_opt.solvers.problem.decided import cheapest_open, decide
from cbs_opt.typing import BoolArray, FloatArray, Int8Array, IntArray


@dataclass(frozen=True, eq=False)
class JointBlock:
    """The open weights of one block, given the decided ones.

    Attributes
    ----------
    index : int64 (b,)
        The weights among all n.
    A : float64 (b, b)
        Inverse of the Hessian, given that the pruned weights are zero.
    H : float64 (b, b)
        Its inverse.
    w : float64 (b,)
        The free minimiser: the weights, less H⁻¹g where there is a linear term.
    """

    index: IntArray
    A: FloatArray
    H: FloatArray
    w: FloatArray


class JointProblem:
    """min ½ w_Pᵀ(A_PP)⁻¹w_P over the open weights with a given number of pruned ones in each group.

    A loss of the instance is offset + scale · that value, with a scale of 1.

    Parameters
    ----------
    instance : Instance
        H positive definite.

    Attributes
    ----------
    instance : Instance
    blocks : list of JointBlock
    index : int64 (r,)
        The open weights, block by block.
    group : int64 (r,)
    budget : int64 (G,)
        What is left to prune in each group.
    keep : int64 (G,)
        What is to be kept of the open weights.
    base : bool (n,)
        The weights that are pruned in every selection.
    scale, offset : float

    Raises
    ------
    InstanceError
        When a block is singular.

    Notes
    -----
    O(Σ b³) time and O(Σ b²) memory.
    """

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        curvature = instance.curvature
        fixed, self.base, self.budget = decide(instance)
        self.offset, self.scale = 0.0, 1.0
        self.blocks: list[JointBlock] = []
        sizes = curvature.block_sizes.astype(np.float64)
        require_bytes(16.0 * float((sizes**2).sum()), "all blocks and their inverses at once")
        for k in curvature.blocks_in_turn():
            part = curvature.block_slice(k)
            if (fixed[part] >= 0).any() or instance.linear is not None:
                self._reduce(k, fixed[part])
        self.index = np.concatenate([np.zeros(0, np.int64), *(block.index for block in self.blocks)])
        self.group = instance.budget.group_of(instance.n)[self.index]
        self.keep = np.bincount(self.group, minlength=self.budget.size) - self.budget

    @property
    def n(self) -> int:
        """Number of open weights, r."""
        return self.index.size

    @property
    def nonnegative(self) -> bool:
        """Whether no loss is negative: there is no first-order term."""
        return self.instance.linear is None

    @property
    def component_sizes(self) -> list[int]:
        """Numbers of open weights of the blocks."""
        return [block.index.size for block in self.blocks]

    def _reduce(self, k: int, fixed: Int8Array) -> None:
        """Eliminate the decided weights of block k; their loss is added to the offset."""
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

    def first(self) -> BoolArray:
        """The weights that OBS finds cheapest, bool (n,)."""
        pruned = self.base.copy()
        if self.instance.budget.cross_groups is not None and self.n:
            price = np.concatenate([b.w**2 / np.diag(b.A) for b in self.blocks])
            return self.expand(cheapest_open(self.instance, self.index, self.base, price))
        for a in range(self.budget.size):
            at = np.flatnonzero(self.group == a)
            price = np.concatenate([b.w**2 / np.diag(b.A) for b in self.blocks])[at] if at.size else np.zeros(0)
            pruned[self.index[at[np.argsort(price, kind="stable")[: self.budget[a]]]]] = True
        return pruned

    def expand(self, y: FloatArray | BoolArray | IntArray | Int8Array) -> BoolArray:
        """The selection, bool (n,), of a binary y (r,)."""
        pruned = self.base.copy()
        pruned[self.index[y.astype(np.float64) > 0.5]] = True
        return pruned

    def restrict(self, pruned: BoolArray) -> FloatArray:
        """The open part of a selection, float64 (r,)."""
        out: FloatArray = pruned[self.index].astype(np.float64)
        return out

    def from_units(self, value: float) -> float:
        """A value of the reduced problem as a loss of the instance."""
        return self.offset + self.scale * value

    def loss(self, pruned: BoolArray) -> float:
        """The loss of a selection, bool (n,), by the evaluator."""
        return joint_loss(self.instance, pruned)

    def rounding(self, pruned: BoolArray) -> float:
        """A bound on the rounding error of the offset and its cancellation."""
        return 1e-14 * (abs(self.offset) + abs(self.loss(pruned) - self.offset)) if self.offset else 0.0


def condition(A: FloatArray, w: FloatArray, fixings: Int8Array) -> tuple[IntArray, FloatArray, FloatArray, float]:
    """The problem after fixings, int8 (n,): 0 pruned, 1 kept, −1 open.

    Returns the open weights, their inverse Hessian and minimiser given that the pruned ones are zero, and what the
    pruned ones have cost. Kept weights are not represented: the rows of A already include their best update.
    """
    open_, pruned = np.flatnonzero(fixings < 0), np.flatnonzero(fixings == 0)
    if not pruned.size:
        return open_, A[np.ix_(open_, open_)].copy(), w[open_].copy(), 0.0
    s = 1 / np.sqrt(np.diag(A)[pruned])
    L = np.linalg.cholesky(A[np.ix_(pruned, pruned)] * s[:, None] * s)
    X = np.linalg.solve(L, A[np.ix_(pruned, open_)] * s[:, None])
    z = np.linalg.solve(L, w[pruned] * s)
    return open_, A[np.ix_(open_, open_)] - X.T @ X, w[open_] - X.T @ z, 0.5 * float(z @ z)
