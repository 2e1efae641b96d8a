"""Swap local search: Algorithm 1 of the paper, as published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from cbs_opt.device import is_wanted
from cbs_opt.errors import UsageError
from cbs_opt.instance import Instance
from cbs_opt.registry import register
from cbs_opt.result import Status
from cbs_opt.selection import SelectionObjective
from cbs_opt.solver import Capabilities, Context, Parameters, Solver, option
from cbs_opt.threads import library_threads
from cbs_opt.typing import BoolArray, FloatArray, IntArray

PUBLISHED_EPSILON = 1e-4


@dataclass(frozen=True)
class LocalSearchParameters(Parameters):
    """ε, ρ, τ and the number of steps, with the values of the paper."""

    epsilon: float | None = option(
        None, f"smallest gain of a swap, on the doubled objective; {PUBLISHED_EPSILON:g} when neither is set"
    )
    epsilon_relative: float | None = option(
        None, "smallest gain of a swap relative to the doubled objective at the start of the step"
    )
    rho: int = option(10, "half width of the window of partners tried for each pruned weight")
    tau: int = option(20, "failures after which a step ends")
    steps: int = option(50, "steps at most")

    def __post_init__(self) -> None:
        if self.epsilon is not None and self.epsilon_relative is not None:
            raise UsageError("`epsilon` and `epsilon_relative` exclude each other: set one")
        for name, smallest in (("rho", 1), ("tau", 0), ("steps", 0)):
            if getattr(self, name) < smallest:
                raise UsageError(f"`{name}` must be at least {smallest}, got {getattr(self, name)}")
        for name in ("epsilon", "epsilon_relative"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"`{name}` must not be negative, got {value}")

    def threshold(self, doubled_objective: float) -> float:
        """ε on the doubled objective."""
        if self.epsilon_relative is not None:
            # Never below rounding, or two weights of equal gain would swap forever.
            return max(self.epsilon_relative, 1e-13) * max(abs(doubled_objective), 1e-300)
        return PUBLISHED_EPSILON if self.epsilon is None else max(self.epsilon, 1e-300)


@register("ls")
class SwapLocalSearch(Solver):
    """Algorithm 1 of the CBS paper, from magnitude or a warm start; an iteration is a step.

    With groups a step runs the published search in each group, one after another, each with its own lists π and θ
    and its own τ; with one group that is the published algorithm.
    """

    summary = "swap local search, Algorithm 1 of the paper as published"
    supports = Capabilities(device=True, warm_start=True, not_worse_than_magnitude=True)
    parameters_type = LocalSearchParameters
    parameters: LocalSearchParameters

    def prepare(self, instance: Instance, context: Context) -> None:
        """Form Q on the card, where that pays."""
        self._search = LocalSearch(instance, self.parameters)
        self._on_card = None
        if is_wanted(context.device, instance.n):
            from cbs_opt.solvers.paper.on_card import local_search

            self._on_card = local_search(self._search, context, 1)

    def run(self, instance: Instance, context: Context) -> Status:
        """Search from the start until no step improves, or until a limit."""
        start = context.warm_start
        if start is None:
            start = instance.budget.cheapest(np.abs(instance.weights), instance.fixed)
        if self._on_card is None:
            swaps = self._search.walk(start, context)
        else:
            from cbs_opt.solvers.paper.on_card import walk_all

            swaps = walk_all(self._search, self._on_card, [start], context)
        context.extras["swaps"] = swaps
        return Status.CONVERGED


class LocalSearch:
    """Algorithm 1 on one instance; the columns of Q that it uses are kept between searches.

    Notation of the paper, with A = Q and c the first-order term: for i in P α_i = A_ii + 2c_i +
    Σ_{j∈P, j≠i} 2A_ij, for j not in P β_j = A_jj + 2c_j + Σ_{i∈P} 2A_ij, γ_ij = 2A_ij. Swapping i out of P and
    j into P changes the doubled objective by −α_i + β_j − γ_ij.

    Parameters
    ----------
    instance : Instance
    parameters : LocalSearchParameters

    Notes
    -----
    With s the doubled gradient 2(Qx + c), α_i = s_i − A_ii for i ∈ P and β_j = s_j + A_jj for j ∉ P. The
    published step corrects α and β for the swaps that it has already taken; here a swap updates s at once,
    which is the same, while the orders π and θ stay those of the step's beginning. A step costs the columns
    of Q of the weights that it tries and swaps, O(m b) each for a gradient factor, and O(n log n).
    """

    def __init__(self, instance: Instance, parameters: LocalSearchParameters) -> None:
        self.problem = SelectionObjective(instance)
        self.parameters = parameters
        free = np.ones(instance.n, dtype=bool) if instance.fixed is None else instance.fixed == 0
        self.groups = [members[free[members]] for members in instance.budget.members(instance.n)]
        self.columns = ColumnCache(self.problem)

    def walk(self, start: BoolArray, context: Context) -> int:
        """Improve `start`, bool (n,), reporting to the monitor; returns the number of swaps.

        BLAS uses one thread unless `context.threads` is set: products this thin gain little from a second thread,
        and take several times as long if another process keeps a core busy.
        """
        monitor, swaps = context.monitor, 0
        with library_threads(1 if context.threads is None else context.threads, blas_only=True):
            doubled = 2.0 * self.problem.value(start)
            monitor.report(doubled / 2.0, start)
            if monitor.should_stop():
                return 0
            for x, value, taken in self.steps(start, doubled, monitor.should_stop):
                monitor.advance()
                if taken:
                    swaps += taken
                    monitor.report(value / 2.0, x)
                    if monitor.should_stop():
                        break
        return swaps

    def steps(
        self,
        start: BoolArray,
        doubled: float | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[BoolArray, float, int]]:
        """The steps of the search, each made when it is asked for.

        Parameters
        ----------
        start : bool (n,)
        doubled : float, optional
            Its doubled objective, where that is known.
        should_stop : callable, optional
            Asked for every pruned weight; True ends the step after the swaps that it has taken.

        Yields
        ------
        x, doubled, swaps
            The selection after the step, bool (n,), which the next step changes; its doubled objective; how many
            swaps the step took. A step without a swap is the last one.
        """
        problem = self.problem
        x = start.copy()
        doubled = 2.0 * problem.value(x) if doubled is None else doubled
        for _ in range(self.parameters.steps):
            # The gradient is recomputed in each step: many small updates of s would accumulate rounding errors.
            s = 2.0 * problem.gradient(x.astype(np.float64))
            epsilon = self.parameters.threshold(doubled)
            taken = sum(self._step(x, s, members, epsilon, should_stop) for members in self.groups)
            if taken:
                doubled = 2.0 * problem.value(x)
            yield x, doubled, taken
            if taken == 0:
                return

    def _step(
        self, x: BoolArray, s: FloatArray, members: IntArray, epsilon: float, should_stop: Callable[[], bool]
    ) -> int:
        """One step within one group, applied to x and s; returns the number of swaps."""
        A_ii, rho, tau = self.problem.diagonal, self.parameters.rho, self.parameters.tau
        inside, outside = members[x[members]], members[~x[members]]
        if inside.size == 0 or outside.size == 0:
            return 0
        P = inside[np.argsort(A_ii[inside] - s[inside], kind="stable")]  # π: by decreasing α
        beta_minus_gamma = s[outside] + A_ii[outside] - 2.0 * self.columns.entries(P[0], outside)
        C = outside[np.argsort(beta_minus_gamma, kind="stable")]  # θ
        # Most columns that the step will need, in one product: single columns cost twice the time.
        self.columns.fetch(np.concatenate([P[: tau + rho + 1], C[: tau + rho + 1]]))

        available = np.ones(C.size, dtype=bool)
        taken = failures = 0
        for k, i in enumerate(P):
            if k and should_stop():
                break
            # The first pair is tried alone; if it does not gain, the search has converged.
            window = np.arange(max(1, k - rho), min(k + rho, C.size)) if k else np.zeros(1, dtype=np.int64)
            window = window[available[window]]
            J = C[window]
            gains = (s[i] - A_ii[i]) - (s[J] + A_ii[J]) + 2.0 * self.columns.entries(i, J)
            found = np.flatnonzero(gains >= epsilon)
            if found.size:
                j = J[found[0]]
                available[window[found[0]]] = False
                x[i], x[j] = False, True
                self.columns.add(s, i, -2.0)
                self.columns.add(s, j, 2.0)
                taken += 1
            elif k == 0:
                return 0
            else:
                failures += 1
                if failures > tau:
                    break
        return taken


class ColumnCache:
    """Columns of Q by weight, made when first asked for and kept up to a number of bytes."""

    def __init__(self, problem: SelectionObjective, limit: int = 1 << 29) -> None:
        curvature = problem.curvature
        self.problem = problem
        self._limit = limit
        self._slices = [curvature.block_slice(k) for k in range(curvature.number_of_blocks)]
        self._block_of = np.repeat(np.arange(curvature.number_of_blocks), curvature.block_sizes)
        self._kept: dict[int, FloatArray] = {}
        self._bytes = 0

    def fetch(self, weights: IntArray) -> None:
        """Make the missing columns of several weights at once, which is cheaper than one by one."""
        missing = np.array([i for i in weights.tolist() if i not in self._kept], dtype=np.int64)
        for k in np.unique(self._block_of[missing]).tolist():
            mine = missing[self._block_of[missing] == k]
            made = np.ascontiguousarray(self.problem.columns(k, mine - self._slices[k].start).T)
            if self._bytes + made.nbytes > self._limit:
                self._kept.clear()
                self._bytes = 0
            self._bytes += made.nbytes
            self._kept.update(zip(mine.tolist(), made, strict=True))

    def entries(self, i: np.int64, others: IntArray) -> FloatArray:
        """Q[i, others], zero across blocks, float64 (len(others),)."""
        part = self._slices[self._block_of[i]]
        column = self._column(i)
        if part.stop - part.start == self._block_of.size:
            return column[others]
        here = self._block_of[others] == self._block_of[i]
        return np.where(here, column[np.where(here, others - part.start, 0)], 0.0)

    def add(self, s: FloatArray, i: np.int64, factor: float) -> None:
        """Add `factor` times column i to s, float64 (n,), in place."""
        s[self._slices[self._block_of[i]]] += factor * self._column(i)

    def _column(self, i: np.int64) -> FloatArray:
        if int(i) not in self._kept:
            self.fetch(np.array([i]))
        return self._kept[int(i)]
