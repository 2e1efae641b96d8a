"""The selection problem as models for other solvers: linear models, Pyomo models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from cbs_opt.errors import SolverError
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.typing import BoolArray, FloatArray, IntArray

LARGEST = 1000
"""Largest number of open weights of a dense model."""

UNITS = 1000.0
"""Objectives near 1 are multiplied by this: the absolute tolerances of the solvers are then small against them."""


def check_open_weights(number: int) -> None:
    """Raise `SolverError` where a problem has too many open weights for a dense model."""
    if number > LARGEST:
        raise SolverError(f"a dense model takes at most {LARGEST} open weights, the instance has {number}")


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


def rlt_model(problem: SelectionProblem) -> LinearModel:
    """The linearisation with z_ij = y_i y_j, exact at binary y.

    Each budget Σ_{j∈g} y_j = p, times y_i, becomes Σ_{j∈g, j≠i} z_ij = (p − [i∈g]) y_i wherever the products of i
    with the whole group are there (Adams and Sherali 1986); for a group that reaches beyond the component of i
    the sum is at most that, and Σ_j (y_j − z_ij) ≤ p (1 − y_i). The McCormick inequalities z_ij ≤ y_i, z_ij ≤ y_j
    and z_ij ≥ y_i + y_j − 1 are added where those equations do not imply them at binary y.
    """
    n, c = problem.n, problem.linear.copy()
    pairs: list[tuple[int, int]] = []
    cost: list[float] = []
    number: dict[tuple[int, int], int] = {}
    for at, Q in problem.parts:
        c[at] += 0.5 * Q.diagonal()
        for a in range(at.size):
            for b in range(a + 1, at.size):
                number[int(at[a]), int(at[b])] = n + len(pairs)
                pairs.append((int(at[a]), int(at[b])))
                cost.append(float(Q[a, b]))
    columns = n + len(pairs)
    rows = RowBuilder(columns)
    members = problem.members()
    for group, p in problem.sums():
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
    for (i, j), product, value in zip(pairs, range(n, columns), cost, strict=True):
        if closed[i, problem.group[j]] and closed[j, problem.group[i]]:
            continue
        if value < 0:
            rows.add([product, i], [1, -1], -np.inf, 0)
            rows.add([product, j], [1, -1], -np.inf, 0)
        elif value > 0:
            rows.add([product, i, j], [1, -1, -1], -1, np.inf)
    matrix, low, high = rows.build()
    integer = np.zeros(columns, dtype=bool)
    integer[:n] = True
    names = [f"y{i}" for i in problem.index.tolist()]
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
        bounds=lambda _, j: (_or_none(float(model.lower[j])), _or_none(float(model.upper[j]))),
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


def pyomo_selection(problem: SelectionProblem, units: float = 1.0) -> Any:
    """The selection problem as a Pyomo MIQP: binary `v[i]`, convex quadratic objective, a sum for each group."""
    import pyomo.environ as pyo

    out = pyo.ConcreteModel()
    out.v = pyo.Var(range(problem.n), domain=pyo.Binary)
    terms = [float(c) * out.v[i] for i, c in enumerate(problem.linear)]
    for at, Q in problem.parts:
        for a, i in enumerate(at.tolist()):
            terms.append(0.5 * float(Q[a, a]) * out.v[i] * out.v[i])
            terms += [float(Q[a, b]) * out.v[i] * out.v[int(at[b])] for b in range(a) if Q[a, b]]
    add_budgets(out, problem.sums())
    out.objective = pyo.Objective(expr=units * pyo.quicksum(terms))
    return out


def add_budgets(model: Any, sums: list[tuple[IntArray, int]]) -> None:
    """Give a Pyomo model one sum of binary `v[i]` for each group and cross group."""
    import pyomo.environ as pyo

    model.budget = pyo.ConstraintList()
    for group, p in sums:
        model.budget.add(pyo.quicksum(model.v[i] for i in group.tolist()) == p)


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
