"""Branch and bound over one dense component: min ½ w_Pᵀ ([H⁻¹]_PP)⁻¹ w_P with numbers to prune per group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cbs_opt.interrupt import Interrupted
from cbs_opt.solvers.kernels import joint_tree
from cbs_opt.solvers.kernels.stack_layout import FOUND
from cbs_opt.solvers.kernels.stop_flag import NEVER
from cbs_opt.solvers.kernels.tableau_elimination import eliminate
from cbs_opt.solvers.problem.joint_problem import condition
from cbs_opt.solvers.trees.best_first import BestFirst, Shift, Subproblem
from cbs_opt.solvers.trees.joint_diagonal import best_diagonal, least_pivot, safe_diagonal
from cbs_opt.solvers.trees.selection_start import take_smallest
from cbs_opt.solvers.trees.selection_worker import TOLERANCE
from cbs_opt.solvers.trees.stack import JointSnapshot, TreeWorker
from cbs_opt.typing import BoolArray, FloatArray, Int8Array, IntArray

_MOST_ENTRIES = 4 * 10**7  # of the stack of levels, where the worst case would take more


_LARGEST_DIAGONAL = 400  # weights up to which a diagonal is fitted, in about two seconds there
_ROUGH = 0.3  # cost of the barriers in the fit of a diagonal: the decisions below profit from a central one
_COUNTING_ROOM = 10**5  # entries that enumeration may use where a tree is small
_COUNTED_PER_NODE = 0.1  # sets looked at in about the time that a node takes, over the cube of its columns
_MOST_COUNTED = 2 * 10**8  # of one node, so that a limit is kept


def counted_sets(n: int) -> int:
    """Sets that a node of n weights may enumerate instead of branching."""
    return int(min(_COUNTED_PER_NODE * float(n) ** 3, _MOST_COUNTED))


@dataclass
class DenseJoint:
    """The joint problem of one dense component, with unit diagonal of A = H⁻¹, its variables sorted by group.

    Its unit is the value of the first incumbent.

    Attributes
    ----------
    A : float64 (n, n)
    w : float64 (n,)
        The free minimiser: the weights, less H⁻¹g where there is a linear term.
    group : int64 (n,), increasing
    keep : int64 (G,)
        Weights of each group that stay.
    least_pivot : float
        See `joint_diagonal.least_pivot`; 0 where it is not known.
    """

    A: FloatArray
    w: FloatArray
    group: IntArray
    keep: IntArray
    least_pivot: float = 0.0

    @property
    def n(self) -> int:
        """Number of weights."""
        return self.w.size


class _Root(NamedTuple):
    """The problem that a loaded subproblem leaves.

    open : int64 (m,); A, M : float64 (m, m), inverse to each other; v : float64 (m,), the free minimiser;
    starts : int64 (G+1,), ranges of the groups; keep : int64 (G,); extra : what the decided weights cost.
    """

    open: IntArray
    A: FloatArray
    M: FloatArray
    v: FloatArray
    starts: IntArray
    keep: IntArray
    extra: float


class JointWorker(TreeWorker):
    """The arrays of one tree; see `best_first.Worker`. Selections hold 1 for kept weights."""

    def __init__(
        self,
        problem: DenseJoint,
        tolerance: float,
        rounding: float,
        shared: FloatArray,
        stop: Int8Array = NEVER,
    ) -> None:
        n, G = problem.n, problem.keep.size
        super().__init__(n, shared)
        self.problem, self._tolerance, self._rounding, self._stop = problem, tolerance, rounding, stop
        self._root: _Root | None = None
        N = n + 2
        zeros = np.zeros
        self._theta = zeros((N, G))
        self._U, self._Y = zeros((N, n)), zeros((N, n))
        self._kept, self._R = zeros((N, n), np.int8), zeros((N, G), np.int64)
        worst = n * (n + 1) * (2 * n + 1) // 6 + 4 * n * n + 64
        self._pool = np.empty(min(worst, max(_MOST_ENTRIES, 16 * n * n)))
        levels = 2 * N
        self._levels = (zeros(levels, np.int64), zeros((levels, G + 1), np.int64), zeros((levels, n), np.int64))
        self._level_data = tuple(zeros((levels, n)) for _ in range(3))
        self._S, self._A, self._B = zeros(n + 2, np.int64), zeros((n + 2, n + 2)), zeros((n + 2, n + 2))
        self._work, self._point = tuple(zeros(n + 2) for _ in range(6)), zeros(n + 2)
        self._marks = (zeros(n, np.int8), zeros(n, np.int8))
        self._prices = (zeros(G), zeros(G), zeros(n, np.int64))
        self.most_counted = counted_sets(n)
        self._counting = (
            zeros(max(4 * n * n, _COUNTING_ROOM)), zeros((4, n + 2)), zeros((3, n + 2), np.int64)
        )  # fmt: skip
        self._crowded = False

    def load(self, subproblem: Subproblem) -> None:
        """Put the subproblem's relaxation at the root, after fixing what alone costs more than the incumbent."""
        problem, incumbent, G = self.problem, self._shared[0], self.problem.keep.size
        fixings = subproblem.fixings.copy()
        self._clear()
        self._root = None
        while True:
            open_, A, v, extra = condition(problem.A, problem.w, fixings)
            over = extra + 0.5 * v**2 / np.diag(A) >= incumbent
            if not over.any() or extra >= incumbent:
                break
            fixings[open_[over]] = 1
        m = self.size = open_.size
        keep = problem.keep - np.bincount(problem.group[fixings == 1], minlength=G)
        counts = np.bincount(problem.group[open_], minlength=G)
        if extra >= incumbent * (1 - self._tolerance) or (keep < 0).any() or (keep > counts).any():
            return
        if m == 0:
            if extra < min(incumbent, self.best[0]):
                self.best[0], self.selection = extra, fixings.copy()
            return
        s = 1 / np.sqrt(np.diag(A))
        inverse = np.asarray(np.linalg.inv(A * s[:, None] * s), np.float64)
        M = np.ascontiguousarray(0.5 * (inverse + inverse.T) * s[:, None] * s)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._root = _Root(open_, A, M, v, starts, keep, extra)
        shift = subproblem.shift
        d = safe_diagonal(A) if shift is None else shift.diagonal[open_]
        self._fixings, self._shift = fixings, shift
        c = -M @ v
        self._data = (M, c, v, extra + 0.5 * float(v @ M @ v), extra)
        offsets, level_starts, index = self._levels
        diagonals, ds, linear = self._level_data
        self._pool[: m * m] = M.ravel()
        offsets[0], level_starts[0], index[0, :m] = 0, starts, np.arange(m)
        diagonals[0, :m], ds[0, :m], linear[0, :m] = np.diag(M), d, c
        u = v if subproblem.start is None else subproblem.start[open_]
        self._U[0, :m], self._Y[0, :m], self._kept[0, :m], self._R[0] = u, M @ u + c, 0, keep
        self._theta[0] = 0.0
        self._push_root(subproblem.bound)

    def run(self, nodes: int) -> bool:
        """Process a number of nodes; whether something is left."""
        self._crowded = False
        if self._root is None:
            return False
        found = np.zeros(self.size, np.int8)
        before = self._state[FOUND]
        outcome = joint_tree.run(
            nodes, self._tolerance, self._rounding, self._shared, *self._data, self._state, self._entries,
            self._theta, self._bounds, self._U, self._Y, self._kept, self._R, self._pool, *self._levels,
            *self._level_data, found, self.best, self._S, self._A, self._B, *self._work, self._point, *self._marks,
            *self._prices, self.most_counted, self.problem.least_pivot, *self._counting,
            self._stop,
        )  # fmt: skip
        if self._state[FOUND] > before:
            self.selection = self._fixings.copy()
            self.selection[self._root.open] = found
        self._crowded = outcome == joint_tree.CROWDED
        return bool(outcome != joint_tree.DONE)

    def crowded(self) -> bool:
        """Whether the stack of levels is full, so that the tree must be exported."""
        return self._crowded

    def snapshot(self) -> JointSnapshot:
        """What others may read of the tree."""
        _, level_starts, index = self._levels
        open_ = np.zeros(0, np.int64) if self._root is None else self._root.open
        return JointSnapshot(
            self._state, self._entries, self._bounds, level_starts, index, self.best, self._shared,
            open_, self._level_data[1][0, : open_.size], self._kept, self._point,
        )  # fmt: skip

    def export(self) -> list[Subproblem]:
        """The open nodes; the tree is empty afterwards."""
        out, view = [], self.snapshot()
        for i, entry in self._open_entries():
            variables = view.variables(entry.level)
            fixings = self._fixings.copy()
            fixings[view.open] = 0
            fixings[variables] = np.where(self._kept[i, : variables.size] == 1, 1, -1)
            if entry.pending == 1:
                fixings[variables[entry.branch]] = entry.value
            u = np.zeros(self.problem.n)
            u[variables] = self._U[i, : variables.size]
            out.append(Subproblem(float(self._bounds[i]), fixings, u, self._shift))
        self._clear()
        return out

    def relaxed_point(self) -> FloatArray:
        """The relaxed point of the last node, float64 (n,); the minimiser where it had none."""
        found = None if self._root is None else self.snapshot().relaxed_point()
        if found is None:
            return self.problem.w
        u = np.zeros(self.problem.n)
        u[found[0]] = found[1]
        return u

    def shift_cost(self, thorough: bool) -> float:
        """See `best_first.Worker`."""
        return 2.0 * self.size

    def better_relaxation(self, thorough: bool) -> tuple[Shift, FloatArray] | None:
        """A diagonal for the subproblem and a point to start from; zero on the weights that it decides."""
        if self._root is None or self.size > _LARGEST_DIAGONAL:
            return None
        open_, _, M, v, starts, keep, extra = self._root
        scale = max(self._shared[0] - extra, 1e-3 * self._shared[0])
        scale = scale if np.isfinite(scale) else 0.5 * float(v @ M @ v)
        full = np.zeros((2, self.problem.n))
        try:
            full[:, open_] = best_diagonal(M, v, starts, keep, scale, _ROUGH, self._stop)
        except (np.linalg.LinAlgError, Interrupted):
            return None
        return Shift(full[0]), full[1]


@dataclass
class JointTree:
    """A prepared branch and bound over one dense component, in the order and units of the caller."""

    order: IntArray
    problem: DenseJoint
    scale: float
    queue: BestFirst
    evaluate: Callable[[BoolArray], float]
    _doubt: float = 0.0
    _known: tuple[float, float] | None = None

    def selection(self) -> Int8Array:
        """The incumbent, int8 (n,): 1 = pruned."""
        return self._in_order(self.queue.selection)

    def _in_order(self, kept: Int8Array) -> Int8Array:
        out = np.empty(self.problem.n, np.int8)
        out[self.order] = 1 - kept
        return out

    def offer(self, y: Int8Array) -> None:
        """Take a selection, int8 (n,), 1 = pruned, as the incumbent if it is better."""
        kept = (1 - y[self.order]).astype(np.int8)
        self.queue.offer(kept, condition(self.problem.A, self.problem.w, kept)[3])

    def value(self) -> float:
        """Its value, by `evaluate`."""
        inner, kept = self.queue.incumbent()
        if self._known is None or self._known[0] != inner:
            value = self.evaluate(self._in_order(kept) > 0)
            self._doubt = max(self._doubt, abs(value - self.scale * inner))
            self._known = (inner, value)
        return self._known[1]

    def bound(self) -> float:
        """Lower bound, less what the conditional inverses lose where H is near singular."""
        value = self.value()
        return min(max(self.scale * self.queue.bound() - 2 * self._doubt, 0.0), value)


def prepare_joint(
    A: FloatArray,
    H: FloatArray,
    w: FloatArray,
    group: IntArray,
    keep: IntArray,
    starts: list[Int8Array],
    evaluate: Callable[[BoolArray], float] | None = None,
    tolerance: float = TOLERANCE,
    stop: Int8Array = NEVER,
) -> JointTree:
    """Find a first selection, scale the problem by its value, and put the root into a queue.

    Parameters
    ----------
    A, H : float64 (n, n)
        Inverse of the Hessian, and the Hessian.
    w : float64 (n,)
        Free minimiser.
    group : int64 (n,)
    keep : int64 (G,)
        Weights of each group that stay.
    starts : list of int8 (n,)
        Feasible selections, 1 = pruned.
    evaluate : callable, optional
        Value of a selection, bool (n,), True = pruned; computed from H where not given.
    tolerance : float
    stop : int8 (1,)
        Ends the work of the kernels; see `kernels.stop_flag`.
    """
    order = np.argsort(group, kind="stable")
    s = 1 / np.sqrt(np.diag(A)[order])
    A_ = np.ascontiguousarray(A[np.ix_(order, order)] * s[:, None] * s)
    H_ = H[np.ix_(order, order)] / s[:, None] / s
    H_ = np.ascontiguousarray(0.5 * (H_ + H_.T))
    w_, group_, keep = w[order] * s, group[order], np.asarray(keep, np.int64)
    n = w.size

    def by_kept_side(pruned: BoolArray) -> float:
        kept = (~pruned[order]).astype(np.int8)
        square, vectors = np.empty((n + 1, n + 1)), [np.empty(n + 1) for _ in range(3)]
        S = np.empty(n + 1, np.int64)
        return float(
            joint_tree.kept_value(H_, -H_ @ w_, w_, kept, n, square, vectors[0], vectors[1], S, vectors[2])
        )

    candidates = []
    for pruned in (None, *starts):
        kept = np.ones(n, np.int8) if pruned is None else (1 - np.asarray(pruned, np.int8)[order]).astype(np.int8)
        if pruned is not None:
            candidates.append(kept.copy())
        if eliminate(H_, H_ @ w_, kept, group_, keep, stop):
            candidates.append(kept)
    if not candidates:  # told to stop: the largest weights
        ranges = np.concatenate([[0], np.cumsum(np.bincount(group_, minlength=keep.size))]).astype(np.int64)
        candidates.append(take_smallest(-np.abs(w_), ranges, keep))
    values = [condition(A_, w_, kept)[3] for kept in candidates]
    best = int(np.argmin(values))
    kept, value = candidates[best], values[best]
    scale = value if value > 0 else 1.0
    problem = DenseJoint(A_, w_ / np.sqrt(scale), group_, keep, least_pivot(H_))
    root = Subproblem(0.0, np.full(n, -1, np.int8), None, None)
    queue = BestFirst(
        lambda tol, atol, shared: JointWorker(problem, tol, atol, shared, stop),
        root,
        kept,
        condition(problem.A, problem.w, kept)[3],
        tolerance,
        1e-12,
    )
    return JointTree(order, problem, scale, queue, evaluate or by_kept_side)
