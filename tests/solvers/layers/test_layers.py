"""The front door of `solvers.layers` against enumeration: budgets, scales, both objectives, limits."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbs_opt.errors import InstanceError
from cbs_opt.solvers.layers.bound import BoundSearch
from cbs_opt.solvers.layers.incumbent import Incumbent
from cbs_opt.solvers.layers.parallel import RowPool
from cbs_opt.solvers.layers.problem import Layer, LayerBudget, layer_losses
from cbs_opt.solvers.layers.refit import refit_layer, refit_row
from cbs_opt.solvers.layers.selection import SelectionSearch
from cbs_opt.solvers.layers.solve import solve_layers


def random_layer(seed, rows=3, columns=8, damping=0.05, locked=False):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((2 * columns, columns)) @ rng.standard_normal((columns, columns))
    S = X.T @ X / (2 * columns)
    S += damping * np.trace(S) / columns * np.eye(columns)
    fixed = rng.choice([-1, 0, 0, 0, 0, 1], size=(rows, columns)).astype(np.int8) if locked else None
    return Layer(rng.standard_normal((rows, columns)), S, rng.uniform(0.2, 5.0, rows), fixed)


def row_value(layer, r, mask, objective):
    w, S = layer.weights[r], layer.hessian
    if objective == "selection":
        return 0.5 * layer.scale[r] * float((w * mask) @ S @ (w * mask))
    return 0.5 * layer.scale[r] * refit_row(S, S @ w, w, mask)[1]


def all_rows(layer, objective):
    """For each row: every allowed mask and its value."""
    masks = [np.array(bits, dtype=bool) for bits in itertools.product((False, True), repeat=layer.columns)]
    must, stay = layer.must_prune(), layer.must_stay()
    return [
        [
            (mask, row_value(layer, r, mask, objective))
            for mask in masks
            if mask[must[r]].all() and not mask[stay[r]].any()
        ]
        for r in range(layer.rows)
    ]


def optimum(layers, budget, objective):
    """The best value by enumeration of rows, joined by dynamic programming over the total."""
    reached = {0: 0.0}
    for k, layer in enumerate(layers):
        for r, options in enumerate(all_rows(layer, objective)):
            best = {}
            for mask, value in options:
                if (
                    budget.pattern is not None
                    and (mask.reshape(-1, budget.pattern[1]).sum(1) != budget.pattern[0]).any()
                ):
                    continue
                if budget.per_row is not None and mask.sum() != budget.per_row[k][r]:
                    continue
                number = int(mask.sum())
                best[number] = min(best.get(number, np.inf), value)
            joined = {}
            for (a, x), (b, y) in itertools.product(reached.items(), best.items()):
                joined[a + b] = min(joined.get(a + b, np.inf), x + y)
            reached = joined
    return reached[budget.total] if budget.total is not None else min(reached.values())


def some_budget(kind, layers, seed):
    rng = np.random.default_rng(seed)
    low = [layer.must_prune().sum(1) for layer in layers]
    high = [layer.columns - layer.must_stay().sum(1) for layer in layers]
    if kind == "total":
        return LayerBudget(total=int(rng.integers(sum(x.sum() for x in low), sum(x.sum() for x in high) + 1)))
    if kind == "per_row":
        return LayerBudget(per_row=tuple(rng.integers(a, b + 1) for a, b in zip(low, high, strict=True)))
    return LayerBudget(pattern=(2, 4))


@pytest.mark.parametrize("objective", ["joint", "selection"])
@pytest.mark.parametrize("kind", ["total", "per_row", "pattern"])
@pytest.mark.parametrize("seed", range(4))
def test_bound_optimum_objective(objective, kind, seed):
    layers = [random_layer(seed), random_layer(100 + seed, rows=2, columns=4)]
    if kind != "pattern":
        layers.append(random_layer(200 + seed, rows=2, columns=5, locked=True))
    budget = some_budget(kind, layers, seed)
    best = optimum(layers, budget, objective)
    solution = solve_layers(layers, budget, objective=objective, bound_share=0.5)
    assert budget.satisfied(solution.pruned)
    for layer, mask, weights in zip(layers, solution.pruned, solution.weights, strict=True):
        assert mask[layer.must_prune()].all() and not mask[layer.must_stay()].any()
        assert (weights[mask] == 0).all()
    assert solution.bound <= best * (1 + 1e-9) + 1e-12
    assert best <= solution.objective * (1 + 1e-9) + 1e-12
    assert solution.objective <= 1.1 * best + 1e-12
    assert solution.objective == pytest.approx(layer_losses(layers, solution.weights), rel=1e-12)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_bounds_with_blocks_smaller_than_a_row(size, fixed):
    """A row in one block is solved exactly; with smaller blocks the split S = R + B is at work."""
    objective = "selection" if fixed else "joint"
    tight, better = [], []
    for seed in range(4):
        layer = random_layer(seed)
        budget = some_budget("total", [layer], seed + 7)
        best = optimum([layer], budget, objective)
        solution = solve_layers([layer], budget, objective=objective)
        incumbent = Incumbent([layer])
        incumbent.offer(solution.objective, solution.pruned)
        with RowPool(1, lambda: False) as pool:
            search = BoundSearch([layer], budget, incumbent, solution.weights, pool, size, fixed)
            assert search.prepare()
            for _ in range(8):
                search.step()
            shared = incumbent.bound
            search.refine(lambda: False)
        assert incumbent.bound <= best * (1 + 1e-9)
        tight.append(incumbent.bound / best if best else 1.0)
        better.append(incumbent.bound > shared * 1.01)
    assert max(tight) > 0.3  # a bound of zero would pass the rest
    assert any(better)  # rows with a B of their own give a better bound


@given(seed=st.integers(0, 10_000), share=st.floats(0.1, 0.9), limit=st.floats(0.0, 0.05))
@settings(max_examples=15, deadline=None)
def test_never_worse_than_magnitude_and_warm_start(seed, share, limit):
    layers = [random_layer(seed, rows=12, columns=24, damping=0.01), random_layer(seed + 1, rows=4, columns=30)]
    budget = LayerBudget(total=int(share * sum(layer.weights.size for layer in layers)))
    rng = np.random.default_rng(seed)
    warm = budget.cheapest(layers, [rng.random(layer.weights.shape) for layer in layers])
    magnitude = budget.cheapest(layers, [np.abs(layer.weights) for layer in layers])
    solution = solve_layers(layers, budget, warm_start=warm, time_limit=limit, bound_share=0.3)
    assert budget.satisfied(solution.pruned)
    for start in (warm, magnitude):
        weights = [refit_layer(layer, mask) for layer, mask in zip(layers, start, strict=True)]
        assert solution.objective <= layer_losses(layers, weights) * (1 + 1e-9)


def test_time_is_kept_back_for_the_refit_of_the_answer():
    """With a clock that counts its readings the run ends as much earlier as a refit of all rows takes."""
    layer = random_layer(9, rows=8, columns=20)
    readings, kept = [0.0], []

    def clock():
        readings[0] += 1e-3
        return readings[0]

    solution = solve_layers(
        [layer], LayerBudget(total=100), time_limit=0.5, clock=clock, refit=False, keep_back=kept.append
    )
    assert len(kept) == 1 and 1e-3 < kept[0] < 0.3
    assert readings[0] <= 0.5 - kept[0] + 0.1
    assert solution.history[-1][0] <= 0.5 - kept[0] + 0.1


def test_no_exchange_improves_a_row_that_a_stop_has_interrupted():
    """A stop during the tabu search of a row does not leave out the descent behind it."""
    layer = random_layer(10, rows=1, columns=24)
    budget = LayerBudget(per_row=(np.array([12]),))
    start = np.arange(24)[None] % 2 == 0
    with RowPool(1, lambda: False) as pool:
        search = SelectionSearch([layer], budget, Incumbent([layer]), pool)
        search.start_from([start])
        pool.flag[0] = 1
        search._visit(0, 1000, 5, 1)
        search.allocate()
    mask = search.incumbent.pruned[0][0]
    Q = layer.weights[0][:, None] * layer.hessian * layer.weights[0]
    best = mask @ Q @ mask
    assert best < start[0] @ Q @ start[0]
    for i in np.flatnonzero(mask):
        for j in np.flatnonzero(~mask):
            other = mask.copy()
            other[[i, j]] = False, True
            assert other @ Q @ other >= best * (1 - 1e-9)


def test_scaling_the_weights_and_the_rows():
    """Weights times 3 and scales times 2: the same masks, and 18 times the objective."""
    layer = random_layer(5, rows=4, columns=12)
    budget = LayerBudget(total=24)
    one = solve_layers([layer], budget, max_rounds=3)
    other = solve_layers([Layer(3 * layer.weights, layer.hessian, 2 * layer.scale)], budget, max_rounds=3)
    assert other.objective == pytest.approx(18 * one.objective, rel=1e-9)


def test_threads_do_not_change_feasibility_and_reports_fall():
    layer = random_layer(6, rows=10, columns=30)
    budget = LayerBudget(total=150)
    reported = []
    solution = solve_layers(
        [layer], budget, threads=2, max_rounds=3, report=lambda value, masks: reported.append((value, masks))
    )
    values = [value for value, _ in reported]
    assert values == sorted(values, reverse=True) and len(values) > 1
    assert all(budget.satisfied(masks) for _, masks in reported)
    assert solution.objective == pytest.approx(values[-1], rel=1e-9)


def test_large_path_keeps_the_contract(monkeypatch):
    monkeypatch.setattr("cbs_opt.solvers.layers.solve.TABLEAU_COLUMNS", 16)
    layer = random_layer(7, rows=6, columns=32)
    for budget in (LayerBudget(total=100), LayerBudget(per_row=(np.arange(10, 16),)), LayerBudget(pattern=(2, 4))):
        solution = solve_layers([layer], budget)
        magnitude = budget.cheapest([layer], [np.abs(layer.weights)])
        assert budget.satisfied(solution.pruned)
        assert solution.objective <= layer_losses([layer], [refit_layer(layer, magnitude[0])]) * (1 + 1e-6)
        exact = layer_losses([layer], [refit_layer(layer, solution.pruned[0])])
        assert solution.objective == pytest.approx(exact, rel=1e-6)


def test_mixtures_of_a_single_row_keep_up_with_its_blocks():
    """Where they lag behind B, bounds lie far below zero: with 10 sweeps a step this one is 0 after 8 steps."""
    K = 128
    rng = np.random.default_rng(1)
    Q = np.linalg.qr(rng.standard_normal((K, K)))[0]
    S = (Q * np.arange(1, K + 1.0) ** -1.5) @ Q.T + 3e-3 / K * np.eye(K)
    layer = Layer(rng.standard_normal((1, K)), S)
    budget = LayerBudget(total=102)
    found = solve_layers([layer], budget, max_rounds=3, threads=1)
    incumbent = Incumbent([layer])
    incumbent.offer(found.objective, found.pruned)
    with RowPool(1, lambda: False) as pool:
        search = BoundSearch([layer], budget, incumbent, found.weights, pool)
        assert search.prepare()
        for _ in range(8):
            assert search.step()
        shared = incumbent.bound
        assert 0.7 * found.objective < shared
        search.refine(lambda: True)
        assert search.value > 0.99 * shared, "rows start from the best B, with mixtures of this B"
        visits = iter(range(20))
        search.refine(lambda: next(visits, None) is None)
    assert shared < incumbent.bound <= found.objective


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda: LayerBudget().check([random_layer(0)]), "one of total, per_row and pattern"),
        (lambda: LayerBudget(total=25).check([random_layer(0)]), "must be in"),
        (lambda: LayerBudget(pattern=(2, 3)).check([random_layer(0)]), "divide"),
        (lambda: Layer(np.ones((2, 3)), np.eye(4)), "weights"),
        (lambda: Layer(np.ones((2, 3)), np.eye(3), np.array([1.0, 0.0])), "positive"),
        (lambda: solve_layers([random_layer(0)], LayerBudget(total=4), objective="both"), "joint or selection"),
        (
            lambda: solve_layers(
                [random_layer(0)], LayerBudget(total=4), warm_start=[np.zeros((3, 8), dtype=bool)]
            ),
            "warm start",
        ),
    ],
)
def test_bad_input_is_told(change, says):
    with pytest.raises(InstanceError, match=says):
        change()


@pytest.mark.parametrize("equal", [False, True])
def test_the_cheapest_of_every_row_are_those_of_a_stable_sort(equal):
    rng = np.random.default_rng(3)
    counts = np.full(8, 5) if equal else np.array([0, 0, 1, 4, 9, 11, 12, 12])
    locked = rng.integers(-1, 2, (8, 12)).astype(np.int8) * (rng.random((8, 12)) < 0.3)
    layer = Layer(rng.normal(size=(8, 12)), np.eye(12), None, locked)
    cost = rng.integers(0, 4, (8, 12)) / 4  # many ties
    (mask,) = LayerBudget(per_row=(counts,)).cheapest([layer], [cost])
    forced = np.where(locked > 0, -np.inf, np.where(locked < 0, np.inf, cost))
    rank = np.argsort(np.argsort(forced, axis=1, kind="stable"), axis=1)
    assert mask.tolist() == (rank < counts[:, None]).tolist()
