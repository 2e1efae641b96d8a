"""Exact selection on one dense component: min ½ yᵀQy + cᵀy over binary y with a number of ones per group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cbs_opt.solvers.trees import selection_tree as tree
from cbs_opt.solvers.trees.best_first import BestFirst, Int8Array, Subproblem
from cbs_opt.solvers.trees.selection_shift import best_shift
from cbs_opt.solvers.trees.selection_start import improve, take_smallest
from cbs_opt.typing import FloatArray, IntArray

TOLERANCE = 9e-7
"""Relative; a little below the 1e-6 at which a selection is called optimal."""

_ROUNDINGS = 4  # tabu runs from roundings of the root relaxation


class SelectionTask:
    """The problem with its variables sorted by group.

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
        """½ yᵀQy + cᵀy in the order of the task."""
        return float(tree.selection_value(self.Q, self.c, y, self.n))

    def rescale(self, scale: float) -> None:
        """Divide the objective."""
        self.Q /= scale
        self.c /= scale


class SelectionWorker:
    """One tree's arrays over a task; see `best_first.Worker`."""

    def __init__(self, task: SelectionTask, tolerance: float, rounding: float, shared: FloatArray) -> None:
        self.task, self._tolerance, self._rounding, self._shared = task, tolerance, rounding, shared
        n, G = task.n, task.budget.size
        N = n + 2
        zeros = np.zeros
        self._state = zeros(4, np.int64)
        self._state[tree.LEVEL] = -1
        self._frames = zeros((N, 4), np.int64)
        self._F, self._bounds = zeros(N), zeros(N)
        self._X, self._gradient, self._U = zeros((N, n)), zeros((N, n)), zeros((N, n))
        self._V, self._R = zeros((N, n), np.int8), zeros((N, G), np.int64)
        self._pool = np.empty(5 * n * n + 64 * n + 64)
        self._levels = (zeros(N, np.int64), zeros((N, G + 1), np.int64), zeros((N, n), np.int64))
        self._level_data = (zeros((N, n)), zeros((N, n)), zeros(N), zeros((N, n), np.int8))
        self._directions = (zeros((N, n)), zeros((N, n)))
        self.best, self.selection = np.array([np.inf]), zeros(n, np.int8)
        self._S, self._ref = zeros(n + 1, np.int64), zeros(n + 2 + G, np.int64)
        self._work = (zeros((n + 1, n + 1)), zeros((n + 1, n + 1)), zeros(n + 1), zeros(n + 1), zeros(n + 1))
        self._theta, self._y, self._loc = zeros(G), zeros(n, np.int8), zeros(n, np.int64)
        self.size = n

    def load(self, subproblem: Subproblem) -> None:
        """Put the subproblem's relaxation at the root."""
        task, fixings, diagonal = self.task, subproblem.fixings, subproblem.diagonal
        open_, one = np.flatnonzero(fixings < 0), np.flatnonzero(fixings == 1)
        m, G = open_.size, task.budget.size
        Q = task.Q[np.ix_(open_, open_)]
        c = task.c[open_] + task.Q[np.ix_(open_, one)].sum(1)
        constant = float(0.5 * task.Q[np.ix_(one, one)].sum() + task.c[one].sum())
        starts = np.concatenate([[0], np.cumsum(np.bincount(task.group[open_], minlength=G))])
        left = task.budget - np.bincount(task.group[one], minlength=G)
        self._plain = (open_, Q, c, starts, left)
        self.size, self._diagonal = m, diagonal
        if diagonal is not None:
            Q = Q - np.diag(diagonal[open_])
            c = c + diagonal[open_] / 2
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
        self._bounds[0] = subproblem.bound
        self._frames[0] = (0, 0, tree.ROOT, 0)
        self._state[tree.LEVEL] = 0

    def run(self, nodes: int) -> bool:
        """Process a number of nodes; whether something is left."""
        task = self.task
        return bool(
            tree.run(
                nodes, self._tolerance, self._rounding, self._shared, task.Q, task.c, self._state, self._frames,
                self._F, self._bounds, self._X, self._gradient, self._U, self._V, self._R, self._pool,
                *self._levels, *self._level_data, *self._directions, self.selection, self.best, self._S, self._ref,
                *self._work, self._theta, self._y, self._loc,
            )
        )  # fmt: skip

    def take_nodes(self) -> int:
        """Nodes since the last call."""
        count = int(self._state[tree.NODES])
        self._state[tree.NODES] = 0
        return count

    def crowded(self) -> bool:
        """Never: the levels shrink geometrically."""
        return False

    def bound(self) -> float:
        """Least bound of the open nodes, infinity when there are none."""
        count = int(self._state[tree.LEVEL]) + 1
        is_open = self._frames[:count, tree.PENDING] > 0
        return float(self._bounds[:count][is_open].min()) if is_open.any() else np.inf

    def export(self) -> list[Subproblem]:
        """The open nodes; the tree is empty afterwards."""
        out = []
        _, level_starts, index = self._levels
        for level in range(int(self._state[tree.LEVEL]) + 1):
            pending = self._frames[level, tree.PENDING]
            if not pending:
                continue
            q = self._frames[level, tree.QLEVEL]
            m = level_starts[q, -1]
            at = index[q, :m]
            fixings = self._level_data[3][q].copy()
            fixings[at] = np.where(self._U[level, :m] > 0, -1, self._V[level, :m])
            if pending == 1:
                fixings[at[self._frames[level, tree.BRANCH]]] = self._frames[level, tree.VALUE]
            x = np.zeros(self.task.n, np.float32)
            x[at] = self._X[level, :m]
            out.append(Subproblem(float(self._bounds[level]), fixings, x, self._diagonal))
        self._state[tree.LEVEL] = -1
        return out

    def better_diagonal(self) -> FloatArray | None:
        """A shift for the subproblem; zero on the weights that it decides."""
        open_, Q, c, starts, left = self._plain
        found = best_shift(Q, c, starts, left)
        if found is None:
            return None
        full = np.zeros(self.task.n) if self._diagonal is None else self._diagonal.copy()
        full[open_] = found
        return full

    def root_point(self) -> FloatArray:
        """The relaxed point of the root frame, float64 (n,), after `run(1)`."""
        q = self._frames[0, tree.QLEVEL]
        m = self._levels[1][q, -1]
        x = self._level_data[3][q].astype(np.float64)
        x[self._levels[2][q, :m]] = np.where(self._U[0, :m] > 0, self._X[0, :m], self._V[0, :m])
        return x


def _meet_budgets(x: FloatArray, starts: IntArray, budget: IntArray) -> None:
    """Scale x, in the box, so that every group sums to its budget."""
    for a in range(budget.size):
        part = x[starts[a] : starts[a + 1]]
        total = part.sum()
        if total > budget[a]:
            part *= max(budget[a], 0) / total
        elif total < budget[a] and total < part.size:
            part[:] = 1 - (1 - part) * (part.size - min(budget[a], part.size)) / (part.size - total)
        np.clip(part, 0, 1, out=part)


@dataclass
class SelectionTree:
    """A prepared branch and bound over one dense component, in the order and units of the caller.

    Attributes
    ----------
    task : SelectionTask
        Scaled.
    scale : float
        Objective of the caller = scale × that of the task.
    rounding : float
        What the sums may have lost, in units of the caller.
    queue : BestFirst
    """

    task: SelectionTask
    scale: float
    rounding: float
    queue: BestFirst
    nonnegative: bool

    def selection(self) -> Int8Array:
        """The incumbent, int8 (n,)."""
        out = np.empty(self.task.n, np.int8)
        out[self.task.order] = self.queue.selection
        return out

    def value(self) -> float:
        """Its value."""
        return self.scale * self.task.value(self.queue.selection)

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
    """
    task = SelectionTask(Q, c, group, budget)
    nonnegative = not c.any()
    best = take_smallest(0.5 * np.diag(task.Q) + task.c, task.starts, task.budget)
    value = task.value(best)
    for k, y in enumerate([best, *(np.asarray(y, np.int8)[task.order] for y in starts)]):
        plain = task.value(y)
        if plain < value:
            best, value = y, plain
        if not should_stop():
            y, found = improve(task.Q, task.c, task.group, y, k)
            if found < value:
                best, value = y, found
    tiny = 1e-12 * float(np.abs(task.c).max(initial=0.0) + np.diag(task.Q).max(initial=0.0)) + 1e-290
    guess = max(abs(value), tiny)
    task.rescale(guess)
    root = Subproblem(-np.inf, np.full(task.n, -1, np.int8), None, None)
    if roundings and not should_stop():
        best = _improve_from_root(task, root, best, roundings)
    value = task.value(best)
    on = best > 0
    terms = float(np.abs(task.c[on]).sum() + 0.5 * np.abs(task.Q[np.ix_(on, on)]).sum())
    scale = max(abs(value), 1e-12 * terms, 1e-290 / guess)
    task.rescale(scale)
    if nonnegative:
        root = root._replace(bound=0.0)
    queue = BestFirst(
        lambda tol, atol, shared: SelectionWorker(task, tol, atol, shared),
        root,
        best,
        task.value(best),
        tolerance,
        1e-15 * terms / scale,
    )
    return SelectionTree(task, scale * guess, 1e-14 * terms * guess, queue, nonnegative)


def _improve_from_root(task: SelectionTask, root: Subproblem, best: Int8Array, roundings: int) -> Int8Array:
    value = task.value(best)
    worker = SelectionWorker(task, 0.0, 0.0, np.array([value]))
    worker.load(root)
    more = worker.run(1)
    if worker.best[0] < value:
        best, value = worker.selection.copy(), float(worker.best[0])
    if not more:
        return best
    x = worker.root_point()
    rng = np.random.default_rng(1)
    for k in range(roundings):
        noise = 0.0 if k == 0 else rng.uniform(-0.5, 0.5, task.n) * ((x > 0) & (x < 1))
        y, found = improve(task.Q, task.c, task.group, take_smallest(-(x + noise), task.starts, task.budget), k)
        if found < value:
            best, value = y, found
    return best
