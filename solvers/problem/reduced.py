"""The presolved selection problem as the relaxation and the search see it."""

from __future__ import annotations

import numpy as np

from cbs_opt.instance import Instance
from cbs_opt.selection import SelectionProblem
from cbs_opt.solvers.kernels.threads import number_of_threads
from cbs_opt.solvers.problem.columns import DENSE_BYTES, DOUBLE_BYTES, columns_of
from cbs_opt.solvers.problem.presolve import presolve
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
        self._negative = instance.curvature.indefiniteness()
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

        With the gradient d = Qx + c over all n weights, convexity gives ½yᵀQy + cᵀy ≥ −½xᵀQx + dᵀy, and the
        right side is smallest where y takes the smallest d that the budget and `fixed` allow. Computed in
        float64 from the instance itself, so that neither presolve nor single-precision rows enter, and reduced by
        a bound on the rounding of the sums. Any real x would do; without a linear term its best multiple is taken,
        so that the bound is never negative there. O(m n) for a gradient factor.
        """
        instance = self.original.instance
        full = self.presolved.expand_fractional(x)
        Qx = self.original.gradient(full) - self.original.c if self._factor is None else self._factor.product(full)
        if instance.linear is None:
            # Along the ray through x the bound is best at this length; at length 0 it is 0.
            Qx_sum = float(Qx[instance.budget.cheapest(Qx, instance.fixed)].sum())
            square = float(full @ Qx)
            length = max(Qx_sum, 0.0) / square if square > 0 else 0.0
            full, Qx = length * full, length * Qx
        gradient = Qx + self.original.c
        y = instance.budget.cheapest(gradient, instance.fixed)
        bound = -0.5 * float(full @ Qx) + float(gradient[y].sum())
        rounding = 1e-14 * float(np.abs(full * Qx).sum() + np.abs(gradient[y]).sum())
        # Blocks that came in single precision may be indefinite by their rounding: (y−x)ᵀQ(y−x) ≥ −Σ λ w²(y−x)².
        farthest = np.maximum(np.abs(full), np.abs(1.0 - full))
        indefinite = 0.5 * float(self._negative @ (instance.weights * farthest) ** 2)
        bound -= rounding + indefinite
        return max(bound, 0.0) if instance.linear is None and not self._negative.any() else bound
