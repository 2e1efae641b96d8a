"""The search: optimal on small instances of every kind, free of scale, repeatable, on time."""

import itertools
import time

import numpy as np
import pytest

from cbs_opt import (
    Budget,
    GradientFactor,
    HessianBlocks,
    Instance,
    Monitor,
    Status,
    Stop,
    UsageError,
    read_instance,
    selection_loss,
    solve,
)
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.selection.breeding import FINE, ROUGH, SMALL, Breeding
from cbs_opt.solvers.selection.parameters import SearchParameters
from cbs_opt.testing import make_curvature

KINDS = ("hessian", "inverse_hessian", "gradients")
SHAPES = {
    "one block": {"n": 12},
    "blocks": {"n": 12, "blocks": 3},
    "layers": {"n": 12, "blocks": 2, "groups": "layers"},
    "rows": {"n": 12, "groups": "rows"},
    "2:4": {"n": 12, "groups": "2:4", "blocks": 2},
    "fixed": {"n": 12, "fixed": True},
    "linear": {"n": 12, "linear": True, "blocks": 2},
    "everything": {"n": 12, "fixed": True, "linear": True, "groups": "layers", "blocks": 3},
    "few gradients": {"n": 12, "m": 3, "damping": 1e-9},
}
SHORT = Stop(max_iterations=25)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [1, 2])
def test_small_instances_are_solved_to_the_optimum(problem, kind, shape, seed):
    made = problem(seed, kind=kind, **SHAPES[shape])
    result = solve(made.instance, "search", stop=SHORT, seed=seed)
    rounding = 1e-9 * made.scale()
    optimum = solve(made.instance, "brute", objective="selection").objective
    assert result.objective == pytest.approx(optimum, rel=1e-9, abs=rounding)
    assert result.bound is None or result.bound <= optimum + 1e-12 * made.scale()


def medium(seed, kind="gradients", n=80, blocks=1, groups=None, linear=False):
    """An instance beyond enumeration, correlated, of many magnitudes."""
    rng = np.random.default_rng(seed)
    m = n // 2
    G = (rng.standard_normal((m, 5)) @ rng.standard_normal((5, n)) + rng.standard_normal((m, n))) * rng.lognormal(
        0, 1.5, n
    )
    w = rng.standard_normal(n)
    budget = Budget(6 * n // 10)
    if groups is not None:
        of = np.arange(n) % groups
        each = np.bincount(of) * 6 // 10
        budget = Budget(int(each.sum()), of, each)
    curvature, _ = make_curvature(kind, G, 1e-3, np.full(blocks, n // blocks))
    return Instance(w, curvature, budget, linear=0.1 * rng.standard_normal(n) if linear else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [{}, {"blocks": 4}, {"groups": 5}, {"blocks": 2, "groups": 3, "linear": True}])
def test_no_swap_improves_the_result(kind, shape):
    instance = medium(3, kind, **shape)
    result = solve(instance, "search", stop=SHORT)
    Q = np.zeros((instance.n, instance.n))
    for k in range(instance.curvature.number_of_blocks):
        part = instance.curvature.block_slice(k)
        w = instance.weights[part]
        Q[part, part] = w[:, None] * instance.curvature.block(k) * w
    h = Q @ result.pruned
    if instance.linear is not None:
        h -= instance.linear * instance.weights
    half, group = 0.5 * Q.diagonal(), instance.budget.group_of(instance.n)
    inside, outside = np.flatnonzero(result.pruned), np.flatnonzero(~result.pruned)
    change = (half - h)[inside][:, None] + (half + h)[outside] - Q[np.ix_(inside, outside)]
    change[group[inside][:, None] != group[outside]] = np.inf
    assert change.min() >= -1e-8 * abs(result.objective)


@pytest.mark.parametrize("kind", KINDS)
def test_better_than_the_paper_and_above_the_bound(kind):
    instance = medium(5, kind)
    result = solve(instance, "search", stop=SHORT)
    assert result.objective <= solve(instance, "cbs").objective * (1 + 1e-9)
    assert result.bound <= result.objective


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_the_scale_of_the_weights_does_not_matter(kind, linear, factor):
    base = medium(7, kind, linear=linear)
    scaled = Instance(
        base.weights * factor, base.curvature, base.budget, None if base.linear is None else base.linear * factor
    )
    one, other = (solve(instance, "search", stop=Stop(max_iterations=20)) for instance in (base, scaled))
    np.testing.assert_array_equal(one.pruned, other.pruned)
    assert other.objective == pytest.approx(one.objective * factor**2, rel=1e-9)
    assert other.bound == pytest.approx(one.bound * factor**2, rel=1e-6)


@pytest.mark.parametrize("factor", [2.0**-13, 2.0**13])
def test_a_power_of_two_changes_no_digit(factor):
    base = medium(8)
    scaled = Instance(base.weights * factor, base.curvature, base.budget)
    one, other = (solve(instance, "search", stop=Stop(max_iterations=20)) for instance in (base, scaled))
    assert [row.objective * factor**2 for row in one.history] == [row.objective for row in other.history]


@pytest.mark.parametrize("shape", [{}, {"blocks": 4}, {"groups": 5}])
def test_same_seed_and_iterations_same_history(shape):
    instance = medium(9, **shape)
    one, other = (solve(instance, "search", seed=4, stop=Stop(max_iterations=15)) for _ in range(2))
    assert [(r.iteration, r.objective, r.bound) for r in one.history] == [
        (r.iteration, r.objective, r.bound) for r in other.history
    ]
    np.testing.assert_array_equal(one.pruned, other.pruned)


def test_a_warm_start_is_never_lost():
    instance = medium(10)
    best = solve(instance, "search", stop=SHORT)
    again = solve(instance, "search", stop=Stop(max_iterations=0), warm_start=best.pruned)
    assert again.objective <= best.objective
    worst = instance.budget.cheapest(-np.abs(instance.weights))
    started = solve(instance, "search", stop=SHORT, warm_start=worst)
    assert started.objective <= selection_loss(instance, worst)


def degenerate(case):
    rng = np.random.default_rng(0)
    G, w, budget, damping = rng.standard_normal((3, 12)), rng.standard_normal(12), 6, 0.0
    if case == "all-zero gradients":
        G = np.zeros((3, 12))
    elif case == "dead neurons":
        G[:, 3:9] = 0.0
    elif case == "more dead than pruned":
        G[:, :10] = 0.0
    elif case == "ties":
        G, w = np.ones((3, 12)), np.tile([1.0, -1.0], 6)
    elif case == "diagonal ties":
        G, w, damping = np.zeros((3, 12)), np.ones(12), 1.0
    elif case == "zero weights":
        w[:7] = 0.0
    elif case == "all weights zero":
        w[:] = 0.0
    elif case == "nothing":
        budget = 0
    elif case == "everything":
        budget = 12
    elif case == "one weight, kept":
        G, w, budget = G[:, :1], w[:1], 0
    elif case == "one weight, pruned":
        G, w, budget = G[:, :1], w[:1], 1
    elif case == "rank one":
        G = G[:1]
    elif case == "huge spread":
        w *= 10.0 ** np.arange(-6, 6)
    return Instance(w, GradientFactor(G, damping), budget)


CASES = (
    "singular",
    "all-zero gradients",
    "dead neurons",
    "more dead than pruned",
    "ties",
    "diagonal ties",
    "zero weights",
    "all weights zero",
    "nothing",
    "everything",
    "one weight, kept",
    "one weight, pruned",
    "rank one",
    "huge spread",
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["gradients", "hessian"])
def test_degenerate_instances(case, kind):
    instance = degenerate(case)
    if kind == "hessian":
        instance = Instance(
            instance.weights, HessianBlocks.from_blocks([instance.curvature.block(0)]), instance.budget
        )
    result = solve(instance, "search", stop=SHORT)
    oracle = solve(instance, "brute", objective="selection").objective
    scale = float(np.abs(instance.weights) @ np.abs(instance.curvature.block(0)) @ np.abs(instance.weights))
    assert instance.admits(result.pruned)
    assert result.objective == pytest.approx(oracle, rel=1e-8, abs=1e-12 * scale)
    assert result.bound is None or result.bound <= oracle + 1e-12 * scale


def test_it_ends_by_itself_and_says_why(problem):
    made = problem(4, n=10)
    assert solve(made.instance, "search").status in (Status.CONVERGED, Status.OPTIMAL)
    optimum = made.optimum("selection")
    reached = solve(made.instance, "search", stop=Stop(target=optimum * (1 + 1e-9)))
    assert reached.status in (Status.TARGET_REACHED, Status.OPTIMAL)
    assert solve(medium(1), "search", stop=Stop(max_iterations=3)).status is Status.ITERATION_LIMIT
    assert solve(medium(1), "search", stop=Stop(gap=1e9)).status in (Status.GAP_REACHED, Status.OPTIMAL)


@pytest.mark.parametrize("solver", ["search", "relax"])
@pytest.mark.parametrize("limit", [0.0, 0.1, 0.5])
def test_time_limits_are_kept(solver, limit):
    rng = np.random.default_rng(0)
    n, m = 6000, 100
    instance = Instance(
        rng.standard_normal(n),
        GradientFactor(rng.standard_normal((m, n)) * rng.lognormal(0, 1, n), 0.0),
        int(0.8 * n),
    )
    solve(instance, solver, stop=Stop(max_iterations=1, time_limit=0.2))
    started = time.process_time()
    result = solve(instance, solver, stop=Stop(time_limit=limit), threads=1)
    spent = time.process_time() - started - result.build_seconds
    assert instance.admits(result.pruned)
    # The processor's seconds: the tests may share the machine. Twice the promise, for slow machines.
    assert min(spent, result.solve_seconds) <= limit + 0.4


@pytest.mark.parametrize(
    ("name", "value"),
    [("core", 1), ("working_set", 0), ("cycles", 0), ("stall", 0), ("ratio", 1.0), ("patience", 0)],
)
def test_parameters_are_checked(problem, name, value):
    with pytest.raises(UsageError, match=name):
        solve(problem(0).instance, "search", parameters={name: value})


def test_groups_of_which_one_stays_empty(problem):
    base = problem(6, n=10, kind="hessian").instance
    groups = np.array([0] * 5 + [3] * 5)
    for budgets in ([2, 0, 0, 3], [0, 0, 0, 5], [5, 0, 0, 1]):
        instance = Instance(base.weights, base.curvature, Budget(sum(budgets), groups, budgets))
        result = solve(instance, "search", stop=SHORT)
        best = min(
            selection_loss(instance, np.isin(np.arange(10), (*a, *b)))
            for a in itertools.combinations(range(5), budgets[0])
            for b in itertools.combinations(range(5, 10), budgets[3])
        )
        assert result.objective == pytest.approx(best, rel=1e-9)


@pytest.mark.shared
@pytest.mark.parametrize("seed", range(3))
def test_few_cycles_reach_the_best_known_value(shared_instances, seed):
    """80 weights of MLPNet at .5; precise descents and eight elites left seed 0 at 1.2215e-3."""
    instance = read_instance(shared_instances / "peers" / "fc2-j80.npz").with_sparsity(0.5)
    result = solve(
        instance, "search", parameters={"proof": 0}, stop=Stop(max_iterations=200), seed=seed, threads=1
    )
    assert result.objective <= 1.206e-3


def test_roughness_depends_on_size_and_parameters_take_precedence():
    sizes = (SMALL, SMALL + 1)
    manners = []
    for n in sizes:
        curvature = GradientFactor(np.random.default_rng(n).standard_normal((3, n)), 1e-3)
        problem = SelectionProblem(Instance(np.ones(n), curvature, n // 2), 1)
        for given in ({}, {"cycles": 7, "ratio": 3.0}):
            breeding = Breeding(
                problem, SearchParameters(**given), Monitor(), np.random.default_rng(0), lambda: None, print
            )
            manners.append(breeding.manner)
    assert manners[0] == ROUGH
    assert manners[2] == FINE
    assert [manners[k] for k in (1, 3)] == [m._replace(cycles=7, ratio=3.0) for m in (ROUGH, FINE)]
