"""Parts of the selection search: an incumbent with its gradient, repair by swaps, and moves on a core."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cbs_opt.solvers.kernels import selection_numba as kernels
from cbs_opt.solvers.kernels.group_sums import shift_to_counts
from cbs_opt.solvers.kernels.swap_descent import swap_descent
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.selection.core import Core
from cbs_opt.typing import FloatArray, IntArray

GAIN = 1e-9
"""Smallest improvement that counts, relative to the objective."""

_HARDEN_STEPS = 2000
_TABU_STEPS = 4000  # per call of the kernel
_TABU_CALLS = 25
_SMALL = 0.1  # quantile of the diagonal
_LEAST_RELATIVE = 1e-4  # of a diagonal entry and that quantile
_LAST_WEIGHT = 1.2  # concave weight at which a point is binary but for ties


class Incumbent:
    """A binary point with its gradient.

    Attributes
    ----------
    y, g : float64 (r,)
        The point, and Qy.
    f : float
        ½ yᵀQy + cᵀy, in the units of presolve.
    """

    def __init__(self, problem: SelectionProblem, y: FloatArray) -> None:
        self.problem = problem
        self.y = y.astype(np.float64)
        self.refresh()

    def copy(self) -> Incumbent:
        """An independent copy, gradient included."""
        other = object.__new__(Incumbent)
        other.problem, other.y, other.g, other.f = self.problem, self.y.copy(), self.g.copy(), self.f
        return other

    def loss(self) -> float:
        """The loss in units of the instance, in float64."""
        return self.problem.objective(self.y)

    def refresh(self) -> None:
        """Compute gradient and objective from scratch."""
        self.g = self.problem.columns.product(self.y)
        self.f = float(0.5 * self.y @ self.g + self.problem.linear @ self.y)

    def move(self, index: IntArray, values: FloatArray) -> None:
        """Set y[index] = values, `index` sorted by block, and update gradient and objective."""
        step = values - self.y[index]
        changed = np.flatnonzero(step)
        if changed.size == 0:
            return
        at, step = index[changed], step[changed]
        before = self.g[at].copy()
        self.problem.columns.add_product(at, step, self.g)
        self.f += float((self.problem.linear[at] + 0.5 * (before + self.g[at])) @ step)
        self.y[at] = values[changed]


def candidate_swaps(point: Incumbent, should_stop: Callable[[], bool], width: int = 64, limit: int = 200) -> int:
    """Make the best swap among the `width` best drops and additions until none gains; returns the swaps made.

    A local optimum is declared on a freshly computed gradient only. O(r + width² m) per swap.
    """
    problem, columns = point.problem, point.problem.columns
    half = 0.5 * columns.diagonal
    made, fresh = 0, False
    while made < limit and not should_stop():
        h = point.g + problem.linear
        inside, outside = np.flatnonzero(point.y == 1), np.flatnonzero(point.y == 0)
        if inside.size == 0 or outside.size == 0:
            break
        drop, add = half[inside] - h[inside], half[outside] + h[outside]
        inside = np.sort(inside[np.argpartition(drop, width)[:width]] if inside.size > width else inside)
        outside = np.sort(outside[np.argpartition(add, width)[:width]] if outside.size > width else outside)
        change = (half[inside] - h[inside])[:, None] + (half[outside] + h[outside])[None, :]
        for b, block, part, local in columns.split(inside):
            same = np.flatnonzero(columns.block_of[outside] == b)
            if same.size:
                change[part, same] -= block.cross(local, outside[same] - columns.starts[b])
        change[problem.group[inside][:, None] != problem.group[outside][None, :]] = np.inf
        i, j = divmod(int(np.argmin(change)), outside.size)
        if change[i, j] < -GAIN * abs(point.f):
            pair = np.array([inside[i], outside[j]])
            order = np.argsort(pair)
            point.move(pair[order], np.array([0.0, 1.0])[order])
            made, fresh = made + 1, False
        elif fresh:
            break
        else:
            point.refresh()
            fresh = True
    return made


class CorePoint:
    """The problem on a core, with all other variables fixed at an incumbent.

    Attributes
    ----------
    core : Core
    y : float64 (c,)
        The incumbent on the core.
    count : int64 (G',)
        Ones of each group that the core has to hold.
    """

    def __init__(self, point: Incumbent, index: IntArray) -> None:
        problem = point.problem
        self.core = Core(problem.columns, problem.group, index)
        at = self.core.index
        self.y = point.y[at].copy()
        self._linear = point.g[at] + problem.linear[at] - self.core.product(self.y)
        self._offset = 0.0
        self._offset = point.f - self.value(self.y)
        self.count = np.bincount(self.core.group, self.y, self.core.number_of_groups).round().astype(np.int64)

    def value(self, y: FloatArray) -> float:
        """Objective of the whole point with y on the core."""
        return float(0.5 * y @ self.core.product(y) + self._linear @ y) + self._offset

    def fit(self, x: FloatArray) -> FloatArray:
        """Shift x by one number per group, within [0, 1], so that the group sums are those of the core."""
        out = np.empty(self.core.n)
        shift_to_counts(np.asarray(x, np.float64), self.core.group, self.count, out)
        return out

    def round(self, x: FloatArray) -> FloatArray:
        """Binary point with the largest x of each group; ties by index."""
        core = self.core
        order = np.lexsort((core.index, -x, core.group))
        label = core.group[order]
        first = np.searchsorted(label, np.arange(core.number_of_groups))
        y = np.zeros(core.n)
        y[order[np.arange(core.n) - first[label] < self.count[label]]] = 1.0
        return y

    def weights(self, exponent: float) -> FloatArray:
        """Concave weights Q_ii (Q_ii / q)^exponent, where q is a small quantile of Q_ii; float64 (c,).

        With a positive exponent the variables of large Q_ii become binary first, and those of small Q_ii, which
        change the objective by little, make up for their rounding.
        """
        d = self.core.diagonal
        positive = d[d > 0]
        if not positive.size:
            return d
        relative = np.clip(d / np.quantile(positive, _SMALL), _LEAST_RELATIVE, 1.0 / _LEAST_RELATIVE)
        return np.asarray(d * relative**exponent)

    def harden(
        self,
        x: FloatArray,
        weight: FloatArray,
        t: float,
        ratio: float,
        tolerance: float,
        should_stop: Callable[[], bool],
    ) -> FloatArray:
        """Concave continuation: descend with the term t/2 Σ weight_i x_i (1 − x_i) for growing t, then round.

        Parameters
        ----------
        x : float64 (c,)
            Fractional or binary, with the right group sums.
        weight : float64 (c,)
        t : float
            First weight; it grows by `ratio` up to where nothing stays fractional.
        ratio, tolerance : float
        should_stop : callable

        Returns
        -------
        float64 (c,)
            Binary.
        """
        core = self.core
        x = x.copy()
        while not should_stop():
            shift = t * weight
            h = core.product(x) + self._linear + shift * (0.5 - x)
            core.descend(x, h, shift, _HARDEN_STEPS, tolerance)
            if t >= _LAST_WEIGHT or not ((x > 0) & (x < 1)).any():
                break
            t = min(t * ratio, _LAST_WEIGHT)
        return self.round(x)

    def tabu(
        self, y: FloatArray, stall: int, tenure: int, state: np.uint64, should_stop: Callable[[], bool]
    ) -> tuple[FloatArray, float, np.uint64]:
        """Drop/add tabu search from y until `stall` steps without improvement.

        Returns the best point, its objective, and the state of the random numbers.
        """
        core = self.core
        z = y.astype(np.int8)
        best = z.copy()
        f = f_best = self.value(y)
        release = np.zeros(core.n, dtype=np.int64)
        h = core.product(y) + self._linear
        clock = idle = 0
        for _ in range(_TABU_CALLS):  # bounded: if the objective is only rounding error, f could decrease forever
            if idle >= stall or should_stop():
                break
            f, f_best, clock, state, idle = kernels.tabu_swaps(
                *core.layout(),
                0.5 * core.diagonal,
                z,
                h,
                f,
                best,
                f_best,
                release,
                clock,
                _TABU_STEPS,
                stall,
                tenure,
                np.uint64(state),
                idle,
            )
            # Recomputed: rounding errors accumulate in many updates.
            h = core.product(z.astype(np.float64)) + self._linear
            f = self.value(z.astype(np.float64))
        y = best.astype(np.float64)
        return y, self.value(y), state

    def swap(self, y: FloatArray) -> tuple[FloatArray, float]:
        """The best swaps over all pairs of the core until none gains; the point and its objective."""
        core = self.core
        z = y.astype(np.int8)
        h = core.product(y) + self._linear
        gain = GAIN * abs(self.value(y))
        swap_descent(*core.layout(), 0.5 * core.diagonal, z, h, gain, core.n)
        y = z.astype(np.float64)
        return y, self.value(y)
