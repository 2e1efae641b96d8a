"""The selection problem: presolved, scaled, in components; conversion to and from the instance."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cbs_opt.instance import Instance
from cbs_opt.selection import SelectionObjective
from cbs_opt.solver import usable_threads
from cbs_opt.solvers.problem.columns import DENSE_BYTES, DOUBLE_BYTES, Columns, DenseBlock, columns_of
from cbs_opt.solvers.problem.decided import cheapest_open, open_sums
from cbs_opt.solvers.problem.presolve import Component, presolve
from cbs_opt.solvers.problem.threaded_factor import ThreadedFactor
from cbs_opt.typing import BoolArray, FloatArray, Int8Array, IntArray

THREADED_GRADIENTS = 1 << 25
"""Entries of a gradient factor beyond which losses and bounds are computed in threads."""


@dataclass(frozen=True)
class Storage:
    """Limits that decide how Q is stored; the defaults are for a few gigabytes of memory.

    Attributes
    ----------
    dense_bytes, double_bytes : int
        See `columns_of`.
    threaded_gradients : int
        Entries of a gradient factor beyond which losses and bounds are computed by `ThreadedFactor`.
    """

    dense_bytes: int = DENSE_BYTES
    double_bytes: int = DOUBLE_BYTES
    threaded_gradients: int = THREADED_GRADIENTS


class SelectionProblem:
    """min ½ yᵀQy + cᵀy over binary y with a given number of ones in each group, and cross group.

    Its variables are the weights that are still open after presolve, component by component; a loss of the
    instance is offset + scale · (½ yᵀQy + cᵀy). Relaxation, search, branch and bound and the models for other
    solvers all work on this object.

    Parameters
    ----------
    instance : Instance
    threads : int, optional
        All cores by default.
    storage : Storage, optional

    Attributes
    ----------
    instance : Instance
    original : SelectionObjective
        The objective over all n weights, in units of the instance.
    components : tuple of Component
        The uncoupled weights first, then the connected components by block.
    index : int64 (r,)
        The open weights, component by component.
    columns : Columns
        Products with Q; zero on the uncoupled weights.
    linear : float64 (r,)
        c; it holds ½ Q_ii of the uncoupled weights, since y² = y.
    group : int64 (r,)
    budget : int64 (G,)
        Number of ones in each group.
    scale, offset : float
    base : bool (n,)
        The weights that are pruned in every selection.
    """

    def __init__(self, instance: Instance, threads: int | None = None, storage: Storage | None = None) -> None:
        storage = storage or Storage()
        self.instance, self.threads = instance, usable_threads(threads)
        self.original = SelectionObjective(instance)
        reduced = presolve(self.original)
        self.components: tuple[Component, ...] = reduced.components
        self.index: IntArray = reduced.index
        self.linear: FloatArray = reduced.linear
        self.group: IntArray = reduced.group
        self.budget: IntArray = reduced.budget
        self.scale, self.offset, self.base = reduced.scale, reduced.offset, reduced.base
        self.columns: Columns = columns_of(
            instance, self.components, self.scale, self.threads, storage.dense_bytes, storage.double_bytes
        )
        factor = instance.curvature.as_factor()
        large = factor is not None and factor.gradients.size > storage.threaded_gradients
        self._factor = ThreadedFactor(self.original, self.threads) if large else None
        indefiniteness = instance.curvature.indefiniteness()[self.index] * instance.weights[self.index] ** 2
        indefiniteness[self.uncoupled] = 0.0
        self._indefiniteness: FloatArray = indefiniteness
        ridge = np.zeros(self.n) if factor is None else factor.damping * instance.weights[self.index] ** 2
        ridge[self.uncoupled] = 0.0
        self._ridge: FloatArray = ridge
        self._decided_terms = 1e14 * self.rounding(self.base) if self.base.any() else 0.0
        sizes = np.bincount(self.group, minlength=self.budget.size)
        self._first = np.cumsum(sizes) - sizes

    @property
    def n(self) -> int:
        """Number of open weights, r."""
        return self.index.size

    @property
    def threaded(self) -> bool:
        """Whether products with the gradients run in threads."""
        return self._factor is not None

    @property
    def nonnegative(self) -> bool:
        """Whether no loss is negative: there is no first-order term."""
        return self.instance.linear is None

    # To the instance and back --------------------------------------------------------------------------------

    def expand(self, y: FloatArray | BoolArray | IntArray | Int8Array) -> BoolArray:
        """The selection, bool (n,), of a binary y (r,)."""
        pruned = self.base.copy()
        pruned[self.index[y.astype(np.float64) > 0.5]] = True
        return pruned

    def expand_fractional(self, x: FloatArray) -> FloatArray:
        """The point of the relaxation over all weights, float64 (n,), of x (r,)."""
        out = self.base.astype(np.float64)
        out[self.index] = x
        return out

    def restrict(self, pruned: BoolArray) -> FloatArray:
        """The open part of a selection that agrees with what is decided, float64 (r,)."""
        return pruned[self.index].astype(np.float64)

    def selection(self, y: FloatArray) -> BoolArray | None:
        """The selection, bool (n,), of a nearly binary y, or None where its rounding misses the budget."""
        pruned = self.expand(np.round(y))
        return pruned if self.instance.admits(pruned) else None

    def from_units(self, value: float) -> float:
        """A value of ½ yᵀQy + cᵀy as a loss of the instance."""
        return self.offset + self.scale * value

    def to_units(self, loss: float) -> float:
        """The inverse of `from_units`."""
        return (loss - self.offset) / self.scale

    def loss(self, pruned: BoolArray) -> float:
        """The loss of a selection, bool (n,), in float64 and in units of the instance."""
        return self.original.value(pruned) if self._factor is None else self._factor.value(pruned)

    def objective(self, y: FloatArray) -> float:
        """The loss of a binary y, in units of the instance."""
        return self.loss(self.expand(y))

    def rounding(self, pruned: BoolArray) -> float:
        """A bound on the float64 rounding error of sums over the instance, in its units."""
        x = pruned.astype(np.float64)
        gradient = self.original.gradient(x)
        terms = np.abs(x * (gradient - self.original.c)).sum() + np.abs(x * self.original.c).sum()
        return 1e-14 * float(terms)

    # Points --------------------------------------------------------------------------------------------------

    def cheapest(self) -> FloatArray:
        """The binary y of least cost without couplings, float64 (r,)."""
        value = 0.5 * self.columns.diagonal + self.linear
        if self.instance.budget.cross_groups is not None:
            return cheapest_open(self.instance, self.index, self.base, value)
        return self.smallest(value)

    def first(self) -> BoolArray:
        """The selection of `cheapest`, bool (n,)."""
        return self.expand(self.cheapest())

    def smallest(self, value: FloatArray) -> FloatArray:
        """Binary y with the smallest values of each group, as many as its budget; float64 (r,).

        With cross groups it is that of a relaxation.

        Ties are broken by the index of the weight in the instance, not by the order of the components.
        """
        if self.budget.size == 1:
            return self._smallest_of_all(value, int(self.budget[0]))
        order = np.lexsort((self.index, value, self.group))
        rank = np.arange(self.n) - self._first[self.group[order]]
        y = np.zeros(self.n)
        y[order[rank < self.budget[self.group[order]]]] = 1.0
        return y

    def _smallest_of_all(self, value: FloatArray, p: int) -> FloatArray:
        """The same without groups, by partition: O(r)."""
        y = np.zeros(self.n)
        if p == 0 or self.n == 0:
            return y
        last = np.partition(value, p - 1)[p - 1]
        y[value < last] = 1.0
        ties = np.flatnonzero(value == last)
        y[ties[np.argsort(self.index[ties], kind="stable")[: p - int(y.sum())]]] = 1.0
        return y

    def threshold(self, value: FloatArray) -> FloatArray:
        """For each weight the largest of the smallest values of its group, float64 (r,)."""
        if self.budget.size == 1:
            p = int(self.budget[0])
            return np.full(self.n, np.partition(value, p - 1)[p - 1] if p and self.n else -np.inf)
        highest = np.full(self.budget.size, -np.inf)
        chosen = self.smallest(value) > 0
        np.maximum.at(highest, self.group[chosen], value[chosen])
        return highest[self.group]

    def members(self) -> list[IntArray]:
        """Open weights of each group."""
        order = np.argsort(self.group, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.group, minlength=self.budget.size))[:-1])

    def sums(self) -> list[tuple[IntArray, int]]:
        """The equations Σ y = p that y meets: their variables, and p; of groups and of cross groups."""
        return open_sums(self.instance, self.index, self.base)

    def minima(self, rows: FloatArray) -> FloatArray:
        """Smallest value of each row of `rows`, (k, r), over all y that meet the groups' budgets; float64 (k,)."""
        total = np.zeros(rows.shape[0])
        for members, p in zip(self.members(), self.budget.tolist(), strict=True):
            if p:
                total += np.sort(rows[:, members], axis=1)[:, :p].sum(axis=1)
        return total

    # Dense forms, for small problems -------------------------------------------------------------------------

    @property
    def component_sizes(self) -> list[int]:
        """Numbers of weights of the connected components, without uncoupled weights."""
        return [component.index.size for component in self.components if component.coupled]

    @cached_property
    def parts(self) -> list[tuple[IntArray, FloatArray]]:
        """The connected components: their variables, int64 (b,), and Q, float64 (b, b)."""
        out = []
        for component, block, start in zip(
            self.components, self.columns.blocks, self.columns.starts[:-1].tolist(), strict=True
        ):
            if component.coupled:
                Q = block.submatrix(np.arange(block.size))
                out.append((np.arange(start, start + block.size), 0.5 * (Q + Q.T)))
        return out

    @property
    def uncoupled(self) -> IntArray:
        """The variables that are coupled with no other, int64; they come first."""
        first = self.components[0] if self.components else None
        return np.arange(0 if first is None or first.coupled else first.index.size)

    @cached_property
    def matrix(self) -> FloatArray:
        """Q of all open weights, float64 (r, r)."""
        Q = np.zeros((self.n, self.n))
        for at, part in self.parts:
            Q[np.ix_(at, at)] = part
        return Q

    @property
    def largest(self) -> float:
        """Largest absolute entry of Q and c."""
        entries = [float(np.abs(Q).max()) for _, Q in self.parts]
        return max([float(np.abs(self.linear).max(initial=0.0)), *entries])

    def value(self, y: FloatArray) -> float:
        """½ yᵀQy + cᵀy, from the dense parts."""
        return float(sum(0.5 * y[at] @ Q @ y[at] for at, Q in self.parts) + self.linear @ y)

    def in_units_of(self, pruned: BoolArray) -> SelectionProblem:
        """The same problem in units in which the value of a selection is near 1.

        Solvers with absolute tolerances need this. Values below 1e-6 of the largest entries are scaled to 1e-6
        only, because of those tolerances.
        """
        value = abs(self.value(self.restrict(pruned)))
        factor = max(value, 1e-6 * self.largest) or 1.0
        other = copy.copy(self)
        for name in ("parts", "matrix"):
            other.__dict__.pop(name, None)
        other.scale, other.linear = self.scale * factor, self.linear / factor
        blocks = [
            DenseBlock(block.submatrix(np.arange(block.size)) / factor) if component.coupled else block
            for component, block in zip(self.components, self.columns.blocks, strict=True)
        ]
        other.columns = Columns(blocks, self.threads)
        return other

    # Bounds --------------------------------------------------------------------------------------------------

    def certified_bound(self, x: FloatArray) -> float:
        """A lower bound on the loss of every feasible selection, from any x in [0, 1]ʳ.

        Convexity gives ½yᵀQy + cᵀy ≥ −½xᵀQx + (Qx + c)ᵀy over the open weights, and the right side is smallest
        where y takes the smallest entries of Qx + c that the budget allows. Q is zero for the uncoupled weights,
        whose cost c is exact. The damping of a gradient factor adds a diagonal D to Q, whose cost ½Dᵢyᵢ² = ½Dᵢyᵢ
        is exact, too: Q − D and c + ½D take the places of Q and c. Computed in float64 from the instance itself,
        so that single-precision rows do not enter, and reduced by a bound on the rounding of the sums. Any
        multiple of x would do: the better of x and of the multiple that is best for its y is taken. O(m n) for a
        gradient factor.
        """
        full = np.zeros(self.base.size)
        full[self.index] = x
        full[self.index[self.uncoupled]] = 0.0
        if self._factor is None:
            product = self.original.gradient(full) - self.original.c
        else:
            product = self._factor.product(full)
        x, Qx, c = full[self.index], product[self.index], self.scale * self.linear
        Qx, c = Qx - self._ridge * x, c + 0.5 * self._ridge
        square = float(x @ Qx)
        y = self.smallest(Qx + c) > 0
        best = max(float(Qx[y].sum()), 0.0) / square if square > 0 else 0.0
        bound = max(self._bound_along(length, x, Qx, c, square) for length in (1.0, best))
        return max(bound, 0.0) if self.nonnegative and not self._indefiniteness.any() else bound

    def _bound_along(self, length: float, x: FloatArray, Qx: FloatArray, c: FloatArray, square: float) -> float:
        """The bound of `certified_bound` from length · x; arrays float64 (r,), in units of the instance."""
        gradient = length * Qx + c
        y = self.smallest(gradient) > 0
        bound = self.offset - 0.5 * length**2 * square + float(gradient[y].sum())
        lost = float(np.abs(x * Qx).sum()) + float(self._ridge @ x**2)  # Qx has lost what the ridge has cancelled
        rounding = length**2 * lost + float(np.abs(gradient[y]).sum() + 2.0 * length * (self._ridge * x)[y].sum())
        # Blocks that came in single precision may be indefinite by their rounding: (y−x)ᵀQ(y−x) ≥ −Σ λ w²(y−x)².
        farthest = np.maximum(np.abs(length * x), np.abs(1.0 - length * x))
        indefinite = 0.5 * float(self._indefiniteness @ farthest**2)
        return bound - 1e-14 * (rounding + self._decided_terms) - indefinite
