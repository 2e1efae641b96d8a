"""The joint problem for other solvers: scaled, with bounds from a level set, as MIQP and with cones."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import csr_array

from cbs_opt.monitor import Monitor
from cbs_opt.solver import Context
from cbs_opt.solvers.joint.swap_search import JointSearch as JointHeuristic
from cbs_opt.solvers.mip.selection_model import LinearModel, RowBuilder, add_budgets
from cbs_opt.solvers.problem.decided import open_sums
from cbs_opt.solvers.problem.joint_problem import JointProblem
from cbs_opt.solvers.trees.joint_diagonal import PerspectiveRelaxation, best_diagonal
from cbs_opt.stop import Stop
from cbs_opt.typing import BoolArray, FloatArray, Int8Array, IntArray

_MOVES = 200  # of the heuristic that finds the first selection
_SECONDS = 10.0  # far above what they take
_SHARES = (0.5, 0.8, 0.95)  # of the diagonal, in the bounds of single weights
_WORSE = 1e-6  # relative: selections that are worse than the incumbent by more need not be represented
_ROUNDING = 1e-13  # relative to the terms of a bound, which may cancel
_ROOM = 1e-6  # relative widening of every bound, so that none touches an optimal point


class ScaledJoint:
    """min ½ (x − v)ᵀM(x − v) over x and binary y with x_i = 0 where y_i = 1, and given group sums of y.

    In units in which A = M⁻¹ has a unit diagonal and the known selection a value near 1. For any d with
    diag(d) ≼ M, and u near the minimiser of the perspective relaxation, the objective is

        constant + bᵀ(x − u) + ½ (x − u)ᵀ(M − D)(x − u) + ½ Σ d_i r_i,   r_i (1 − y_i) ≥ x_i².

    Parameters
    ----------
    problem : JointProblem
    best : bool (n₀,)
        A selection: worse ones are cut off.

    Attributes
    ----------
    n : int
        Open weights.
    parts : list of int64 (c,)
        The open weights of each block.
    group, budget : int64 (n,), int64 (G,)
    M : float64 (n, n)
    v, u, b, d : float64 (n,)
        d is 0 where the weight is decided.
    constant : float
    value_limit : float
        Value of `best`, a little enlarged.
    bound : float
        Of the perspective relaxation, valid for every selection.
    lower, upper : float64 (n,)
        Range of x_i where weight i is kept, over all points that are no worse than `best`; it contains 0 unless
        the weight is known to be kept.
    decided : int8 (n,)
        1 pruned, 0 kept, −1 open, in every selection that is no worse than `best`.
    scale : float
        Loss = offset + scale · objective.
    """

    def __init__(self, problem: JointProblem, best: BoolArray) -> None:
        self.problem, self.n = problem, problem.n
        self.group, self.budget, self.offset = problem.group, problem.budget, problem.offset
        self.decided = np.full(self.n, -1, np.int8)
        self.parts: list[IntArray] = []
        self.bound = 0.0
        if not self.n:
            self.scale = 1.0
            return
        start = 0
        for block in problem.blocks:
            self.parts.append(np.arange(start, start + block.w.size))
            start += block.w.size
        A, H, w = problem.matrices()
        s = 1 / np.sqrt(np.diag(A))
        self.A, M = A * s[:, None] * s, H / s[:, None] / s
        self.M = 0.5 * (M + M.T)
        self.v = w * s
        self.scale = 1.0
        inner = self.value(self.restrict(best))
        self.scale = inner if inner > 0 else 1.0
        self.v = self.v / np.sqrt(self.scale)
        self.value_limit = self.value(self.restrict(best)) * (1 + _WORSE)
        self._relax()

    def _relax(self) -> None:
        """Diagonal, bound, ranges, and decided weights."""
        order = np.argsort(self.group, kind="stable")
        back = np.argsort(order, kind="stable")
        counts = np.bincount(self.group, minlength=self.budget.size)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        keep = (counts - self.budget).astype(np.int64)
        M = np.ascontiguousarray(self.M[np.ix_(order, order)])
        v = self.v[order]
        size = max(self.value_limit, 1e-300)
        d = best_diagonal(M, v, starts, keep, size)[0] * (1 - _ROOM)
        c, whole = -M @ v, 0.5 * float(v @ M @ v)
        relaxation = PerspectiveRelaxation(starts)
        low, high = v - np.sqrt(2 * size), v + np.sqrt(2 * size)
        for share in (*_SHARES, 1.0):
            D = share * d
            u, theta = v.copy(), np.zeros(keep.size)
            relaxation(M, c, D, keep, u, theta, whole)
            slope = M @ (u - v) - D * u
            price = 0.5 * slope**2 / D
            bound = 0.5 * float((u - v) @ M @ (u - v)) - 0.5 * float(D @ u**2) - float(slope @ u)
            size_of_terms = np.abs(u - v) @ np.abs(M) @ np.abs(u - v) + D @ u**2 + np.abs(slope) @ np.abs(u)
            bound -= _ROUNDING * float(size_of_terms + price.sum())
            for a in range(keep.size):
                bound -= float(np.sort(price[starts[a] : starts[a + 1]])[::-1][: keep[a]].sum())
            self.bound = max(self.bound, bound)
            if share < 1:
                # The linearisation at u, and so the bound, grows by ½ (x − u)ᵀ(M − D)(x − u) at x.
                reach = np.sqrt(2 * max(size - bound, 0.0) * np.diag(np.linalg.inv(M - np.diag(D))))
                low, high = np.maximum(low, u - reach), np.minimum(high, u + reach)
        decided = np.full(self.n, -1, np.int8)
        for a in range(keep.size):
            part = slice(int(starts[a]), int(starts[a + 1]))
            decided[part] = _decide(price[part], int(keep[a]), size - bound)
        room = _ROOM * (1 + np.abs(low) + np.abs(high))
        low, high = low - room, high + room
        decided[(low > 0) | (high < 0)] = 0
        free = decided != 0
        low[free], high[free] = np.minimum(low[free], 0.0), np.maximum(high[free], 0.0)
        low[decided == 1] = high[decided == 1] = 0.0
        D = np.where(decided < 0, d, 0.0)
        slope = M @ (u - v) - D * u
        self.u, self.d, self.b, self.decided = u[back], D[back], slope[back], decided[back]
        self.lower, self.upper = low[back], high[back]
        self.constant = 0.5 * float((u - v) @ M @ (u - v)) - 0.5 * float(D @ u**2)

    def value(self, y: FloatArray) -> float:
        """The objective of a binary y, by the evaluator, in scaled units."""
        return self.to_units(self.problem.loss(self._expand(y)))

    def from_units(self, value: float) -> float:
        """A scaled value as a loss of the instance."""
        return self.offset + self.scale * value

    def to_units(self, loss: float) -> float:
        """The inverse of `from_units`."""
        return (loss - self.offset) / self.scale

    def loss(self, pruned: BoolArray) -> float:
        """The loss of a selection, bool (n₀,), in units of the instance."""
        return self.problem.loss(pruned)

    def _expand(self, y: FloatArray) -> BoolArray:
        return self.problem.expand(np.round(y).astype(np.int64))

    def selection(self, y: FloatArray) -> BoolArray | None:
        """The selection, bool (n₀,), of a nearly binary y, or None when its rounding misses the budget."""
        pruned = self._expand(y)
        return pruned if self.problem.instance.admits(pruned) else None

    def restrict(self, pruned: BoolArray) -> FloatArray:
        """The open part of a selection, float64 (n,)."""
        out: FloatArray = pruned[self.problem.index].astype(np.float64)
        return out

    def sums(self) -> list[tuple[IntArray, int]]:
        """The equations Σ y = p that y meets: their variables, and p; of groups and of cross groups."""
        return open_sums(self.problem.instance, self.problem.index, self.problem.base)

    def names(self) -> list[str]:
        """Of the columns y."""
        return [f"y{i}" for i in self.problem.index.tolist()]

    def best_point(self, y: FloatArray) -> FloatArray:
        """The minimiser x for a binary y, float64 (n,)."""
        x = np.zeros(self.n)
        for at in self.parts:
            K, P = at[y[at] < 0.5], at[y[at] >= 0.5]
            if K.size:
                x[K] = self.v[K] + np.linalg.solve(self.M[np.ix_(K, K)], self.M[np.ix_(K, P)] @ self.v[P])
        return x

    def add_rows(self, rows: RowBuilder, shift: FloatArray) -> None:
        """Budgets, and lower (1 − y) ≤ x ≤ upper (1 − y), for columns y (n,) and x − shift (n,)."""
        for members, p in self.sums():
            rows.add(members, 1.0, p, p)
        for i in range(self.n):
            low, high, at = float(self.lower[i]), float(self.upper[i]), float(shift[i])
            rows.add([self.n + i, i], [1.0, high], -np.inf, high - at)
            rows.add([self.n + i, i], [1.0, low], low - at, np.inf)

    def y_bounds(self) -> tuple[FloatArray, FloatArray]:
        """Bounds of y: decided weights are fixed."""
        return (self.decided == 1).astype(np.float64), (self.decided != 0).astype(np.float64)


def _decide(price: FloatArray, keep: int, slack: float) -> Int8Array:
    """The decisions shared by all selections within `slack` of the bound, for one group, int8 (c,).

    The bound is minus the sum of the `keep` largest prices: taking another weight in, or one of those out, raises
    it by the distance to the last price within, or to the first one outside.
    """
    decided = np.full(price.size, -1, np.int8)
    order = np.argsort(-price, kind="stable")
    inside, outside = order[:keep], order[keep:]
    slack = slack * (1 + 1e-6) + 1e-9
    if inside.size and outside.size:
        decided[inside[price[inside] - price[outside[0]] > slack]] = 0
        decided[outside[price[inside[-1]] - price[outside] > slack]] = 1
    elif inside.size:
        decided[inside] = 0
    else:
        decided[outside] = 1
    return decided


def start_joint(context: Context, problem: JointProblem, heuristic: JointHeuristic | None) -> None:
    """Report a first selection, from the heuristic if given, and the bound that the offset is."""
    monitor = context.monitor
    first = problem.first()
    monitor.report(problem.loss(first), first)
    if context.warm_start is not None:
        monitor.report(problem.loss(context.warm_start), context.warm_start)
    rounding = problem.rounding(first)
    monitor.report_bound(0.0 if problem.nonnegative else problem.offset - rounding)
    if heuristic is not None and not monitor.should_stop():
        inner = Monitor(Stop(max_iterations=_MOVES, time_limit=_SECONDS, should_stop=monitor.should_stop))
        heuristic.run(problem.instance, Context("joint", context.seed, inner, context.warm_start, threads=1))
        if inner.pruned is not None:
            monitor.report(problem.loss(inner.pruned), inner.pruned)  # its own value may have drifted


def joint_shell(problem: ScaledJoint, units: float) -> LinearModel:
    """The MIQP in y and x − v without its quadratic term ½ (x − v)ᵀM(x − v)."""
    n = problem.n
    rows = RowBuilder(2 * n)
    problem.add_rows(rows, problem.v)
    matrix, row_lower, row_upper = rows.build()
    low, high = problem.y_bounds()
    integer = np.arange(2 * n) < n
    x_low, x_high = np.minimum(problem.lower, 0.0), np.maximum(problem.upper, 0.0)
    return LinearModel(
        np.zeros(2 * n),
        np.concatenate([low, x_low - problem.v]),
        np.concatenate([high, x_high - problem.v]),
        integer,
        csr_array(matrix),
        row_lower,
        row_upper,
        problem.names() + [f"t{i}" for i in problem.problem.index.tolist()],
    ).in_units(units)


def pyomo_joint(problem: ScaledJoint, units: float = 1.0, perspective: bool = True) -> Any:
    """The joint problem in Pyomo: binary `v[i]` (pruned), `x[i]` the distance of weight i from a centre.

    As MIQP: ½ (x − v)ᵀM(x − v), lower (1 − y) ≤ x ≤ upper (1 − y). As perspective: also cones
    x_i² ≤ r_i (1 − y_i) for the share D of the curvature.
    """
    import pyomo.environ as pyo

    n = problem.n
    center = problem.u if perspective else problem.v
    low, high = problem.y_bounds()
    x_low, x_high = np.minimum(problem.lower, 0.0), np.maximum(problem.upper, 0.0)
    out = pyo.ConcreteModel()
    out.v = pyo.Var(range(n), domain=pyo.Binary, bounds=lambda _, i: (int(low[i]), int(high[i])))
    out.x = pyo.Var(range(n), bounds=lambda _, i: (float(x_low[i] - center[i]), float(x_high[i] - center[i])))
    add_budgets(out, problem.sums())
    out.row = pyo.ConstraintList()
    for i in range(n):
        at = float(center[i])
        out.row.add(out.x[i] + at <= float(problem.upper[i]) * (1 - out.v[i]))
        out.row.add(out.x[i] + at >= float(problem.lower[i]) * (1 - out.v[i]))
    P = problem.M - np.diag(problem.d) if perspective else problem.M
    terms = []
    for part in problem.parts:
        for k, i in enumerate(part.tolist()):
            terms.append(0.5 * float(P[i, i]) * out.x[i] * out.x[i])
            terms += [float(P[i, j]) * out.x[i] * out.x[j] for j in part[:k].tolist() if P[i, j]]
    constant = 0.0
    if perspective:
        open_ = np.flatnonzero(problem.d > 0).tolist()
        out.full = pyo.Var(open_, bounds=lambda _, i: (float(x_low[i]), float(x_high[i])))
        out.r = pyo.Var(open_, bounds=lambda _, i: (0.0, float(max(x_low[i] ** 2, x_high[i] ** 2))))
        out.kept = pyo.Var(open_, bounds=(0.0, 1.0))
        out.cone = pyo.ConstraintList()
        for i in open_:
            out.row.add(out.full[i] == out.x[i] + float(center[i]))
            out.row.add(out.kept[i] == 1 - out.v[i])
            out.cone.add(out.full[i] * out.full[i] <= out.r[i] * out.kept[i])
            terms.append(0.5 * float(problem.d[i]) * out.r[i])
        terms += [float(b) * out.x[i] for i, b in enumerate(problem.b.tolist())]
        constant = problem.constant
    out.objective = pyo.Objective(expr=units * (pyo.quicksum(terms) + constant))
    return out
