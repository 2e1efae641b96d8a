"""The pruning problem as other solvers take it: reduced and scaled arrays, linear models, Pyomo models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from cbs_opt.errors import SolverError
from cbs_opt.instance import Instance
from cbs_opt.selection import SelectionProblem
from cbs_opt.solvers.problem.presolve import Coupling, presolve
from cbs_opt.typing import BoolArray, FloatArray, IntArray

LARGEST = 1000
"""Most open weights of a dense model."""

UNITS = 1000.0
"""Objectives near 1 are multiplied by this: the absolute tolerances of the solvers are then small against them."""


class ScaledSelection:
    """min ½ yᵀQy + cᵀy over binary y with given group sums, after presolve, divided by a scale of choice.

    Parameters
    ----------
    instance : Instance
    best : bool (n,), optional
        A selection, from whose loss the scale is taken: objectives are then near 1, which solvers with absolute
        tolerances need. Without it the largest entry of the presolved Q is near 1.

    Attributes
    ----------
    n : int
        Open weights.
    parts : list of (int64 (c,), float64 (c, c))
        The coupled components: their open weights and Q.
    c : float64 (n,)
        Linear terms, the diagonal ½ Q_ii of uncoupled weights included (y_i² = y_i).
    group : int64 (n,)
    budget : int64 (G,)
    limit : float
        Scaled value of `best`, infinity without it.
    scale : float
        Loss = offset + scale · (½ yᵀQy + cᵀy).
    """

    def __init__(self, instance: Instance, best: BoolArray | None = None) -> None:
        self.instance = instance
        self.original = SelectionProblem(instance)
        self.presolved = presolve(instance)
        self.group, self.budget = self.presolved.group, self.presolved.budget
        self.offset = self.presolved.offset
        self.n = self.presolved.index.size
        if self.n > LARGEST:
            raise SolverError(f"a dense model takes at most {LARGEST} open weights, the instance has {self.n}")
        self.c = self.presolved.linear.copy()
        self.parts: list[tuple[IntArray, FloatArray]] = []
        start = 0
        for component in self.presolved.components:
            at = np.arange(start, start + component.index.size)
            start += component.index.size
            if component.coupling is Coupling.DIAGONAL:
                self.c[at] += 0.5 * self.original.diagonal[component.index] / self.presolved.scale
            elif component.coupling is Coupling.FULL:
                w = instance.weights[component.index]
                local = component.index - instance.curvature.block_slice(component.block).start
                H = instance.curvature.submatrix(component.block, local, local)
                Q = H * w[:, None] * w / self.presolved.scale
                self.parts.append((at, 0.5 * (Q + Q.T)))
        self.scale = self.presolved.scale
        self.limit = np.inf
        if best is not None and self.n:
            value = abs(self.value(self.presolved.restrict(best)))
            # Below 1e-6 of the largest entries the tolerances of the solvers would be felt.
            factor = max(value, 1e-6 * self.largest) or 1.0
            self.scale *= factor
            self.c /= factor
            self.parts = [(at, Q / factor) for at, Q in self.parts]
            self.limit = self.value(self.presolved.restrict(best))

    @property
    def largest(self) -> float:
        """Largest absolute entry of Q and c."""
        entries = [float(np.abs(Q).max()) for _, Q in self.parts]
        return max([float(np.abs(self.c).max(initial=0.0)), *entries])

    @cached_property
    def matrix(self) -> FloatArray:
        """All components together, float64 (n, n)."""
        Q = np.zeros((self.n, self.n))
        for at, part in self.parts:
            Q[np.ix_(at, at)] = part
        return Q

    def value(self, y: FloatArray) -> float:
        """½ yᵀQy + cᵀy in scaled units."""
        return float(sum(0.5 * y[at] @ Q @ y[at] for at, Q in self.parts) + self.c @ y)

    def loss(self, value: float) -> float:
        """A scaled value in the units of the instance."""
        return self.offset + self.scale * value

    def scaled(self, loss: float) -> float:
        """The inverse of `loss`."""
        return (loss - self.offset) / self.scale

    def evaluate(self, pruned: BoolArray) -> float:
        """The loss of a selection, in units of the instance."""
        return self.original.value(pruned)

    def selection(self, y: FloatArray) -> BoolArray | None:
        """The selection, bool (n,), of a nearly binary y, or None when its rounding misses the budget."""
        pruned = self.presolved.expand(np.round(y))
        return pruned if self.instance.admits(pruned) else None

    def restrict(self, pruned: BoolArray) -> FloatArray:
        """The open part of a selection, float64 (n,)."""
        return self.presolved.restrict(pruned)

    def members(self) -> list[IntArray]:
        """Open weights of each group."""
        order = np.argsort(self.group, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.group, minlength=self.budget.size))[:-1])

    def minima(self, rows: FloatArray) -> FloatArray:
        """Smallest value of each row of `rows`, (k, n), over all y that meet the budgets; float64 (k,)."""
        total = np.zeros(rows.shape[0])
        for members, p in zip(self.members(), self.budget.tolist(), strict=True):
            if p:
                total += np.sort(rows[:, members], axis=1)[:, :p].sum(axis=1)
        return total


@dataclass(frozen=True, eq=False)
class LinearModel:
    """min cost·v + offset, row_lower ≤ A v ≤ row_upper, lower ≤ v ≤ upper, some v integer.

    Attributes
    ----------
    cost, lower, upper : float64 (v,)
    integer : bool (v,)
    matrix : csr_array (r, v)
    row_lower, row_upper : float64 (r,)
    names : list of str
        Of the columns; the first are the binary y.
    offset : float
    """

    cost: FloatArray
    lower: FloatArray
    upper: FloatArray
    integer: BoolArray
    matrix: csr_array
    row_lower: FloatArray
    row_upper: FloatArray
    names: list[str]
    offset: float = 0.0

    def in_units(self, units: float) -> LinearModel:
        """The same model with its objective multiplied."""
        return replace(self, cost=self.cost * units, offset=self.offset * units)


class RowBuilder:
    """Rows of a linear model, one at a time."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._index: list[IntArray] = []
        self._values: list[FloatArray] = []
        self._lower: list[float] = []
        self._upper: list[float] = []

    def add(self, index: Any, values: Any, lower: float, upper: float) -> None:
        """Append lower ≤ Σ values · v[index] ≤ upper."""
        self._index.append(np.asarray(index, dtype=np.int64))
        self._values.append(np.broadcast_to(np.asarray(values, dtype=np.float64), self._index[-1].shape))
        self._lower.append(float(lower))
        self._upper.append(float(upper))

    def build(self) -> tuple[csr_array, FloatArray, FloatArray]:
        """Matrix, lower and upper sides."""
        starts = np.concatenate([[0], np.cumsum([index.size for index in self._index])]).astype(np.int64)
        index = np.concatenate([np.zeros(0, np.int64), *self._index])
        values = np.concatenate([np.zeros(0), *self._values])
        matrix = csr_array((values, index, starts), shape=(len(self._index), self.columns))
        return matrix, np.array(self._lower), np.array(self._upper)


def rlt_model(problem: ScaledSelection) -> LinearModel:
    """The linearisation with z_ij = y_i y_j, exact at binary y.

    Each budget Σ_{j∈g} y_j = p, times y_i, becomes Σ_{j∈g, j≠i} z_ij = (p − [i∈g]) y_i wherever the products of i
    with the whole group are there (Adams and Sherali 1986); for a group that reaches beyond the component of i
    the sum is at most that, and Σ_j (y_j − z_ij) ≤ p (1 − y_i). The McCormick inequalities z_ij ≤ y_i, z_ij ≤ y_j
    and z_ij ≥ y_i + y_j − 1 are added where those equations do not imply them at binary y.
    """
    n, c = problem.n, problem.c.copy()
    pairs, cost = [], []
    number = {}
    for at, Q in problem.parts:
        c[at] += 0.5 * Q.diagonal()
        for a in range(at.size):
            for b in range(a + 1, at.size):
                number[int(at[a]), int(at[b])] = n + len(pairs)
                pairs.append((int(at[a]), int(at[b])))
                cost.append(Q[a, b])
    columns = n + len(pairs)
    rows = RowBuilder(columns)
    members = problem.members()
    for group, p in zip(members, problem.budget.tolist(), strict=True):
        rows.add(group, 1.0, p, p)
    closed = np.zeros((n, problem.budget.size), dtype=bool)
    for at, _ in problem.parts:
        inside = np.zeros(n, dtype=bool)
        inside[at] = True
        for g in np.unique(problem.group[at]).tolist():
            p, group = int(problem.budget[g]), members[g]
            whole = bool(inside[group].all())
            for i in at.tolist():
                own = int(problem.group[i] == g)
                others = group[inside[group] & (group != i)]
                z = [number[min(i, j), max(i, j)] for j in others.tolist()]
                closed[i, g] = whole
                if whole:
                    rows.add([*z, i], [*np.ones(len(z)), own - p], 0, 0)
                elif z:
                    rows.add([*z, i], [*np.ones(len(z)), own - p], -np.inf, 0)
                    index = [*others.tolist(), *z, i]
                    left = p - own  # at most this many of the others, whether or not y_i = 1
                    values = [*np.ones(len(z)), *-np.ones(len(z)), float(p)]
                    rows.add(index, values, -np.inf, float(left + own))
    for (i, j), z, value in zip(pairs, range(n, columns), cost, strict=True):
        if closed[i, problem.group[j]] and closed[j, problem.group[i]]:
            continue
        if value < 0:
            rows.add([z, i], [1, -1], -np.inf, 0)
            rows.add([z, j], [1, -1], -np.inf, 0)
        elif value > 0:
            rows.add([z, i, j], [1, -1, -1], -1, np.inf)
    matrix, low, high = rows.build()
    integer = np.zeros(columns, dtype=bool)
    integer[:n] = True
    names = [f"y{i}" for i in problem.presolved.index.tolist()]
    names += [f"z{names[i][1:]}_{names[j][1:]}" for i, j in pairs]
    return LinearModel(
        np.concatenate([c, cost]), np.zeros(columns), np.ones(columns), integer, matrix, low, high, names
    )


def pyomo_linear(model: LinearModel) -> Any:
    """A Pyomo model of a linear model: variables `v[j]`, constraints `row[r]`."""
    import pyomo.environ as pyo

    out = pyo.ConcreteModel()
    kind = {True: pyo.Integers, False: pyo.Reals}
    out.v = pyo.Var(
        range(model.cost.size),
        domain=lambda _, j: kind[bool(model.integer[j])],
        bounds=lambda _, j: (_or_none(model.lower[j]), _or_none(model.upper[j])),
    )
    out.row = pyo.ConstraintList()
    matrix = model.matrix
    for r in range(matrix.shape[0]):
        part = slice(matrix.indptr[r], matrix.indptr[r + 1])
        index, values = matrix.indices[part].tolist(), matrix.data[part].tolist()
        if not index:
            continue
        body = pyo.quicksum(a * out.v[j] for j, a in zip(index, values, strict=True))
        low, high = _or_none(model.row_lower[r]), _or_none(model.row_upper[r])
        out.row.add(body == low if low == high else pyo.inequality(low, body, high))
    terms = [float(a) * out.v[j] for j, a in enumerate(model.cost) if a]
    out.objective = pyo.Objective(expr=pyo.quicksum(terms) + model.offset)
    return out


def pyomo_selection(problem: ScaledSelection, units: float = 1.0) -> Any:
    """The selection problem as a Pyomo MIQP: binary `v[i]`, convex quadratic objective, one sum per group."""
    import pyomo.environ as pyo

    out = pyo.ConcreteModel()
    out.v = pyo.Var(range(problem.n), domain=pyo.Binary)
    terms = [float(c) * out.v[i] for i, c in enumerate(problem.c)]
    for at, Q in problem.parts:
        for a, i in enumerate(at.tolist()):
            terms.append(0.5 * float(Q[a, a]) * out.v[i] * out.v[i])
            terms += [float(Q[a, b]) * out.v[i] * out.v[int(at[b])] for b in range(a) if Q[a, b]]
    add_budgets(out, problem.members(), problem.budget)
    out.objective = pyo.Objective(expr=units * pyo.quicksum(terms))
    return out


def add_budgets(model: Any, members: list[IntArray], budget: IntArray) -> None:
    """Give a Pyomo model one sum of binary `v[i]` for each group."""
    import pyomo.environ as pyo

    model.budget = pyo.ConstraintList()
    for group, p in zip(members, budget.tolist(), strict=True):
        if group.size:
            model.budget.add(pyo.quicksum(model.v[i] for i in group.tolist()) == p)


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
