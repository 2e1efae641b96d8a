"""Branch and bound over one dense component: min ½ yᵀQy + cᵀy over binary y with a number of ones per group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cbs_opt.interrupt import Interrupted
from cbs_opt.solvers.kernels import selection_tree
from cbs_opt.solvers.kernels.stop_flag import NEVER
from cbs_opt.solvers.trees.best_first import BestFirst, Shift, Subproblem
from cbs_opt.solvers.trees.selection_shift import best_shift, cost_of_shift
from cbs_opt.solvers.trees.selection_start import improve, take_smallest
from cbs_opt.solvers.trees.stack import SelectionSnapshot, TreeWorker
from cbs_opt.typing import FloatArray, Int8Array, IntArray

TOLERANCE = 9e-7
"""Relative; a little below the 1e-6 at which a selection is called optimal."""

_ROUNDINGS = 4  # tabu runs from roundings of the root relaxation


class DenseSelection:
    """The selection problem of one dense component, its variables sorted by group.

    Parameters
    ----------
    Q : float64 (n, n)
        Positive semidefinite.
    c : float64 (n,)
    group : int64 (n,)
    budget : int64 (G,)
        Ones wanted in each group.
    """

    def __init__(self, Q: FloatArray, c: FloatArray, group: IntArray, budget: IntArray) -> None:
        self.order = np.argsort(group, kind="stable")
        self.n = c.size
        self.group = group[self.order]
        self.budget = np.asarray(budget, np.int64)
        counts = np.bincount(group, minlength=self.budget.size)
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.Q = np.ascontiguousarray(Q[np.ix_(self.order, self.order)])
        self.c = np.ascontiguousarray(c[self.order])

    def value(self, y: Int8Array) -> float:
        """½ yᵀQy + cᵀy in the order of the problem."""
        return float(selection_tree.selection_value(self.Q, self.c, y, self.n))

    def rescale(self, scale: float) -> None:
        """Divide the objective."""
        self.Q /= scale
        self.c /= scale


class SelectionWorker(TreeWorker):
    """The arrays of one tree; see `best_first.Worker`."""

    def __init__(
        self,
        problem: DenseSelection,
        tolerance: float,
        rounding: float,
        shared: FloatArray,
        stop: Int8Array = NEVER,
    ) -> None:
        n, G = problem.n, problem.budget.size
        super().__init__(n, shared)
        self.problem, self._tolerance, self._rounding, self._stop = problem, tolerance, rounding, stop
        N = n + 2
        zeros = np.zeros
        self._F = zeros(N)
        self._X, self._gradient, self._U = zeros((N, n)), zeros((N, n)), zeros((N, n))
        self._V, self._R = zeros((N, n), np.int8), zeros((N, G), np.int64)
        self._pool = np.empty(5 * n * n + 64 * n + 64)
        self._levels = (zeros(N, np.int64), zeros((N, G + 1), np.int64), zeros((N, n), np.int64))
        self._level_data = (zeros((N, n)), zeros((N, n)), zeros(N), zeros((N, n), np.int8))
        self._directions = (zeros((N, n)), zeros((N, n)))
        self._S, self._ref = zeros(n + 1, np.int64), zeros(n + 2 + G, np.int64)
        self._work = (zeros((n + 1, n + 1)), zeros((n + 1, n + 1)), zeros(n + 1), zeros(n + 1), zeros(n + 1))
        self._theta, self._y, self._loc = zeros(G), zeros(n, np.int8), zeros(n, np.int64)
        self._products, self._has_products = zeros((n, n)), False

    def load(self, subproblem: Subproblem) -> None:
        """Put the subproblem's relaxation at the root."""
        problem, fixings, shift = self.problem, subproblem.fixings, subproblem.shift
        open_, one = np.flatnonzero(fixings < 0), np.flatnonzero(fixings == 1)
        m, G = open_.size, problem.budget.size
        Q = problem.Q[np.ix_(open_, open_)]
        c = problem.c[open_] + problem.Q[np.ix_(open_, one)].sum(1)
        constant = float(0.5 * problem.Q[np.ix_(one, one)].sum() + problem.c[one].sum())
        starts = np.concatenate([[0], np.cumsum(np.bincount(problem.group[open_], minlength=G))])
        left = problem.budget - np.bincount(problem.group[one], minlength=G)
        self._plain = (open_, Q, c, starts, left)
        self.size, self._shift = m, shift
        self._has_products = shift is not None and shift.price.size > 0
        if shift is not None:
            self._products = shift.products()
            Q = Q - np.diag(shift.diagonal[open_]) - self._products[np.ix_(open_, open_)]
            c = c + shift.diagonal[open_] / 2
        offsets, level_starts, index = self._levels
        diagonals, linear, constants, base = self._level_data
        self._pool[: m * m] = Q.ravel()
        offsets[0], level_starts[0], index[0, :m] = 0, starts, open_
        diagonals[0, :m], linear[0, :m], constants[0] = np.diag(Q), c, constant
        base[0] = np.maximum(fixings, 0)
        x = np.full(m, 0.5) if subproblem.start is None else subproblem.start[open_].astype(np.float64)
        _meet_budgets(x, starts, left)
        self._X[0, :m], self._U[0, :m], self._V[0, :m], self._R[0] = x, 1.0, 0, left
        Qx = Q @ x
        self._gradient[0, :m] = Qx + c
        self._F[0] = constant + 0.5 * x @ Qx + c @ x
        self._push_root(subproblem.bound)

    def run(self, nodes: int) -> bool:
        """Process a number of nodes; whether something is left."""
        Q, c = self.problem.Q, self.problem.c
        return bool(
            selection_tree.run(
                nodes, self._tolerance, self._rounding, self._shared, Q, c, self._state, self._entries,
                self._F, self._bounds, self._X, self._gradient, self._U, self._V, self._R, self._pool,
                *self._levels, *self._level_data, *self._directions, self.selection, self.best, self._S, self._ref,
                *self._work, self._theta, self._y, self._loc, self._products, self._has_products,
                self._stop,
            )
        )  # fmt: skip

    def crowded(self) -> bool:
        """Never: the levels shrink geometrically."""
        return False

    def snapshot(self) -> SelectionSnapshot:
        """What others may read of the tree."""
        _, level_starts, index = self._levels
        return SelectionSnapshot(
            self._state, self._entries, self._bounds, level_starts, index, self.best, self._shared,
            self._level_data[3], self._U, self._X, self._V,
        )  # fmt: skip

    def export(self) -> list[Subproblem]:
        """The open nodes; the tree is empty afterwards."""
        out, view = [], self.snapshot()
        for i, entry in self._open_entries():
            variables, fixings = view.variables(entry.level), view.decisions(i, entry.level)
            if entry.pending == 1:
                fixings[variables[entry.branch]] = entry.value
            x = np.zeros(self.problem.n, np.float32)
            x[variables] = self._X[i, : variables.size]
            out.append(Subproblem(float(self._bounds[i]), fixings, x, self._shift))
        self._clear()
        return out

    def shift_cost(self, thorough: bool) -> float:
        """See `best_first.Worker`."""
        return cost_of_shift(self.size, thorough, self._has_products)

    def better_relaxation(self, thorough: bool) -> tuple[Shift, None] | None:
        """A shift for the subproblem, `thorough` with products; zero on the weights that it decides."""
        open_, Q, c, starts, left = self._plain
        before = None
        if self._shift is not None and self._has_products:
            before = self._shift.diagonal[open_], self._products[np.ix_(open_, open_)]
        try:
            found = best_shift(Q, c, starts, left, thorough, before=before, stop=self._stop)
        except Interrupted:
            return None
        if found is None:
            return None
        full = np.zeros(self.problem.n)
        full[open_] = found.diagonal
        to = open_.astype(np.int32)
        return Shift(full, to[found.first], to[found.second], found.price), None

    def root_point(self) -> FloatArray:
        """The relaxed point of the root frame, float64 (n,), after `run(1)`."""
        view = self.snapshot()
        return view.point(0, view.entry(0).level)


def _meet_budgets(x: FloatArray, starts: IntArray, budget: IntArray) -> None:
    """Change x, in the box, so that every group sums to its budget; its fractional entries where they suffice.

    An entry that leaves its bound makes the first relaxation slow.
    """
    for a in range(budget.size):
        part = x[starts[a] : starts[a + 1]]
        wanted = min(max(int(budget[a]), 0), part.size)
        for at in ((part > 0) & (part < 1), np.ones(part.size, dtype=bool)):
            missing = wanted - part.sum()
            room = (1 - part[at]).sum() if missing > 0 else part[at].sum()
            share = min(abs(missing) / room, 1.0) if room > 0 else 0.0
            part[at] += share * (1 - part[at]) if missing > 0 else -share * part[at]
        np.clip(part, 0, 1, out=part)


@dataclass
class SelectionTree:
    """A prepared branch and bound over one dense component, in the order and units of the caller.

    Attributes
    ----------
    problem : DenseSelection
        Scaled.
    scale : float
        Objective of the caller = scale × that of the problem.
    rounding : float
        What the sums may have lost, in units of the caller.
    queue : BestFirst
    """

    problem: DenseSelection
    scale: float
    rounding: float
    queue: BestFirst
    nonnegative: bool

    def selection(self) -> Int8Array:
        """The incumbent, int8 (n,)."""
        out = np.empty(self.problem.n, np.int8)
        out[self.problem.order] = self.queue.selection
        return out

    def offer(self, y: Int8Array) -> None:
        """Take a selection, int8 (n,), as the incumbent if it is better."""
        y = np.ascontiguousarray(y[self.problem.order])
        self.queue.offer(y, self.problem.value(y))

    def value(self) -> float:
        """Its value."""
        return self.scale * self.problem.value(self.queue.selection)

    def bound(self) -> float:
        """Lower bound on every selection's value."""
        bound = self.scale * self.queue.bound() - self.rounding
        return max(bound, 0.0) if self.nonnegative else bound


def prepare_selection(
    Q: FloatArray,
    c: FloatArray,
    group: IntArray,
    budget: IntArray,
    starts: list[Int8Array],
    tolerance: float = TOLERANCE,
    roundings: int = _ROUNDINGS,
    should_stop: Callable[[], bool] = lambda: False,
    stop: Int8Array = NEVER,
) -> SelectionTree:
    """Find a first selection, scale the problem by its value, and put the root into a queue.

    Parameters
    ----------
    Q : float64 (n, n), positive semidefinite
    c : float64 (n,)
    group : int64 (n,)
    budget : int64 (G,)
    starts : list of int8 (n,)
        Feasible selections to improve.
    tolerance : float
    roundings : int
        Tabu runs from roundings of the root relaxation, after those from `starts` and from the diagonal.
    should_stop : callable
        Asked between tabu runs.
    stop : int8 (1,)
        Ends the work of the tree's kernels; see `kernels.stop_flag`.
    """
    problem = DenseSelection(Q, c, group, budget)
    nonnegative = not c.any()
    best = take_smallest(0.5 * np.diag(problem.Q) + problem.c, problem.starts, problem.budget)
    value = problem.value(best)
    for k, y in enumerate([best, *(np.asarray(y, np.int8)[problem.order] for y in starts)]):
        plain = problem.value(y)
        if plain < value:
            best, value = y, plain
        if not should_stop():
            y, found = improve(problem.Q, problem.c, problem.group, y, k)
            if found < value:
                best, value = y, found
    tiny = 1e-12 * float(np.abs(problem.c).max(initial=0.0) + np.diag(problem.Q).max(initial=0.0)) + 1e-290
    guess = max(abs(value), tiny)
    problem.rescale(guess)
    root = Subproblem(-np.inf, np.full(problem.n, -1, np.int8), None, None)
    if roundings and not should_stop():
        best = _improve_from_root(problem, root, best, roundings, should_stop, stop)
    value = problem.value(best)
    on = best > 0
    terms = float(np.abs(problem.c[on]).sum() + 0.5 * np.abs(problem.Q[np.ix_(on, on)]).sum())
    scale = max(abs(value), 1e-12 * terms, 1e-290 / guess)
    problem.rescale(scale)
    if nonnegative:
        root = root._replace(bound=0.0)
    queue = BestFirst(
        lambda tol, atol, shared: SelectionWorker(problem, tol, atol, shared, stop),
        root,
        best,
        problem.value(best),
        tolerance,
        1e-15 * terms / scale,
    )
    return SelectionTree(problem, scale * guess, 1e-14 * terms * guess, queue, nonnegative)


def _improve_from_root(
    problem: DenseSelection,
    root: Subproblem,
    best: Int8Array,
    roundings: int,
    should_stop: Callable[[], bool],
    stop: Int8Array,
) -> Int8Array:
    value = problem.value(best)
    worker = SelectionWorker(problem, 0.0, 0.0, np.array([value]), stop)
    worker.load(root)
    more = worker.run(1)
    if worker.best[0] < value:
        best, value = worker.selection.copy(), float(worker.best[0])
    if not more:
        return best
    x = worker.root_point()
    rng = np.random.default_rng(1)
    for k in range(roundings):
        if should_stop():
            break
        noise = 0.0 if k == 0 else rng.uniform(-0.5, 0.5, problem.n) * ((x > 0) & (x < 1))
        y, found = improve(
            problem.Q, problem.c, problem.group, take_smallest(-(x + noise), problem.starts, problem.budget), k
        )
        if found < value:
            best, value = y, found
    return best
