"""Every compiled sweep kernel equals its NumPy twin, and both do what their docstrings say."""

import numpy as np
import pytest

from cbs_opt.solvers.kernels import dense_numba as tree_kernels
from cbs_opt.solvers.kernels import sweeps_numba, sweeps_numpy

BOTH = (sweeps_numba, sweeps_numpy)
KINDS = ("factor", "factor32", "dense", "diagonal")


class Case:
    """A block with a random point, prices of two groups, and the dense Q that it stands for."""

    def __init__(self, kind, seed, t, n=9):
        rng = np.random.default_rng(seed)
        self.kind, self.t, self.n = kind, t, n
        self.rows = rng.standard_normal((n, 4)).astype(np.float32 if kind == "factor32" else np.float64)
        self.ridge = rng.uniform(0.1, 0.5, n)
        A = self.rows.astype(np.float64)
        self.Q = np.diag(self.ridge) if kind == "diagonal" else A @ A.T + np.diag(self.ridge)
        self.linear = rng.standard_normal(n)
        self.group = rng.integers(2, size=n)
        self.price, self.stiffness = rng.standard_normal(2), rng.uniform(0.0, 2.0, 2)
        self.x = np.clip(rng.uniform(-0.6, 1.6, n), 0.0, 1.0)
        self.order = rng.permutation(n)

    def sweep(self, module, count=None, margin=np.inf):
        """One sweep by `module`; returns what it changed."""
        x, price, active = self.x.copy(), self.price.copy(), self.order.copy()
        rest = (self.Q.diagonal().copy(), self.linear, self.group, price, self.stiffness, self.t, x, active)
        rest += (self.n if count is None else count, margin)
        state = np.zeros(0)
        if self.kind == "dense":
            state = self.Q @ x
            kept, gain = module.sweep_dense(self.Q, state, *rest)
        elif self.kind == "diagonal":
            kept, gain = module.sweep_diagonal(*rest)
        else:
            state = self.rows.astype(np.float64).T @ x
            kept, gain = module.sweep_factor(self.rows, self.ridge, state, *rest)
        return x, price, active[:kept], kept, gain, state

    def objective(self, x):
        """What a sweep minimises: the price of each group falls while its sum grows."""
        concave = 0.5 * self.t * self.Q.diagonal() @ (x * (1 - x))
        grown = np.bincount(self.group, x - self.x, 2)
        charged = -self.price @ grown + 0.5 * self.stiffness @ grown**2
        return 0.5 * x @ self.Q @ x + self.linear @ x + concave + charged


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [0.0, 0.4, 1.5])
@pytest.mark.parametrize("margin", [0.0, 0.2, np.inf])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_sweep_equals_its_twin(kind, t, margin, seed):
    case = Case(kind, seed, t)
    for mine, other in zip(*(case.sweep(module, margin=margin) for module in BOTH), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [0.0, 0.4, 1.5])
@pytest.mark.parametrize("seed", [4, 5])
def test_a_sweep_gains_what_it_says_and_keeps_its_state(kind, t, seed):
    case = Case(kind, seed, t)
    for module in BOTH:
        x, price, active, kept, gain, state = case.sweep(module)
        assert (x >= 0).all()
        assert (x <= 1).all()
        assert gain > 0
        assert gain == pytest.approx(case.objective(case.x) - case.objective(x), rel=1e-6)
        np.testing.assert_allclose(
            price, case.price - case.stiffness * np.bincount(case.group, x - case.x, 2), rtol=1e-9, atol=1e-12
        )
        np.testing.assert_array_equal(active, case.order)
        assert kept == case.n
        if kind == "dense":
            np.testing.assert_allclose(state, case.Q @ x, rtol=1e-9, atol=1e-12)
        elif kind != "diagonal":
            np.testing.assert_allclose(state, case.rows.astype(np.float64).T @ x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [0.0, 0.4, 1.5, 4.0])
@pytest.mark.parametrize("seed", range(6, 10))
def test_a_variable_goes_to_its_best_value(kind, t, seed):
    case = Case(kind, seed, t)
    for module in BOTH:
        x, *_ = case.sweep(module, count=1)
        moved = np.flatnonzero(x != case.x)
        assert set(moved) <= {case.order[0]}
        trial = case.x.copy()
        for value in np.linspace(0, 1, 101):
            trial[case.order[0]] = value
            assert case.objective(x) <= case.objective(trial) + 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_only_variables_that_stay_at_their_bound_are_dropped(kind, margin):
    case = Case(kind, 11, 0.2)
    case.stiffness[:] = 0.0
    for variable in range(case.n):
        case.order = np.roll(np.arange(case.n), -variable)
        for module in BOTH:
            _, _, _, kept, _, _ = case.sweep(module, count=1, margin=margin)
            z, d = case.x[variable], case.Q[variable, variable]
            slope = case.Q[variable] @ case.x + case.linear[variable] - case.price[case.group[variable]]
            slope += case.t * d * (0.5 - z)
            dropped = (z == 0 and slope > np.sqrt(d) * margin) or (z == 1 and slope < -np.sqrt(d) * margin)
            assert kept == (not dropped)


@pytest.mark.parametrize("stored", [np.float32, np.float64])
@pytest.mark.parametrize("made", [np.float32, np.float64])
def test_scaled_transpose(stored, made):
    rng = np.random.default_rng(2)
    G = rng.standard_normal((5, 150)).astype(stored)
    index, factor = np.sort(rng.permutation(150)[:131]), rng.standard_normal(131)
    for module in BOTH:
        rows = np.empty((131, 5), dtype=made)
        module.scaled_transpose(G, index, factor, rows)
        np.testing.assert_allclose(rows, (G[:, index].astype(np.float64) * factor).T, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stored", [np.float32, np.float64])
@pytest.mark.parametrize("writeable", [False, True])
def test_products_with_columns_of_the_gradients(stored, writeable):
    rng = np.random.default_rng(3)
    G = rng.standard_normal((6, 20)).astype(stored)
    G.flags.writeable = writeable
    v, r = rng.standard_normal(7), rng.standard_normal(6)
    part = G[:, 4:11].astype(np.float64)
    for module in BOTH:
        forward, back = np.full(6, 9.0), np.full(7, 9.0)
        module.project(G, 4, v, forward)
        module.back_project(G, 4, r, back)
        np.testing.assert_allclose(forward, part @ v, rtol=1e-9)
        np.testing.assert_allclose(back, r @ part, rtol=1e-9)


def test_linear_algebra_of_the_trees():
    """The kernels that only kernels call, uncompiled, against NumPy."""
    rng = np.random.default_rng(4)
    n, k = 7, 5
    A = rng.standard_normal((n, n + 3))
    K = A @ A.T
    K /= np.sqrt(np.outer(K.diagonal(), K.diagonal()))
    lower = np.linalg.cholesky(K[:k, :k])
    factor = K.copy()
    tree_kernels.cholesky_rows.py_func(factor, 0, k)  # whole, and in two pieces
    pieces = K.copy()
    for first, last in ((0, 2), (2, k)):
        tree_kernels.cholesky_rows.py_func(pieces, first, last)
    np.testing.assert_array_equal(pieces, factor)
    expected = np.tril(lower, -1) + np.diag(1 / lower.diagonal())
    np.testing.assert_allclose(np.tril(factor[:k, :k]), expected, rtol=1e-10)
    np.testing.assert_array_equal(factor[k:], K[k:])
    b = rng.standard_normal(n)
    x = b.copy()
    tree_kernels.solve.py_func(factor, x, k)
    np.testing.assert_allclose(x[:k], np.linalg.solve(K[:k, :k], b[:k]), rtol=1e-9)
    np.testing.assert_array_equal(x[k:], b[k:])
    B = np.full((n, n), 7.0)
    tree_kernels.invert_factor.py_func(factor, B, k)
    np.testing.assert_allclose(B[:k, :k], np.linalg.inv(lower), rtol=1e-9, atol=1e-12)
    y = b.copy()
    tree_kernels.axpy.py_func(y, -2.0, x, k)
    np.testing.assert_allclose(y[:k], b[:k] - 2 * x[:k])
    np.testing.assert_array_equal(y[k:], b[k:])


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0, 2.0, -5.0, 9.0, 2.0], [1.0], [2.0, 2.0], [-1.0, -3.0, -2.0]])
def test_kth_largest(values):
    for k in range(1, len(values) + 1):
        key = np.array([*values, 100.0])  # what lies behind the first n does not count
        assert tree_kernels.kth_largest.py_func(key, len(values), k) == sorted(values, reverse=True)[k - 1]
