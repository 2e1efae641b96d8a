"""The joint problem: tableau, kernels, backward elimination, swap search, bound."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbs_opt import (
    Budget,
    GradientFactor,
    HessianBlocks,
    Instance,
    InstanceError,
    Monitor,
    SolverError,
    Stop,
    evaluate,
    joint_loss,
    solve,
)
from cbs_opt.solvers.joint import backward, elimination
from cbs_opt.solvers.joint.bulk_exchange import exchange_in_bulk
from cbs_opt.solvers.joint.lagrangian_bound import dual_bound, improve_bound
from cbs_opt.solvers.joint.tableau import Tableau
from cbs_opt.solvers.joint.thinning import DenseThinning, FactorThinning
from cbs_opt.solvers.kernels import joint_numba, joint_numpy


def positive_definite(rng, n, damping=1e-2):
    A = rng.standard_normal((n, n))
    return A @ A.T / n + damping * np.eye(n)


def random_tableau(seed, n=14, q=6, groups=1):
    rng = np.random.default_rng(seed)
    H, w = positive_definite(rng, n), rng.standard_normal(n)
    kept = np.zeros(n, dtype=bool)
    kept[rng.permutation(n)[:q]] = True
    group = np.arange(n) % groups
    b = H @ w
    return Tableau(H, b, 0.5 * float(w @ b), kept, group, np.ones(n, dtype=bool)), w


def assert_same_state(tableau, fresh):
    S, P = np.argsort(tableau.S), np.argsort(tableau.P)
    assert tableau.doubled == pytest.approx(fresh.doubled, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(tableau.x[S], fresh.x, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(tableau.T[np.ix_(S, S)], fresh.T, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(tableau.U[np.ix_(P, S)], fresh.U, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(tableau.d[P], fresh.d, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(tableau.a[P], fresh.a, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_moves_keep_the_tableau_exact(seed):
    tableau, _ = random_tableau(seed)

    def fresh():
        return Tableau(tableau.H, tableau.b, tableau.constant, tableau.kept, tableau.group, tableau.movable)

    rng = np.random.default_rng(seed)
    for _ in range(12):
        tableau.swap(int(rng.integers(tableau.P.size)), int(rng.integers(tableau.S.size)))
        assert_same_state(tableau, fresh())
        tableau.remove(int(rng.integers(tableau.S.size)))
        assert_same_state(tableau, fresh())
        tableau.bring_back(int(rng.integers(tableau.P.size)))
        assert_same_state(tableau, fresh())


@pytest.mark.parametrize("groups", [1, 3])
def test_best_swap_is_the_best_by_enumeration(groups):
    tableau, w = random_tableau(7, groups=groups)
    instance = Instance(w, HessianBlocks.from_blocks([tableau.H]), int((~tableau.kept).sum()))
    here = joint_loss(instance, ~tableau.kept)
    best = np.inf
    for i, j in itertools.product(tableau.P, tableau.S):
        if tableau.group[i] == tableau.group[j]:
            kept = tableau.kept
            kept[i], kept[j] = True, False
            best = min(best, joint_loss(instance, ~kept))
    r, s, change = tableau.best_swap()
    assert change / 2 == pytest.approx(best - here, rel=1e-9)
    tableau.swap(r, s)
    assert tableau.doubled / 2 == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_kernels_agree_with_their_twins(seed):
    rng = np.random.default_rng(seed)
    p, q = 13, 9
    U, y, it = rng.standard_normal((p, q + 2)), rng.standard_normal(q), rng.random(q) + 0.1
    cost, d, a = rng.random(q), rng.standard_normal(p), rng.random(p) + 0.1
    cost[2] = 1e300
    may_return = np.arange(p) != 5
    rows, columns = rng.integers(0, 3, p), rng.integers(0, 3, q)
    terms = rng.standard_normal(p), rng.standard_normal(q), rng.standard_normal(p), rng.standard_normal(q)
    for grouped, late in itertools.product((False, True), repeat=2):
        one, two = U.copy(), U.copy()
        found = [
            module.best_swap(V, q, late, *terms, y, it, cost, d, a, may_return, grouped, rows, columns, 2, p - 1)
            for module, V in ((joint_numba, one), (joint_numpy, two))
        ]
        assert found[0] == pytest.approx(found[1], rel=1e-12)
        np.testing.assert_allclose(one, two, rtol=1e-12)
    nowhere = np.zeros(p, dtype=bool)
    for module in (joint_numba, joint_numpy):
        found = module.best_swap(U, q, False, *terms, y, it, cost, d, a, nowhere, False, rows, columns, 0, p)
        assert found[:2] == (-1, -1)
    one, two = U.copy(), U.copy()
    joint_numba.rank_two_update(one, q, *terms, 1, p)
    joint_numpy.rank_two_update(two, q, *terms, 1, p)
    np.testing.assert_allclose(one, two, rtol=1e-12)

    T = positive_definite(rng, 10)
    left, one, two = np.array([0, 3, 4, 8]), U[:4, :4].copy(), U[:4, :4].copy()
    joint_numba.subtract_from_rest(T, left, one)
    joint_numpy.subtract_from_rest(T, left, two)
    np.testing.assert_allclose(one, two, rtol=1e-12)
    results = []
    for module in (joint_numba, joint_numpy):
        V, x, t = np.zeros((6, 10)), np.linspace(-1, 1, 10), T.diagonal().copy()
        removable = np.arange(10) != 4
        order, losses = np.zeros(6, dtype=np.int64), np.zeros(6)
        taken = module.eliminate(T, V, 0, x, t, removable, 7, 3, order[:3], losses[:3])
        taken += module.eliminate(T, V, 3, x, t, removable, -1, 3, order[3:], losses[3:])
        results.append((taken, V, x, t, removable, order, losses))
    for one, two in zip(*results, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-10, atol=1e-12)


def test_elimination_stops_when_nothing_is_removable():
    T = np.eye(3)
    order, losses = np.zeros(3, dtype=np.int64), np.zeros(3)
    for module in (joint_numba, joint_numpy):
        removable = np.array([True, False, False])
        taken = module.eliminate(T, np.zeros((3, 3)), 0, np.ones(3), np.ones(3), removable, -1, 3, order, losses)
        assert taken == 1


def slow_backward(instance):
    """Greedy elimination by the evaluator alone."""
    pruned = np.zeros(instance.n, dtype=bool)
    left = instance.budget.per_group.copy()
    group = instance.budget.group_of(instance.n)
    if instance.fixed is not None:
        pruned |= instance.fixed == 1
        left -= np.bincount(group[pruned], minlength=left.size)
    while left.any():
        best, chosen = np.inf, -1
        for i in np.flatnonzero(~pruned):
            if left[group[i]] == 0 or (instance.fixed is not None and instance.fixed[i] == -1):
                continue
            pruned[i] = True
            value = joint_loss(instance, pruned)
            pruned[i] = False
            if value < best:
                best, chosen = value, i
        pruned[chosen] = True
        left[group[chosen]] -= 1
    return pruned


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_backward_elimination_is_greedy(seed, groups, monkeypatch):
    monkeypatch.setattr(elimination, "LAZY_STEPS", 3)  # so that the lazy steps are applied several times
    rng = np.random.default_rng(seed)
    blocks = [positive_definite(rng, size) for size in (5, 7, 4)]
    budget = Budget(9, np.arange(16) % 2, np.array([4, 5])) if groups else Budget(9)
    fixed = np.zeros(16, dtype=np.int8)
    fixed[0], fixed[5] = 1, -1
    instance = Instance(
        rng.standard_normal(16),
        HessianBlocks.from_blocks(blocks),
        budget,
        linear=0.1 * rng.standard_normal(16),
        fixed=fixed,
    )
    np.testing.assert_array_equal(backward.eliminate(instance), slow_backward(instance))


def factor_instance(rng, m, n, damping, budget, linear=False):
    G = (rng.standard_normal((m, n)) * rng.random(n)).astype(np.float32)
    g = 0.05 * rng.standard_normal(n) if linear else None
    return Instance(rng.standard_normal(n), GradientFactor(G, damping), budget, linear=g)


@pytest.mark.parametrize("linear", [False, True])
def test_stages_of_a_factor_price_like_dense_ones(linear):
    rng = np.random.default_rng(3)
    instance = factor_instance(rng, 12, 60, 1e-2, 40, linear)
    kept = np.arange(60)
    stage = FactorThinning(instance, instance.curvature, 0, kept, np.ones(60, dtype=bool))
    stage.drop(np.arange(0, 60, 4))
    kept = kept[np.arange(60) % 4 != 0]
    dense = DenseThinning(instance, instance.curvature, 0)
    np.testing.assert_allclose(stage.prices(kept), dense.prices(kept), rtol=2e-3)


@pytest.mark.parametrize("groups", [False, True])
def test_large_blocks_are_thinned_out_within_the_budget(groups, monkeypatch):
    monkeypatch.setattr(backward, "DENSE_LIMIT", 20)
    rng = np.random.default_rng(5)
    budget = Budget(60, np.arange(80) % 4, np.array([15, 10, 20, 15])) if groups else 60
    instance = factor_instance(rng, 10, 80, 1e-2, budget)
    pruned = backward.eliminate(instance)
    assert instance.admits(pruned)
    magnitude = instance.budget.cheapest(np.abs(instance.weights))
    assert joint_loss(instance, pruned) < joint_loss(instance, magnitude)


def test_bulk_exchange_never_raises_the_loss(monkeypatch):
    monkeypatch.setattr("cbs_opt.solvers.joint.bulk_exchange.DENSE_LIMIT", 20)
    monkeypatch.setattr("cbs_opt.solvers.joint.bulk_exchange._SMALLEST", 1)
    rng = np.random.default_rng(6)
    instance = factor_instance(rng, 10, 80, 1e-2, 60)
    start = instance.budget.cheapest(np.abs(instance.weights))
    better = exchange_in_bulk(instance, start, Monitor())
    assert instance.admits(better)
    assert joint_loss(instance, better) < joint_loss(instance, start)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), damping=st.sampled_from([1e-4, 1e-2, 1.0]), linear=st.booleans())
def test_bound_lies_below_every_selection(seed, damping, linear):
    rng = np.random.default_rng(seed)
    instance = factor_instance(rng, 5, 9, damping, 5, linear)
    optimum = solve(instance, "brute", objective="joint").objective
    D = instance.curvature.diagonal_split()
    for u in (np.zeros(9), rng.standard_normal(9)):
        assert dual_bound(instance, D, u)[0] <= optimum + 1e-9 * abs(optimum)
    best = evaluate(instance, solve(instance, "brute", objective="joint").pruned)
    monitor = Monitor()
    improve_bound(instance, best.weights - instance.weights, best.joint_loss, monitor, 100, 10.0)
    assert monitor.bound <= optimum + 1e-9 * abs(optimum)
    if not linear:
        assert monitor.bound >= 0


def test_bound_is_tight_where_the_hessian_is_diagonal():
    rng = np.random.default_rng(0)
    H = np.diag(rng.random(12) + 0.1)
    instance = Instance(rng.standard_normal(12), HessianBlocks.from_blocks([H]), 7)
    result = solve(instance, "joint")
    assert result.status == "optimal"
    assert result.gap < 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_search_finds_the_optimum_of_small_instances(seed):
    rng = np.random.default_rng(seed)
    blocks = [positive_definite(rng, size, 1e-3) for size in (6, 5)]
    instance = Instance(rng.standard_normal(11), HessianBlocks.from_blocks(blocks), 6)
    assert solve(instance, "joint").objective == pytest.approx(
        solve(instance, "brute", objective="joint").objective, rel=1e-9
    )


def test_singular_problem_names_a_damping_that_would_do():
    rng = np.random.default_rng(0)
    instance = factor_instance(rng, 4, 9, 0.0, 5)
    for solver in ("backward", "joint"):
        with pytest.raises((SolverError, InstanceError), match=r"singular.*a damping of .* would do"):
            solve(instance, solver)


def test_same_seed_and_iteration_limit_give_the_same_history():
    rng = np.random.default_rng(1)
    instance = Instance(rng.standard_normal(30), HessianBlocks.from_blocks([positive_definite(rng, 30, 1e-4)]), 20)
    runs = [solve(instance, "joint", stop=Stop(max_iterations=500), seed=3) for _ in range(2)]
    assert [row[1:] for row in runs[0].history] == [row[1:] for row in runs[1].history]


def test_no_damping_is_named_that_is_zero():
    """The mean diagonal, a thousandth of which is no positive number any more."""
    G = np.full((2, 3), 1e-161)
    assert GradientFactor(G, 0.0).damping_advice() == "its gradients are too small for float64: rescale them"


def few_selections(kind):
    rng = np.random.default_rng(5)
    A = rng.standard_normal((6, 10))
    ten = Instance(rng.standard_normal(10), HessianBlocks.from_blocks([A.T @ A]), 8)
    if kind == "zero":
        return Instance(ten.weights, HessianBlocks.from_blocks([np.zeros((10, 10))]), 4)
    if kind == "one selection":
        return Instance(np.ones(3), HessianBlocks.from_blocks([np.outer([1, 2, 0.5], [1, 2, 0.5])]), 3)
    if kind == "groups and fixed":
        fixed = np.array([1, -1, 0, 0, 0, 0, 0, 0, 0, 0], dtype=np.int8)
        return Instance(ten.weights, ten.curvature, Budget(7, np.arange(10) % 2, [4, 3]), fixed=fixed)
    return ten


@pytest.mark.parametrize("solver", ["joint", "backward"])
@pytest.mark.parametrize("limit", [None, 1e4])
@pytest.mark.parametrize("kind", ["zero", "one selection", "few kept", "groups and fixed"])
def test_few_selections_with_a_singular_hessian_are_proven(kind, limit, solver):
    """With a limit of hours too: a run that took it would not end."""
    instance = few_selections(kind)
    found = solve(instance, solver, objective="joint", stop=None if limit is None else Stop(time_limit=limit))
    reference = solve(instance, "brute", objective="joint")
    assert found.status == "optimal"
    assert found.objective == pytest.approx(reference.objective, rel=1e-9, abs=1e-12)
    assert found.bound == pytest.approx(found.objective, rel=1e-9, abs=1e-12)
    if kind == "zero":
        np.testing.assert_array_equal(found.pruned, solve(instance, "magnitude").pruned)
