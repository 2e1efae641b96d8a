"""The selection problem as a MILP: a convexified, eigen-separated objective under tangents."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.linalg import cho_solve, null_space
from scipy.sparse import csr_array

from cbs_opt.solvers.mip.selection_model import LinearModel, RowBuilder
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.typing import BoolArray, FloatArray, IntArray

_LARGEST_SHIFT = 400  # weights of a component up to which its diagonal is shifted: Newton steps cost O(c³)
_SPACING = 0.15  # of the first tangents, in units where the objective is near 1
_FEWEST, _MOST = 5, 64  # first tangents of a direction
_SMALL = 1e-6  # length of a direction that is omitted: its square only adds to the objective


class Separated:
    """½ yᵀQy + cᵀy = Σ_k m_k (a_kᵀy − b_k)² + dᵀy + e at every binary y that meets the budgets.

    For each component C, y = x̄ + Bz on the budgets that lie inside C. There, for any diagonal D that leaves
    Bᵀ(Q − D)B positive semidefinite, ½ yᵀQy = ½ yᵀ(Q − D)y + ½ Σ D_ii y_i, since y_i² = y_i, and the right side
    is convex: the eigenvectors of Bᵀ(Q − D)B separate it. D is chosen so that the bound of the relaxation is
    as large as possible (QCR: Billionnet, Elloumi, Plateau 2009), by `optimal_shift`.

    Parameters
    ----------
    problem : SelectionProblem
    value : float
        Objective of a known selection, in scaled units: worse selections need not be represented.
    multipliers : float64 (G,)
        Threshold of each group's gradient in the relaxation, for budgets that reach beyond a component.
    shift : bool
        Whether to shift the diagonal; else D = 0.
    should_stop : callable

    Attributes
    ----------
    rows : float64 (k, n)
    center : float64 (k,)
        The b_k.
    weight : float64 (k,)
        The m_k ≤ 1; below 1 only for rows of length 1.
    lower, upper : float64 (k,)
        Range of a_kᵀy − b_k over the selections that are no worse than `value`.
    linear : float64 (n,)
    constant : float
    """

    def __init__(
        self,
        problem: SelectionProblem,
        value: float,
        multipliers: FloatArray,
        shift: bool,
        should_stop: Callable[[], bool],
    ) -> None:
        n = problem.n
        self.linear, self.constant = problem.linear.copy(), 0.0
        rows, center, middle, reach = [np.zeros((0, n))], [np.zeros(0)], [np.zeros(0)], [np.zeros(0)]
        weight = [np.zeros(0)]
        slack = value + 1e-6 * max(abs(value), 1.0) - float(problem.minima(problem.linear[None])[0])
        for at, Q in problem.parts:
            x, B = affine_hull(problem, at)
            d = np.zeros(at.size)
            if shift and at.size <= _LARGEST_SHIFT and not should_stop():
                c = problem.linear[at] - multipliers[problem.group[at]]
                d = optimal_shift(Q, c, x, B, should_stop)
            P = Q - np.diag(d)
            self.linear[at] += 0.5 * d + P @ x
            self.constant -= 0.5 * float(x @ P @ x)
            curvature, V = np.linalg.eigh(B.T @ P @ B)
            # An eigenvalue below zero by rounding is counted with its largest effect.
            self.constant += 0.5 * float(np.minimum(curvature, 0.0).sum()) * at.size
            a = np.sqrt(np.maximum(curvature, 0.0) / 2.0)[:, None] * (B @ V).T
            length = np.linalg.norm(a, axis=1)
            a, length = a[length > _SMALL], np.minimum(length[length > _SMALL], 1.0)
            a = a / length[:, None]  # rows of tiny entries would be below the tolerances of a solver
            weight.append(length**2)
            full = np.zeros((a.shape[0], n))
            full[:, at] = a
            rows.append(full)
            center.append(a @ x)
            for parts, part in zip((middle, reach), _ellipsoid(Q, x, B, a, slack), strict=True):
                parts.append(part)
        self.rows, self.center = np.concatenate(rows), np.concatenate(center)
        self.weight = np.concatenate(weight)
        low, high = problem.minima(self.rows), -problem.minima(-self.rows)
        self.lower = np.maximum(low - self.center, np.concatenate(middle) - np.concatenate(reach))
        self.upper = np.minimum(high - self.center, np.concatenate(middle) + np.concatenate(reach))
        # Room so that no bound of a column touches an optimal point.
        room = 1e-2 * (1.0 + np.abs(self.lower) + np.abs(self.upper))
        self.lower, self.upper = self.lower - room, self.upper + room

    def directions(self, y: FloatArray) -> FloatArray:
        """a_kᵀy − b_k, float64 (k,)."""
        return np.asarray(self.rows @ y - self.center)


def affine_hull(problem: SelectionProblem, at: IntArray) -> tuple[FloatArray, FloatArray]:
    """A point x̄ and an orthonormal basis B of the budgets that lie inside a component.

    Returns
    -------
    x : float64 (c,)
    B : float64 (c, r)
    """
    group = problem.group[at]
    sizes = np.bincount(problem.group, minlength=problem.budget.size)
    inside = [g for g in np.unique(group).tolist() if int((group == g).sum()) == sizes[g]]
    x = np.zeros(at.size)
    for g in inside:
        x[group == g] = problem.budget[g] / sizes[g]
    if not inside:
        return x, np.eye(at.size)
    return x, np.asarray(null_space(np.array([(group == g).astype(np.float64) for g in inside])))


def _ellipsoid(
    Q: FloatArray, x: FloatArray, B: FloatArray, rows: FloatArray, slack: float
) -> tuple[FloatArray, FloatArray]:
    """Middle and reach of rows·(y − x̄) over the ellipsoid ½ yᵀQy ≤ slack within y = x̄ + Bz."""
    eigenvalues, V = np.linalg.eigh(B.T @ Q @ B)
    usable = eigenvalues > 1e-9 * max(float(eigenvalues.max(initial=0.0)), 1e-300)
    V = B @ V
    inverse = np.where(usable, 1.0 / np.where(usable, eigenvalues * (1 - 1e-6), 1.0), 0.0)
    z = -V @ (inverse * (V.T @ (Q @ x)))
    middle = rows @ z
    least = 0.5 * float((x + z) @ Q @ (x + z))
    # The least value is reduced by what an inexact z could hide.
    room = max(slack - least + 1e-6 * (1.0 + abs(least)), 0.0)
    parts = rows @ V
    reach = np.sqrt(2.0 * room * (parts**2 @ inverse))
    blind = np.abs(parts[:, ~usable]).max(axis=1, initial=0.0) > 1e-12 * np.linalg.norm(rows, axis=1)
    reach[blind] = np.inf
    return middle, reach


def optimal_shift(
    Q: FloatArray, c: FloatArray, x: FloatArray, B: FloatArray, should_stop: Callable[[], bool]
) -> FloatArray:
    """The diagonal D that maximises min_z ½ yᵀ(Q − D)y + (c + ½D)ᵀy over y = x + Bz.

    Newton's method on that concave function of D plus μ log det Bᵀ(Q − D)B, with μ → 0: with the minimiser y
    and G = B (Bᵀ(Q − D)B)⁻¹ Bᵀ its gradient is ½ y(1 − y) − μ diag G, its Hessian
    −¼ (1 − 2y)(1 − 2y)ᵀ ∘ G − μ G ∘ G. It is the dual of the semidefinite relaxation.

    Parameters
    ----------
    Q : float64 (c, c)
    c, x : float64 (c,)
    B : float64 (c, r)
    should_stop : callable

    Returns
    -------
    float64 (c,)
        The diagonal; any that leaves the matrix positive definite is valid. O(c³) per step.
    """
    n = Q.shape[0]
    size = float(np.trace(Q)) / n
    d = np.full(n, -1e-3 * size)

    def at(d: FloatArray, barrier: float) -> tuple[float, FloatArray, FloatArray] | None:
        P = Q - np.diag(d)
        try:
            L = np.linalg.cholesky(B.T @ P @ B)
        except np.linalg.LinAlgError:
            return None
        G = B @ cho_solve((L, True), B.T)
        y = x - G @ (P @ x + c + 0.5 * d)
        value = 0.5 * y @ Q @ y + c @ y + 0.5 * d @ (y - y * y)
        return float(value + 2.0 * barrier * np.log(np.diag(L)).sum()), y, G

    if B.shape[1] == 0 or at(d, 0.0) is None:
        return np.zeros(n)
    barrier = 1.0
    while barrier > 1e-6:
        for _ in range(30):
            point = at(d, barrier)
            if point is None or should_stop():
                return d
            value, y, G = point
            gradient = 0.5 * (y - y * y) - barrier * G.diagonal()
            tilt = 1.0 - 2.0 * y
            hessian = 0.25 * np.outer(tilt, tilt) * G + barrier * G * G
            hessian.flat[:: n + 1] += 1e-13 * float(np.trace(hessian))
            try:
                step = np.linalg.solve(hessian, gradient)
            except np.linalg.LinAlgError:
                return d
            gain, length = float(gradient @ step), 1.0
            while length > 1e-10:
                further = at(d + length * step, barrier)
                if further is not None and further[0] >= value + 1e-4 * length * gain - 1e-12 * abs(value):
                    d = d + length * step
                    break
                length *= 0.5
            if gain < 1e-2 * barrier or length <= 1e-10:
                break
        barrier *= 0.2
    return d


class OuterModel:
    """Columns y, u_k = a_kᵀy − b_k and s_k ≥ u_k², the last by tangents s_k ≥ 2 t u_k − t² at growing sets of t.

    Parameters
    ----------
    problem : SelectionProblem
    separated : Separated
    units : float
        The objective is multiplied by this, so that absolute tolerances of the solver are small against it.
    """

    def __init__(self, problem: SelectionProblem, separated: Separated, units: float) -> None:
        self.problem, self.separated, self.units = problem, separated, units
        self.n, self.k = problem.n, separated.center.size
        self._k: list[int] = []
        self._t: list[float] = []
        self._known: set[tuple[int, float]] = set()
        for k in range(self.k):
            low, high = float(separated.lower[k]), float(separated.upper[k])
            count = int(np.clip(np.ceil((high - low) * np.sqrt(separated.weight[k]) / _SPACING), _FEWEST, _MOST))
            for t in np.linspace(low, high, count).tolist():
                self._add(k, t)

    def _add(self, k: int, t: float) -> bool:
        key = (k, float(f"{t:.12g}"))
        if key in self._known:
            return False
        self._known.add(key)
        self._k.append(k)
        self._t.append(t)
        return True

    @property
    def tangents(self) -> int:
        """Number of tangents."""
        return len(self._k)

    def touch(self, y: FloatArray) -> bool:
        """Add the tangents at y in all directions: the model is exact there. Returns whether any is new."""
        new = [self._add(k, t) for k, t in enumerate(self.separated.directions(y).tolist())]
        return any(new)

    def cut(self, v: FloatArray, tolerance: float) -> bool:
        """Add the tangents that a point of the linear relaxation violates; returns whether there were any."""
        u, s = v[self.n : self.n + self.k], v[self.n + self.k :]
        violated = np.flatnonzero(self.separated.weight * (u * u - s) > tolerance)
        new = [self._add(int(k), float(u[k])) for k in violated]
        return any(new)

    def point(self, y: FloatArray) -> FloatArray:
        """All columns at a binary y."""
        u = self.separated.directions(y)
        return np.concatenate([y, u, u * u])

    def build(self, relaxed: bool = False) -> LinearModel:
        """The model with the tangents so far; without integrality if `relaxed`."""
        problem, separated, n, k = self.problem, self.separated, self.n, self.k
        rows = RowBuilder(n + 2 * k)
        for members, p in problem.sums():
            rows.add(members, 1.0, p, p)
        for j in range(k):
            index = np.flatnonzero(separated.rows[j])
            b = separated.center[j]
            rows.add([*index, n + j], [*separated.rows[j, index], -1.0], b, b)
        matrix, low, high = rows.build()
        t, at = np.array(self._t), np.array(self._k, dtype=np.int64)
        count = t.size
        tangents = csr_array(
            (
                np.stack([-2.0 * t, np.ones(count)], axis=1).ravel(),
                np.stack([n + at, n + k + at], axis=1).ravel(),
                np.arange(0, 2 * count + 1, 2),
            ),
            shape=(count, n + 2 * k),
        )
        cost = np.concatenate([separated.linear, np.zeros(k), separated.weight]) * self.units
        integer: BoolArray = np.zeros(n + 2 * k, dtype=bool)
        integer[:n] = not relaxed
        names = [f"y{i}" for i in problem.index.tolist()]
        names += [f"u{j}" for j in range(k)] + [f"s{j}" for j in range(k)]
        return LinearModel(
            cost,
            np.concatenate([np.zeros(n), separated.lower, np.zeros(k)]),
            np.concatenate([np.ones(n), separated.upper, np.full(k, np.inf)]),
            integer,
            csr_array(
                (
                    np.concatenate([matrix.data, tangents.data]),
                    np.concatenate([matrix.indices, tangents.indices]),
                    np.concatenate([matrix.indptr, tangents.indptr[1:] + matrix.indptr[-1]]),
                ),
                shape=(matrix.shape[0] + count, n + 2 * k),
            ),
            np.concatenate([low, -t * t]),
            np.concatenate([high, np.full(count, np.inf)]),
            names,
            separated.constant * self.units,
        )
