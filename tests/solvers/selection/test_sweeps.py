"""Sweeps over whole problems, repairs across blocks, threaded products: against dense formulas and enumeration."""

import itertools

import numpy as np
import pytest

from cbs_opt import Budget, GradientFactor, Instance, Stop, UsageError, solve
from cbs_opt.monitor import Monitor
from cbs_opt.selection import SelectionObjective
from cbs_opt.solvers.problem.columns import Columns, DenseBlock, DiagonalBlock, FactorBlock
from cbs_opt.solvers.problem.selection_problem import SelectionProblem, Storage
from cbs_opt.solvers.problem.threaded_factor import ThreadedFactor
from cbs_opt.solvers.selection import search as search_module
from cbs_opt.solvers.selection.incumbent import Incumbent
from cbs_opt.solvers.selection.parameters import SearchParameters
from cbs_opt.solvers.selection.relaxation import Relaxation
from cbs_opt.solvers.selection.repair import meet_budgets, trade
from cbs_opt.solvers.selection.sweep_search import SweepSearch, is_large, is_split
from cbs_opt.solvers.selection.sweeps import Sweeps

KINDS = ("hessian", "inverse_hessian", "gradients")
FACTORS = {"dense_bytes": 0, "threaded_gradients": 0}
SINGLE = FACTORS | {"double_bytes": 0}
BY_BLOCKS = {"many_blocks": 0, "small_block": 0}
PATH = (0.1, 0.03, 0.01, 3e-3, 1e-3)


def mixed(seed, groups=1, n=10):
    """A factor, a dense and a diagonal block of n variables each; also the dense matrix and the other data."""
    rng = np.random.default_rng(seed)
    rows, ridge = rng.standard_normal((n, 4)), rng.uniform(0.05, 0.3, n)
    A = rng.standard_normal((n, n + 2))
    blocks = [FactorBlock(rows, ridge), DenseBlock(A @ A.T / n), DiagonalBlock(rng.uniform(0.1, 2.0, n))]
    columns = Columns(blocks)
    Q = np.array([columns.product(row) for row in np.eye(3 * n)])
    group = rng.integers(groups, size=3 * n)
    budget = np.bincount(group, minlength=groups) * 2 // 3
    return columns, Q, rng.standard_normal(3 * n) * 0.3, group, budget


def layers(problem, seed, kind="gradients", groups=None, **limits):
    """A reduced problem of twelve weights in three blocks."""
    made = problem(seed, n=12, kind=kind, blocks=3, groups=groups, budget=6, linear=seed % 2 == 1, m=8)
    return made, SelectionProblem(made.instance, 1, Storage(**limits))


def relaxed_optimum(problem):
    relaxed = Relaxation(problem)
    relaxed.solve(tolerance=1e-10, rounds=500)
    return relaxed


def sweep_search(problem, offers, stop=None, **options):
    return SweepSearch(problem, Monitor(stop), offers.append, seed=3, **options)


# The sweeps


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("t", [0.0, 0.3])
def test_state_gradient_and_value(groups, t):
    columns, Q, linear, group, budget = mixed(1, groups)
    x = np.random.default_rng(5).random(Q.shape[0])
    sweeps = Sweeps(columns, linear, group, budget, x, threads=1)
    for _ in range(3):
        np.testing.assert_allclose(sweeps.gradient(), Q @ sweeps.x, rtol=1e-9, atol=1e-11)
        assert sweeps.value() == pytest.approx(0.5 * sweeps.x @ Q @ sweeps.x + linear @ sweeps.x)
        sums = np.bincount(group, sweeps.x, groups)
        assert sweeps.off() == pytest.approx((np.abs(sums - budget) / budget).max())
        sweeps.run(t, 4, 0.0)
    assert sweeps.sweeps == 12


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sweeps_reach_the_relaxed_minimum_and_its_prices(groups, seed):
    """Optimality conditions: the price is what the next weight of the group costs."""
    columns, Q, linear, group, budget = mixed(seed, groups)
    start = np.zeros(Q.shape[0])
    sweeps = Sweeps(columns, linear, group, budget, start, threads=1)
    made = sweeps.run(0.0, 3000, 1e-12)
    assert made < 3000
    assert sweeps.off() <= 1e-3
    slope = Q @ sweeps.x + linear - sweeps.price[group]
    size = np.abs(Q @ sweeps.x + linear).max()
    inner = (sweeps.x > 0) & (sweeps.x < 1)
    assert inner.any()
    assert np.abs(slope[inner]).max() <= 1e-3 * size
    assert slope[sweeps.x == 0].min(initial=0.0) >= -1e-3 * size
    assert slope[sweeps.x == 1].max(initial=0.0) <= 1e-3 * size


def test_threads_change_nothing():
    columns, _, linear, group, budget = mixed(4, 2)
    outcomes = []
    for threads in (1, 3):
        sweeps = Sweeps(columns, linear, group, budget, np.zeros(30), threads)
        sweeps.run(0.05, 20, 0.0)
        outcomes.append((sweeps.x, sweeps.price, sweeps.gradient()))
    for one, other in zip(*outcomes, strict=True):
        np.testing.assert_array_equal(one, other)


def test_copies_are_independent():
    columns, Q, linear, group, budget = mixed(5, 2)
    sweeps = Sweeps(columns, linear, group, budget, np.zeros(30), 1)
    sweeps.run(0.1, 3, 0.0)
    before = [sweeps.x.copy(), sweeps.price.copy(), *(state.copy() for state in sweeps.state)]
    point = np.random.default_rng(1).random(30)
    for other in (sweeps.copy(), sweeps.at(point)):
        other.run(0.0, 5, 0.0)
        np.testing.assert_allclose(other.gradient(), Q @ other.x, rtol=1e-9, atol=1e-11)
        for mine, was in zip([sweeps.x, sweeps.price, *sweeps.state], before, strict=True):
            np.testing.assert_array_equal(mine, was)


@pytest.mark.parametrize("groups", [1, 3])
def test_hardening_ends_at_a_binary_point_of_nearly_the_right_size(groups):
    columns, _, linear, group, budget = mixed(6, groups)
    sweeps = Sweeps(columns, linear, group, budget, np.zeros(30), 1)
    sweeps.run(0.1, 30, 0.0)
    assert sweeps.harden((0.1, 0.4, 1.0, 1.3), 30)
    assert set(np.unique(sweeps.x)) <= {0.0, 1.0}
    assert (np.abs(np.bincount(group, sweeps.x, groups) - budget) <= 3).all()
    assert not sweeps.harden((0.1,), 30, should_stop=lambda: True)


def test_the_start_prices_are_the_threshold_of_separate_weights():
    columns, Q, linear, group, budget = mixed(7, 3)
    price = Sweeps(columns, linear, group, budget, np.zeros(30), 1).price
    alone = 0.5 * Q.diagonal() + linear
    for g in range(3):
        assert price[g] == np.sort(alone[group == g])[budget[g] - 1]


# Repairs


def flip_costs(point, Q, linear):
    """The change of the objective by each flip, by definition."""

    def value(y):
        return 0.5 * y @ Q @ y + linear @ y

    flipped = [np.where(np.arange(point.y.size) == i, 1 - point.y, point.y) for i in range(point.y.size)]
    return np.array([value(y) - value(point.y) for y in flipped])


@pytest.mark.parametrize("groups", [None, "layers"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("many", [False, True])
def test_budgets_are_met_by_the_cheapest_flips(problem, groups, seed, many):
    _, reduced = layers(problem, seed, groups=groups)
    Q = np.array([reduced.columns.product(row) for row in np.eye(reduced.n)])
    y = np.full(reduced.n, float(many))
    y[:2] = 1.0 - y[:2]
    point = Incumbent(reduced, y)
    meet_budgets(point)
    np.testing.assert_array_equal(np.bincount(reduced.group, point.y, reduced.budget.size), reduced.budget)
    assert point.f == pytest.approx(0.5 * point.y @ Q @ point.y + reduced.linear @ point.y)
    np.testing.assert_allclose(point.g, Q @ point.y, atol=1e-10)


def test_one_missing_weight_is_the_cheapest_of_all(problem):
    _, reduced = layers(problem, 2)
    Q = np.array([reduced.columns.product(row) for row in np.eye(reduced.n)])
    for off in (-1, 1):
        y = reduced.smallest(reduced.linear + 0.5 * reduced.columns.diagonal)
        changed = np.flatnonzero(y == (off < 0))[0]
        y[changed] = 1 - y[changed]
        point = Incumbent(reduced, y)
        cost = np.where(point.y == (off > 0), flip_costs(point, Q, reduced.linear), np.inf)
        meet_budgets(point)
        assert np.flatnonzero(point.y != y).tolist() == [int(np.argmin(cost))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [None, "rows"])
@pytest.mark.parametrize("seed", range(3))
def test_no_trade_between_blocks_is_left(problem, kind, groups, seed):
    _, reduced = layers(problem, seed, kind, groups)
    Q = np.array([reduced.columns.product(row) for row in np.eye(reduced.n)])
    start = reduced.smallest(-0.5 * reduced.columns.diagonal - reduced.linear)  # the worst by themselves
    point = Incumbent(reduced, start)
    before = point.f
    made = trade(point, lambda: False, rounds=200)
    assert point.f == pytest.approx(0.5 * point.y @ Q @ point.y + reduced.linear @ point.y)
    np.testing.assert_array_equal(np.bincount(reduced.group, point.y, reduced.budget.size), reduced.budget)
    assert (point.f < before) == (made > 0)
    cost, block = flip_costs(point, Q, reduced.linear), reduced.columns.block_of
    for i, j in itertools.product(np.flatnonzero(point.y == 0), np.flatnonzero(point.y == 1)):
        if block[i] != block[j] and reduced.group[i] == reduced.group[j]:
            assert cost[i] + cost[j] >= -1e-8 * abs(point.f)


def test_trades_are_made_at_all(problem):
    _, reduced = layers(problem, 4)
    point = Incumbent(reduced, reduced.smallest(-reduced.columns.diagonal))
    before = point.f
    assert trade(point, lambda: False) > 0
    assert point.f < before


# The search by sweeps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [None, "layers"])
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("limits", [{}, FACTORS, SINGLE], ids=["dense", "factors", "float32"])
def test_path_and_tightening_give_points_and_close_bounds(problem, kind, groups, seed, limits):
    made, reduced = layers(problem, seed, kind, groups, **limits)
    best = relaxed_optimum(reduced)
    optimum, minimum = made.optimum("selection"), reduced.from_units(best.value())
    offers = []
    search = sweep_search(reduced, offers)
    search.path(PATH)
    assert offers
    for point in offers:
        assert made.instance.admits(reduced.expand(point.y))
    assert min(reduced.objective(point.y) for point in offers) <= optimum + 0.05 * abs(optimum)
    after_path = search.monitor.bound
    assert minimum - 0.1 * abs(minimum) - 1e-2 * reduced.scale <= after_path <= optimum
    for _ in range(60):
        search.tighten()
    assert search.settled
    slack = 2e-3 * abs(minimum) + 1e-4 * reduced.scale
    assert minimum - slack <= search.monitor.bound <= optimum
    relaxed = search.relaxation()
    np.testing.assert_allclose(np.bincount(reduced.group, relaxed.x, reduced.budget.size), reduced.budget)
    search.harden_from(best.x)
    assert made.instance.admits(reduced.expand(offers[-1].y))


@pytest.mark.parametrize("sums", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("groups", [None, "rows"])
def test_a_point_is_shifted_to_the_right_sums(problem, sums, groups):
    _, reduced = layers(problem, 3, groups=groups)
    search = sweep_search(reduced, [])
    rng = np.random.default_rng(2)
    for x in (np.clip(sums + 0.3 * rng.standard_normal(reduced.n), 0, 1), np.full(reduced.n, np.round(sums))):
        fitted = search._fit(x)
        assert fitted.min() >= 0
        assert fitted.max() <= 1
        np.testing.assert_allclose(np.bincount(reduced.group, fitted, reduced.budget.size), reduced.budget)
        missing = (reduced.budget - np.bincount(reduced.group, x, reduced.budget.size))[reduced.group]
        inner = ((x > 0) & (x < 1)).all()
        assert not inner or ((fitted - x) * missing >= -1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [1, 2, 5])
def test_visits_find_the_best_of_each_block(problem, kind, seed):
    """From any point: the blocks keep their sums and small ones are searched completely; then trades."""
    made, reduced = layers(problem, seed, kind)
    Q = np.array([reduced.columns.product(row) for row in np.eye(reduced.n)])
    start = Incumbent(reduced, reduced.smallest(-0.5 * reduced.columns.diagonal - reduced.linear))
    offers = []
    search = sweep_search(reduced, offers)
    search.visit_blocks(start, SearchParameters())
    best = start.y.copy()
    for b in range(len(reduced.columns.blocks)):
        part = slice(reduced.columns.starts[b], reduced.columns.starts[b + 1])
        size, p = part.stop - part.start, round(start.y[part].sum())
        points = [np.isin(np.arange(size), chosen) * 1.0 for chosen in itertools.combinations(range(size), p)]
        best[part] = min(points, key=lambda y, s=part: 0.5 * y @ Q[s, s] @ y + reduced.linear[s] @ y)
    assert offers[-2].f == pytest.approx(0.5 * best @ Q @ best + reduced.linear @ best)
    assert offers[-1].f <= offers[-2].f + 1e-12
    for point in offers:
        assert made.instance.admits(reduced.expand(point.y))
        assert point.f == pytest.approx(0.5 * point.y @ Q @ point.y + reduced.linear @ point.y)
        np.testing.assert_allclose(point.g, Q @ point.y, atol=1e-6)


def test_a_core_holds_what_costs_least_to_change(problem):
    """With cores of two, the cheapest addition and drop of each block are made where that gains."""
    moved = 0
    for seed in range(2, 10):
        _, reduced = layers(problem, seed)
        Q = np.array([reduced.columns.product(row) for row in np.eye(reduced.n)])
        y = reduced.smallest(np.random.default_rng(seed).standard_normal(reduced.n))
        start = Incumbent(reduced, y)
        cost, offers = flip_costs(start, Q, reduced.linear), []
        sweep_search(reduced, offers).visit_blocks(start, SearchParameters(core=2))
        expected = y.copy()
        for b in range(len(reduced.columns.blocks)):
            sides = [np.flatnonzero((reduced.columns.block_of == b) & (y == value)) for value in (0, 1)]
            if all(side.size for side in sides):
                i, j = (side[np.argmin(cost[side])] for side in sides)
                if cost[i] + cost[j] - Q[i, j] < 0:
                    expected[[i, j]] = 1.0, 0.0
                    moved += 1
        np.testing.assert_array_equal(offers[-2].y, expected)
    assert moved > 3


@pytest.mark.parametrize("more", [{}, FACTORS, BY_BLOCKS, SINGLE | BY_BLOCKS], ids=str)
@pytest.mark.parametrize("shape", [{"blocks": 3}, {"blocks": 2, "groups": "layers"}, {"linear": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_optimum_is_found(problem, kind, shape, more):
    made = problem(21, n=12, kind=kind, **shape)
    result = solve(made.instance, "search", parameters={"large": 0, "proof": 0, "patience": 20, **more})
    optimum = made.optimum("selection")
    assert result.objective == pytest.approx(optimum, rel=1e-9)
    assert result.bound <= optimum
    minimum = relaxed_optimum(problem_of := SelectionProblem(made.instance)).value()
    assert result.bound >= problem_of.from_units(minimum) - 2e-3 * abs(optimum)


# Limits


def test_limits_choose_the_way(problem):
    _, reduced = layers(problem, 2)
    coupled = sum(reduced.component_sizes)
    assert is_large(reduced, coupled - 1)
    assert not is_large(reduced, coupled)
    assert not is_large(reduced)
    assert is_split(reduced, 0, 2, coupled // 3 - 1)
    assert not is_split(reduced, 0, 3, 0)
    assert not is_split(reduced, 0, 2, coupled)
    assert not is_split(reduced, coupled, 2, 0)


@pytest.mark.parametrize("large", [0, 12])
@pytest.mark.parametrize("more", [{}, BY_BLOCKS])
def test_a_large_problem_is_swept(problem, monkeypatch, large, more):
    made, calls = problem(2, n=12, blocks=2), []

    class Spy(SweepSearch):
        def __init__(self, *arguments, **options):
            calls.append(options["finely"])
            super().__init__(*arguments, **options)

    monkeypatch.setattr(search_module, "SweepSearch", Spy)
    stop = Stop(max_iterations=3)
    solve(made.instance, "search", stop=stop, parameters={"large": large, "proof": 0, **more})
    assert calls == ([bool(more)] if large == 0 else [])


@pytest.mark.parametrize("limits", [{}, {"threaded_gradients": 0}], ids=["plain", "threaded"])
def test_storage_follows_its_limits(problem, limits):
    made = problem(2, n=9, blocks=2)
    dense = SelectionProblem(made.instance, 1, Storage(**limits))
    factor = SelectionProblem(made.instance, 1, Storage(dense_bytes=0, **limits))
    single = SelectionProblem(made.instance, 1, Storage(dense_bytes=0, double_bytes=0, **limits))
    assert dense.threaded == bool(limits)
    assert all(isinstance(block, DenseBlock) for block in dense.columns.blocks)
    assert {block.rows.dtype for block in factor.columns.blocks} == {np.dtype(np.float64)}
    assert {block.rows.dtype for block in single.columns.blocks} == {np.dtype(np.float32)}
    x = np.random.default_rng(0).random(9)
    np.testing.assert_allclose(factor.columns.product(x), dense.columns.product(x), rtol=1e-10)
    np.testing.assert_allclose(single.columns.product(x), dense.columns.product(x), rtol=1e-5)
    assert single.certified_bound(x) == pytest.approx(dense.certified_bound(x), rel=1e-12)


@pytest.mark.parametrize(
    "name", ["large", "many_blocks", "small_block", "dense_bytes", "double_bytes", "threaded_gradients"]
)
def test_limits_are_checked(name):
    with pytest.raises(UsageError, match=name):
        SearchParameters(**{name: -1})


def test_more_than_ten_thousand_weights_without_any_setting():
    rng = np.random.default_rng(3)
    n = 10_001
    G = (rng.standard_normal((40, n)) * rng.lognormal(0, 0.5, n)).astype(np.float32)
    instance = Instance(rng.standard_normal(n), GradientFactor(G, 1e-3), Budget(n - 100))
    reduced = SelectionProblem(instance, 1)
    assert is_large(reduced)
    assert isinstance(reduced.columns.blocks[0], FactorBlock)
    result = solve(instance, "search", stop=Stop(max_iterations=1), threads=2)
    assert instance.admits(result.pruned)
    assert 0 < result.bound <= result.objective
    assert result.gap < 0.9


# Threads


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("linear", [False, True])
def test_threaded_products_with_the_gradients(problem, dtype, threads, damping, linear):
    made = problem(6, n=11, blocks=3, dtype=dtype, damping=damping, linear=linear)
    plain = SelectionObjective(made.instance)
    factor = ThreadedFactor(plain, threads)
    rng = np.random.default_rng(1)
    x = rng.standard_normal(11)
    Q = made.w[:, None] * made.H * made.w
    np.testing.assert_allclose(factor.product(x), Q @ x, rtol=1e-9, atol=1e-12)
    for _ in range(5):
        pruned = rng.random(11) < 0.5
        assert factor.value(pruned) == pytest.approx(made.selection_loss(pruned), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("threads", [1, 3])
def test_products_in_parts_change_no_digit(threads):
    columns, _, _, _, _ = mixed(9)
    parts = Columns(columns.blocks, threads, parallel_product=0)
    x = np.random.default_rng(2).random(30)
    np.testing.assert_array_equal(parts.product(x), columns.product(x))
