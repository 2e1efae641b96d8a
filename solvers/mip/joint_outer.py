"""The joint problem as a MILP: tangents on the separated convex part, perspective tangents on the rest."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array, vstack

from cbs_opt.solvers.mip.joint_model import ScaledJoint
from cbs_opt.solvers.mip.selection_model import LinearModel, RowBuilder
from cbs_opt.typing import FloatArray, IntArray

_SPACING = 0.25  # of the first tangents, in units where the objective is near 1
_FEWEST, _MOST = 3, 32  # first tangents of a term
_SMALL = 1e-10  # largest effect on the objective of a direction that is left out


class JointOuterModel:
    """Columns y, x, q_k = a_kᵀ(x − u), s_k ≥ q_k² and r_i ≥ x_i²/(1 − y_i), the last two by tangents.

    With M − D = 2 Σ m_k a_k a_kᵀ the objective of `ScaledJoint` is constant + bᵀ(x − u) + Σ m_k s_k + ½ Σ d_i r_i.
    A tangent at q = t reads s ≥ 2tq − t²; one at x/(1 − y) = t reads r ≥ 2tx − t²(1 − y), which holds for y = 1
    and x = 0 too, and is tighter than r ≥ 2tx − t² between. With all tangents at the minimiser x of a binary y
    the model is exact there: their sum has no slope in x.

    Parameters
    ----------
    problem : ScaledJoint
    units : float
        The objective is multiplied by this, so that absolute tolerances of the solver are small against it.
    """

    def __init__(self, problem: ScaledJoint, units: float) -> None:
        self.problem, self.units, self.n = problem, units, problem.n
        n = problem.n
        rows, weight, low, high = [np.zeros((0, n))], [np.zeros(0)], [np.zeros(0)], [np.zeros(0)]
        limit = np.sqrt(2 * problem.value_limit)
        x_low, x_high = np.minimum(problem.lower, 0.0), np.maximum(problem.upper, 0.0)
        for at in problem.parts:
            P = problem.M[np.ix_(at, at)] - np.diag(problem.d[at])
            curvature, V = np.linalg.eigh(P)
            a = V.T
            middle = a @ (problem.v[at] - problem.u[at])
            reach = limit * np.sqrt(np.einsum("ki,ij,kj->k", a, problem.A[np.ix_(at, at)], a))
            below = np.minimum(a * (x_low - problem.u)[at], a * (x_high - problem.u)[at]).sum(axis=1)
            above = np.maximum(a * (x_low - problem.u)[at], a * (x_high - problem.u)[at]).sum(axis=1)
            least, most = np.maximum(middle - reach, below), np.minimum(middle + reach, above)
            half = np.maximum(0.5 * curvature, 0.0)
            felt = half * np.maximum(least**2, most**2) > _SMALL
            # A direction of great curvature becomes q in units of its own effect.
            length = np.sqrt(np.maximum(half, 1.0))
            full = np.zeros((int(felt.sum()), n))
            full[:, at] = (a * length[:, None])[felt]
            rows.append(full)
            weight.append((half / length**2)[felt])
            low.append((least * length)[felt])
            high.append((most * length)[felt])
        self.rows, self.weight = np.concatenate(rows), np.concatenate(weight)
        room = 1e-2 * (1.0 + np.abs(np.concatenate(low)) + np.abs(np.concatenate(high)))
        self.low, self.high = np.concatenate(low) - room, np.concatenate(high) + room
        self.center = self.rows @ problem.u
        self.k = self.weight.size
        self._squares: dict[tuple[int, float], None] = {}
        self._cones: dict[tuple[int, float], None] = {}
        for k in range(self.k):
            for t in _grid(float(self.low[k]), float(self.high[k]), float(self.weight[k])):
                self._square(k, t)
        for i in np.flatnonzero(problem.d > 0).tolist():
            for t in _grid(float(problem.lower[i]), float(problem.upper[i]), 0.5 * float(problem.d[i])):
                self._cone(i, t)

    def _square(self, k: int, t: float) -> bool:
        key = (k, float(f"{t:.12g}"))
        return key not in self._squares and self._squares.setdefault(key) is None

    def _cone(self, i: int, t: float) -> bool:
        key = (i, float(f"{t:.12g}"))
        return key not in self._cones and self._cones.setdefault(key) is None

    @property
    def tangents(self) -> int:
        """Number of tangents."""
        return len(self._squares) + len(self._cones)

    def touch(self, y: FloatArray) -> bool:
        """Add the tangents at the best x of a binary y; returns whether any is new."""
        x = self.problem.best_point(y)
        new = [self._square(k, t) for k, t in enumerate((self.rows @ x - self.center).tolist())]
        new += [self._cone(i, float(x[i])) for i in np.flatnonzero((self.problem.d > 0) & (y < 0.5)).tolist()]
        return any(new)

    def cut(self, columns: FloatArray, tolerance: float) -> bool:
        """Add the tangents that a point of the linear relaxation violates; returns whether there were any."""
        n, k, d = self.n, self.k, self.problem.d
        y, x, q, s, r = np.split(columns, np.cumsum([n, n, k, k]))
        new = [self._square(int(j), float(q[j])) for j in np.flatnonzero(self.weight * (q * q - s) > tolerance)]
        z = np.maximum(1.0 - y, 1e-6)
        t = np.clip(x / z, self.problem.lower, self.problem.upper)
        violated = np.flatnonzero(0.5 * d * (2 * t * x - t * t * (1.0 - y) - r) > tolerance)
        new += [self._cone(int(i), float(t[i])) for i in violated]
        return any(new)

    def point(self, y: FloatArray) -> FloatArray:
        """All columns at a binary y."""
        x = self.problem.best_point(y)
        q = self.rows @ x - self.center
        return np.concatenate([y, x, q, q * q, x * x])

    def build(self, relaxed: bool = False) -> LinearModel:
        """The model with the tangents so far; without integrality if `relaxed`."""
        problem, n, k = self.problem, self.n, self.k
        columns = 3 * n + 2 * k
        rows = RowBuilder(columns)
        problem.add_rows(rows, np.zeros(n))
        for j in range(k):
            index = np.flatnonzero(self.rows[j])
            b = self.center[j]
            rows.add([*(n + index), 2 * n + j], [*self.rows[j, index], -1.0], b, b)
        matrix, low, high = rows.build()
        at = np.array([key[0] for key in self._squares], dtype=np.int64)
        t = np.array([key[1] for key in self._squares])
        squares = _rows([2 * n + at, 2 * n + k + at], [-2.0 * t, np.ones(t.size)], columns)
        i = np.array([key[0] for key in self._cones], dtype=np.int64)
        c = np.array([key[1] for key in self._cones])
        cones = _rows(
            [i, n + i, 2 * n + 2 * k + i], [-c * c, -2.0 * c, np.ones(c.size)], columns
        )  # r ≥ 2cx − c²(1 − y)
        y_low, y_high = problem.y_bounds()
        x_low, x_high = np.minimum(problem.lower, 0.0), np.maximum(problem.upper, 0.0)
        index = problem.problem.index.tolist()
        names = problem.names() + [f"x{j}" for j in index] + [f"q{j}" for j in range(k)]
        names += [f"s{j}" for j in range(k)] + [f"r{j}" for j in index]
        return LinearModel(
            np.concatenate([np.zeros(n), problem.b, np.zeros(k), self.weight, 0.5 * problem.d]) * self.units,
            np.concatenate([y_low, x_low, self.low, np.zeros(k + n)]),
            np.concatenate([y_high, x_high, self.high, np.full(k + n, np.inf)]),
            (np.arange(columns) < n) & (not relaxed),
            csr_array(vstack([matrix, squares, cones])),
            np.concatenate([low, -t * t, -c * c]),
            np.concatenate([high, np.full(t.size + c.size, np.inf)]),
            names,
            (problem.constant - float(problem.b @ problem.u)) * self.units,
        )


def _grid(low: float, high: float, weight: float) -> list[float]:
    count = int(np.clip(np.ceil((high - low) * np.sqrt(weight) / _SPACING), _FEWEST, _MOST))
    points: list[float] = np.linspace(low, high, count).tolist()
    return points


def _rows(index: list[IntArray], values: list[FloatArray], columns: int) -> csr_array:
    """A sparse matrix with the same number of entries in every row."""
    width, count = len(index), index[0].size
    return csr_array(
        (
            np.stack(values, axis=1).ravel(),
            np.stack(index, axis=1).ravel(),
            np.arange(0, width * count + 1, width),
        ),
        shape=(count, columns),
    )
