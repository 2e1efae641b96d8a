"""Best-subset selection: the objective, coefficients, singular problems, paths; enumeration is the reference."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cbs_opt
from cbs_opt import Budget, HessianBlocks, Instance, SolverError, Stop, UsageError
from cbs_opt.path import extended


def data(seed, m, n, k=3):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((m, n)) * rng.uniform(0.2, 5.0, n) + rng.uniform(-3, 3, n)
    beta = np.zeros(n)
    beta[rng.choice(n, min(k, n), replace=False)] = rng.uniform(1, 2, min(k, n))
    return X, X @ beta + 2.0 + 0.3 * rng.standard_normal(m)


def best_subset(X, y, ridge, k, intercept=True, standardize=False):
    """Objective, columns and coefficients by enumeration and textbook least squares."""
    m, n = X.shape
    A, b = (X - X.mean(0), y - y.mean()) if intercept else (X, y)
    scale = np.sqrt((A**2).mean(0)) if standardize else np.ones(n)
    A = A / scale
    best = (np.inf, None, None)
    for chosen in itertools.combinations(range(n), k):
        part = A[:, chosen]
        stacked = np.vstack([part, np.sqrt(m * ridge) * np.eye(k)])
        beta = np.linalg.lstsq(stacked, np.concatenate([b, np.zeros(k)]), rcond=None)[0]
        residual = b - part @ beta
        value = residual @ residual / (2 * m) + 0.5 * ridge * beta @ beta
        if value < best[0]:
            best = value, chosen, beta / scale[list(chosen)]
    return best


@pytest.mark.parametrize("m", [7, 25])
@pytest.mark.parametrize("ridge", [0.0, 0.02])
@pytest.mark.parametrize(("intercept", "standardize"), [(True, False), (False, True), (True, True)])
def test_optimum_and_coefficients(m, ridge, intercept, standardize):
    X, y = data(m, m, 9)
    value, chosen, beta = best_subset(X, y, ridge, 3, intercept, standardize)
    instance = cbs_opt.from_regression(X, y, ridge, keep=3, intercept=intercept, standardize=standardize)
    for solver in ("exact", "joint", "brute"):
        result = cbs_opt.solve(instance, solver, objective="joint", stop=Stop(max_iterations=2000))
        assert np.flatnonzero(~result.pruned).tolist() == list(chosen)
        total = result.objective + instance.metadata["stated_objective"]["constant"]
        assert total == pytest.approx(value, rel=1e-9)
        values, constant = cbs_opt.regression_coefficients(instance, result)
        assert values[list(chosen)] == pytest.approx(beta, rel=1e-7)
        assert constant == pytest.approx(y.mean() - X.mean(0) @ values if intercept else 0.0, abs=1e-9)
    assert cbs_opt.solve(instance, "exact", objective="joint").status == "optimal"


def test_few_rows_are_stored(tmp_path):
    X, y = data(1, 40, 6)
    instance = cbs_opt.from_regression(X, y, 0.1, keep=2)
    assert instance.curvature.gradients.shape == (6, 6)  # R of the QR decomposition
    A = X - X.mean(0)
    assert instance.curvature.block(0) == pytest.approx(A.T @ A / 40 + 0.1 * np.eye(6))
    cbs_opt.write_instance(tmp_path / "r.npz", instance)
    back = cbs_opt.read_instance(tmp_path / "r.npz")
    pruned = np.arange(6) > 1
    one, other = (cbs_opt.regression_coefficients(i, pruned) for i in (instance, back))
    assert one.values.tolist() == other.values.tolist() and one.intercept == other.intercept


@given(
    st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 8), st.sampled_from([0.0, 1e-3, 1.0]), st.booleans()
)
def test_the_loss_is_the_excess_over_the_full_model(seed, m, n, ridge, standardize):
    """Any selection: objective of its least-squares fit less that of all columns, with constant columns too."""
    rng = np.random.default_rng(seed)
    X, y = rng.standard_normal((m, n)), rng.standard_normal(m)
    X[:, rng.random(n) < 0.2] = 4.0
    instance = cbs_opt.from_regression(X, y, ridge, standardize=standardize)
    kept = rng.random(n) < 0.5
    A, b = X - X.mean(0), y - y.mean()
    A[:, np.abs(A).max(0) < 1e-12] = 0.0
    if standardize:
        size = np.sqrt((A**2).mean(0))
        A = A / np.where(size > 0, size, 1.0)
    part = np.vstack([A[:, kept], np.sqrt(m * ridge) * np.eye(int(kept.sum()))])
    beta = np.linalg.lstsq(part, np.concatenate([b, np.zeros(int(kept.sum()))]), rcond=1e-10)[0]
    value = ((b - A[:, kept] @ beta) ** 2).sum() / (2 * m) + 0.5 * ridge * beta @ beta
    constant = instance.metadata["stated_objective"]["constant"]
    assert cbs_opt.joint_loss(instance, ~kept) + constant == pytest.approx(value, rel=1e-7, abs=1e-10)


def test_another_damping_has_no_stated_objective():
    X, y = data(1, 20, 5)
    instance = cbs_opt.from_regression(X, y, 0.1, keep=2)
    assert "stated_objective" in instance.with_damping(0.1).metadata
    changed = instance.with_damping(0.2)
    assert "stated_objective" not in changed.metadata and "regression" in changed.metadata


def test_bad_data_is_one_sentence():
    X, y = data(0, 8, 4)
    for arguments, words in (
        ((X[0], y), r"`X` must have shape \(m, n\), got \(4,\)"),
        ((X, y[:3]), "`X` has 8 rows, and `y` 3 entries"),
        ((X, y * np.nan), "`y` has NaN or infinite"),
        ((np.zeros((0, 3)), np.zeros(0)), "at least one row"),
        (("text", y), "`X` must be an array of numbers"),
        ((X, y, -1.0), "`ridge` must be a finite number ≥ 0, got -1.0"),
    ):
        with pytest.raises(UsageError, match=words):
            cbs_opt.from_regression(*arguments)
    with pytest.raises(
        UsageError, match=r"`keep` must be a whole number from 0 to 4, the number of columns, got 5"
    ):
        cbs_opt.from_regression(X, y, keep=5)
    instance = cbs_opt.from_regression(X, y, 0.1)
    assert instance.budget.total == 0
    for keep in (5, -1, 2.5, True):
        with pytest.raises(UsageError, match="`keep` must be a whole number from 0 to 4"):
            instance.with_kept(keep)
    with pytest.raises(UsageError, match="`X` must hold real numbers"):
        cbs_opt.from_regression(np.ones((3, 2)) * 1j, np.ones(3))
    for numbers in (2, "21"):
        with pytest.raises(UsageError, match="`keep` must be a sequence"):
            cbs_opt.solve_path(instance, keep=numbers, objective="joint")
    with pytest.raises(UsageError, match="`keep` must be a whole number from 0 to 4"):
        cbs_opt.solve_path(instance, keep=[2.7], objective="joint")
    with pytest.raises(UsageError, match=r"bool \(4,\)"):
        cbs_opt.regression_coefficients(instance, np.ones(3, bool))
    with pytest.raises(UsageError, match="does not come from `from_regression`"):
        cbs_opt.regression_coefficients(replace(instance, metadata={}), np.ones(4, bool))


@pytest.mark.parametrize("exponent", [6, 9, 12])
def test_the_unit_of_a_column_does_not_matter(exponent):
    X, y = data(3, 37, 8)
    value, chosen, _ = best_subset(X, y, 0.0, 4)
    scaled = X.copy()
    scaled[:, [4, 6]] *= 10.0**-exponent, 10.0**exponent
    instance = cbs_opt.from_regression(scaled, y, keep=4)
    for solver in ("exact", "joint"):
        result = cbs_opt.solve(instance, solver, objective="joint", stop=Stop(max_iterations=3000))
        assert np.flatnonzero(~result.pruned).tolist() == list(chosen)
        assert result.objective + instance.metadata["stated_objective"]["constant"] == pytest.approx(
            value, rel=1e-9
        )
    assert result.extras["drift"] < 1e-9


def test_a_constant_column_explains_nothing():
    X, y = data(3, 37, 6)
    X[:, 4] = 0.1  # its mean is not exactly 0.1
    instance = cbs_opt.from_regression(X, y, keep=4)
    assert instance.curvature.diagonal()[4] == 0 and instance.weights[4] == 0
    result = cbs_opt.solve(instance, "exact", objective="joint")
    assert result.status == "optimal" and result.pruned[4]
    with pytest.raises(SolverError, match="it has rank 5, and 5 weights are kept"):
        cbs_opt.solve(instance.with_kept(5), "exact", objective="joint")


# Singular: fewer samples than columns, no ridge ---------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_singular_optimum(seed, dense):
    X, y = data(seed, 6, 11)
    X[:, 4] = X[:, 2]  # equal columns: some sets are singular
    instance = cbs_opt.from_regression(X, y, keep=1 + seed % 4)
    if dense:
        H = instance.curvature.block(0)
        instance = replace(instance, curvature=HessianBlocks.from_blocks([H]))
    value, _, _ = best_subset(X, y, 0.0, 1 + seed % 4)
    result = cbs_opt.solve(instance, "exact", objective="joint")
    scale = y.var()
    assert result.objective == pytest.approx(value, rel=1e-6, abs=1e-9 * scale)
    assert result.bound <= value + 1e-9 * scale
    if value > 1e-3 * scale:
        assert result.status == "optimal"
    for solver in ("joint", "backward"):
        found = cbs_opt.solve(instance, solver, stop=Stop(max_iterations=300))
        assert instance.admits(found.pruned)
        assert found.bound is None or found.bound <= value + 1e-9 * scale
        assert found.objective >= value - 1e-9 * scale
        assert solver == "backward" or found.objective == pytest.approx(value, rel=1e-6, abs=1e-9 * scale)


def test_singular_problems_that_are_ill_posed():
    X, y = data(3, 5, 9)
    instance = cbs_opt.from_regression(X, y)  # rank 4
    for keep in (4, 9):
        for solver in ("joint", "backward", "exact"):
            with pytest.raises(
                SolverError, match=rf"singular; it has rank 4, and {keep} weights are kept.*damping of"
            ):
                cbs_opt.solve(instance.with_kept(keep), solver, objective="joint")
    linear = replace(instance.with_kept(2), linear=np.ones(9))
    with pytest.raises(SolverError, match="singular; with a first-order term the losses may have no minimum"):
        cbs_opt.solve(linear, "joint")
    grouped = replace(instance, budget=Budget(7, np.arange(9) % 2, [4, 3]))
    with pytest.raises(SolverError, match="with groups the kept sets are not counted"):
        cbs_opt.solve(grouped, "exact", objective="joint")
    assert cbs_opt.solve(grouped, "joint", stop=Stop(max_iterations=50)).objective >= 0
    with pytest.raises(SolverError, match="singular"):
        cbs_opt.solve(instance.with_kept(2), "highs", objective="joint")


def test_a_zero_hessian_and_nearly_dependent_columns():
    X, y = data(4, 20, 7)
    for solver in ("exact", "joint", "backward"):
        zero = cbs_opt.solve(cbs_opt.from_regression(X * 0, y, keep=2), solver, objective="joint")
        assert (zero.status, zero.objective, zero.bound) == ("optimal", 0.0, 0.0)
    X[:, 5], X[:, 6] = (
        X[:, 0] + X[:, 1],
        X[:, 2] + 1e-6 * np.sin(np.arange(20.0)),
    )  # 1 − R² of the last is about 1e-13
    value, _, _ = best_subset(X, y, 0.0, 4)
    result = cbs_opt.solve(cbs_opt.from_regression(X, y, keep=4), "exact")
    assert result.status != "optimal" and result.bound <= value


def test_singular_blocks_and_fixed_weights():
    rng = np.random.default_rng(5)
    G = rng.standard_normal((3, 10))
    factor = cbs_opt.GradientFactor(G, 0.0, [6, 4])
    fixed = np.zeros(10, np.int8)
    fixed[1], fixed[7] = -1, 1
    instance = Instance(rng.standard_normal(10), factor, 7, fixed=fixed)
    best = min(
        cbs_opt.joint_loss(instance, pruned)
        for kept in itertools.combinations(range(10), 3)
        if instance.admits(pruned := ~np.isin(np.arange(10), kept))
    )
    for solver in ("exact", "joint"):
        result = cbs_opt.solve(instance, solver, objective="joint", stop=Stop(max_iterations=500))
        assert result.objective == pytest.approx(best, rel=1e-6)
    assert cbs_opt.solve(instance, "exact", objective="joint").status == "optimal"


def test_exact_says_what_it_does_not_count(caplog):
    rng = np.random.default_rng(0)
    instance = cbs_opt.from_regression(rng.standard_normal((40, 120)), rng.standard_normal(40), keep=20)
    caplog.set_level("INFO", "cbs_opt")
    result = cbs_opt.solve(instance, "exact", objective="joint", stop=Stop(time_limit=5))
    assert (result.status, result.bound) == ("converged", 0.0)
    assert "only counting all kept sets proves an optimum" in caplog.text


# Paths ----------------------------------------------------------------------------------------------------------


def test_path_over_kept_weights():
    X, y = data(2, 30, 9, 4)
    instance = cbs_opt.from_regression(X, y, 1e-3)
    seen = []
    results = cbs_opt.solve_path(
        instance, keep=[2, 5, 3, 3], solver="exact", objective="joint", on_result=lambda k, r: seen.append(k)
    )
    assert seen == [5, 3, 2]
    for k, result in zip(seen, results, strict=True):
        _, chosen, _ = best_subset(X, y, 1e-3, k)
        assert np.flatnonzero(~result.pruned).tolist() == list(chosen)
    for arguments in ({}, {"sparsities": [0.5], "keep": [1]}, {"keep": []}):
        with pytest.raises(UsageError, match="a path needs at least one"):
            cbs_opt.solve_path(instance, **arguments)
    with pytest.raises(UsageError, match="from 0 to 9"):
        cbs_opt.solve_path(instance, keep=[3, 10])


def test_the_joint_warm_start_removes_one_at_a_time():
    X, y = data(4, 30, 8, 4)
    instance = cbs_opt.from_regression(X, y, 1e-3)
    expected, pruned = [], np.zeros(8, bool)
    for _ in range(5):
        losses = {
            i: cbs_opt.joint_loss(instance, pruned | (np.arange(8) == i)) for i in np.flatnonzero(~pruned).tolist()
        }
        pruned = pruned | (np.arange(8) == min(losses, key=losses.get))
        expected.append(pruned)
    start = extended(instance.with_budget(5), np.zeros(8, bool), "joint")
    assert start.tolist() == expected[-1].tolist()
