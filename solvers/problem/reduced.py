"""The presolved selection problem as the relaxation and the search see it."""

from __future__ import annotations

import numpy as np

from cbs_opt.instance import Instance
from cbs_opt.selection import SelectionProblem
from cbs_opt.solvers.kernels.threads import number_of_threads
from cbs_opt.solvers.problem.columns import DENSE_BYTES, DOUBLE_BYTES, columns_of
from cbs_opt.solvers.problem.presolve import Coupling, presolve
from cbs_opt.solvers.problem.threaded_factor import ThreadedFactor
from cbs_opt.typing import BoolArray, FloatArray

THREADED_GRADIENTS = 1 << 25
"""Entries of a gradient factor beyond which losses and bounds are computed in threads."""


class ReducedProblem:
    """min ½ yᵀQy + cᵀy over binary y with a given number of ones per group, in the units of presolve.

    Parameters
    ----------
    instance : Instance
    threads : int, optional
        All cores by default.
    dense_bytes, double_bytes : int
        Limits of storage, see `columns_of`.
    threaded_gradients : int
        Entries of a gradient factor beyond which losses and bounds are computed by `ThreadedFactor`.

    Attributes
    ----------
    presolved : Presolved
    columns : Columns
    linear : float64 (r,)
    group : int64 (r,)
    budget : int64 (G,)
    """

    def __init__(
        self,
        instance: Instance,
        threads: int | None = None,
        dense_bytes: int = DENSE_BYTES,
        double_bytes: int = DOUBLE_BYTES,
        threaded_gradients: int = THREADED_GRADIENTS,
    ) -> None:
        self.threads = number_of_threads(threads)
        self.original = SelectionProblem(instance)
        self.presolved = presolve(instance)
        self.columns = columns_of(self.presolved, self.threads, dense_bytes, double_bytes)
        self.linear = self.presolved.linear
        self.group = self.presolved.group
        self.budget = self.presolved.budget
        # Ties are broken by the index of the weight in the instance, not by the order of the components.
        self._index = self.presolved.index
        factor = instance.curvature.as_factor()
        large = factor is not None and factor.gradients.size > threaded_gradients
        self._factor = ThreadedFactor(self.original, self.threads) if large else None
        negative = instance.curvature.indefiniteness()
        self._nonnegative = instance.linear is None and not negative.any()
        index, base = self.presolved.index, self.presolved.base.astype(np.float64)
        self._free = np.zeros(index.size, dtype=bool)
        self._free[: sum(c.index.size for c in self.presolved.components if c.coupling is Coupling.FREE)] = True
        self._negative = np.where(self._free, 0.0, negative[index] * instance.weights[index] ** 2)
        terms = np.abs(base * (self.original.gradient(base) - self.original.c)) if base.any() else base
        self._fixed_terms = float(terms.sum() + np.abs(base * self.original.c).sum())
        sizes = np.bincount(self.group, minlength=self.budget.size)
        self._first = np.cumsum(sizes) - sizes

    @property
    def threaded(self) -> bool:
        """Whether products with the gradients run in threads."""
        return self._factor is not None

    @property
    def n(self) -> int:
        """Number of open weights, r."""
        return self.columns.n

    def smallest(self, value: FloatArray) -> FloatArray:
        """Binary y with the smallest values of each group, as many as its budget; float64 (r,)."""
        if self.budget.size == 1:
            return self._smallest_of_all(value, int(self.budget[0]))
        order = np.lexsort((self._index, value, self.group))
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
        y[ties[np.argsort(self._index[ties], kind="stable")[: p - int(y.sum())]]] = 1.0
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

    def objective(self, y: FloatArray) -> float:
        """The loss of a binary y in float64 and in the units of the instance."""
        pruned = self.presolved.expand(y)
        return self.original.value(pruned) if self._factor is None else self._factor.value(pruned)

    def expand(self, y: FloatArray) -> BoolArray:
        """The selection of a binary y, bool (n,)."""
        return self.presolved.expand(y)

    def certified_bound(self, x: FloatArray) -> float:
        """A lower bound on the loss of every feasible selection, from any x in [0, 1]ʳ.

        Convexity gives ½yᵀQy + cᵀy ≥ −½xᵀQx + (Qx + c)ᵀy over the open weights, and the right side is smallest
        where y takes the smallest entries of Qx + c that the budget allows. Q is zero for the free weights, whose
        cost c is exact. Computed in float64 from the instance itself, so that single-precision rows do not enter,
        and reduced by a bound on the rounding of the sums. Any multiple of x would do: the better of x and of the
        multiple that is best for its y is taken. O(m n) for a gradient factor.
        """
        presolved = self.presolved
        full = np.zeros(presolved.base.size)
        full[presolved.index] = np.where(self._free, 0.0, x)
        product = (
            self.original.gradient(full) - self.original.c if self._factor is None else self._factor.product(full)
        )
        x, Qx, c = full[presolved.index], product[presolved.index], presolved.scale * presolved.linear
        square = float(x @ Qx)
        y = self.smallest(Qx + c) > 0
        best = max(float(Qx[y].sum()), 0.0) / square if square > 0 else 0.0
        bound = max(self._bound_along(length, x, Qx, c, square) for length in (1.0, best))
        return max(bound, 0.0) if self._nonnegative else bound

    def _bound_along(self, length: float, x: FloatArray, Qx: FloatArray, c: FloatArray, square: float) -> float:
        """The bound of `certified_bound` from length · x; arrays float64 (r,), in the units of the instance."""
        gradient = length * Qx + c
        y = self.smallest(gradient) > 0
        bound = self.presolved.offset - 0.5 * length**2 * square + float(gradient[y].sum())
        rounding = length**2 * float(np.abs(x * Qx).sum()) + float(np.abs(gradient[y]).sum())
        # Blocks that came in single precision may be indefinite by their rounding: (y−x)ᵀQ(y−x) ≥ −Σ λ w²(y−x)².
        farthest = np.maximum(np.abs(length * x), np.abs(1.0 - length * x))
        indefinite = 0.5 * float(self._negative @ farthest**2)
        return bound - 1e-14 * (rounding + self._fixed_terms) - indefinite
