"""Layers with many columns: masks, refits and limits of the search without a tableau, on small layers."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cbs_opt
from cbs_opt import Budget, HessianBlocks, Instance, SharedBlocks, evaluate
from cbs_opt.curvature import row_updates
from cbs_opt.losses import predicted_loss
from cbs_opt.solvers.layers import large, solve, wide_admm
from cbs_opt.solvers.layers.problem import Layer, LayerBudget, layer_losses, row_losses
from cbs_opt.solvers.layers.refit import refit_layer
from cbs_opt.solvers.layers.solve import solve_layers


def random_layer(seed, rows=9, columns=24, locked=False):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((3 * columns, columns)) / np.sqrt(1 + np.arange(columns))
    S = X @ np.linalg.qr(rng.standard_normal((columns, columns)))[0]
    S = S.T @ S / len(S)
    S[np.diag_indices(columns)] += 0.02 * S.diagonal().mean()
    fixed = rng.choice([-1, 0, 0, 0, 0, 0, 0, 1], size=(rows, columns)).astype(np.int8) if locked else None
    return Layer(rng.standard_normal((rows, columns)), S, rng.uniform(0.2, 5, rows), fixed)


def exact(layers, masks):
    return layer_losses(layers, [refit_layer(layer, mask) for layer, mask in zip(layers, masks, strict=True)])


@pytest.fixture(autouse=True)
def all_layers_are_wide(monkeypatch):
    monkeypatch.setattr(solve, "TABLEAU_COLUMNS", 4)
    for module in (large, wide_admm, row_updates):
        monkeypatch.setattr(module, "_ROWS", 4)


def budgets(kind, layers):
    if kind == "total":
        return LayerBudget(total=int(0.6 * sum(layer.weights.size for layer in layers)))
    if kind == "pattern":
        return LayerBudget(pattern=(2, 4))
    rng = np.random.default_rng(3)
    return LayerBudget(per_row=tuple(rng.integers(6, 19, layer.rows) for layer in layers))


@pytest.mark.parametrize("kind", ["total", "per_row", "pattern"])
@pytest.mark.parametrize("seed", range(3))
def test_better_than_magnitude_and_the_warm_start(kind, seed):
    layers = [random_layer(seed, locked=kind == "total"), random_layer(seed + 50, rows=5, columns=16)]
    if kind == "per_row":
        layers[1] = random_layer(seed + 50, rows=5)
    budget = budgets(kind, layers)
    reported = []
    solution = solve_layers(layers, budget, report=lambda value, masks: reported.append((value, masks)))
    assert budget.satisfied(solution.pruned)
    assert solution.compared
    for layer, mask in zip(layers, solution.pruned, strict=True):
        assert mask[layer.must_prune()].all() and not mask[layer.must_stay()].any()
    magnitude = budget.cheapest(layers, [np.abs(layer.weights) for layer in layers])
    assert solution.objective == pytest.approx(exact(layers, solution.pruned), rel=1e-9)
    assert solution.objective < 0.95 * exact(layers, magnitude)
    for value, masks in reported:  # stated objectives are upper bounds of what the masks cost
        assert budget.satisfied(masks)
        assert exact(layers, masks) <= value * (1 + 1e-5)
    assert reported[-1][0] == pytest.approx(solution.objective, rel=1e-3)
    again = solve_layers(layers, budget, warm_start=solution.pruned)
    assert again.objective <= solution.objective * (1 + 1e-6)


def test_a_good_warm_start_takes_the_place_of_the_first_run(monkeypatch):
    layers = [random_layer(11, rows=20, columns=48)]
    budget = LayerBudget(total=480)
    first = solve_layers(layers, budget, max_rounds=1)
    cold = []
    monkeypatch.setattr(wide_admm.WideAdmm, "run", lambda self, hold: cold.append(hold))
    again = solve_layers(layers, budget, warm_start=first.pruned, max_rounds=1)
    assert not cold
    assert again.objective < first.objective * (1 - 1e-4)


@pytest.mark.parametrize("kind", ["total", "pattern"])
def test_further_runs_of_admm_go_on_from_the_last_one(kind):
    layers = [random_layer(seed, rows=24, columns=48) for seed in (12, 13)]
    offered = []
    wide = [wide_admm.WideLayer(layer) for layer in layers]
    engine = wide_admm.WideAdmm(wide, budgets(kind, layers), lambda value, masks, weights: offered.append(value))
    masks, weights = engine.run(3)
    kept = [x.copy() for x in weights]
    losses = [exact(layers, masks)]
    for hold in (6, 12):
        masks, _ = engine.run_again(hold)
        assert budgets(kind, layers).satisfied(masks)
        losses.append(exact(layers, masks))
    assert min(losses[1:]) < losses[0]
    for x, y in zip(weights, kept, strict=True):
        np.testing.assert_array_equal(x, y)  # what was returned does not change afterwards


class AtQuestion:
    def __init__(self, k):
        self.left = k

    def __call__(self):
        self.left -= 1
        return self.left < 0


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 999), questions=st.integers(0, 900), kind=st.sampled_from(["total", "pattern"]))
def test_a_stop_at_any_question_keeps_the_incumbent(seed, questions, kind):
    layers = [random_layer(seed), random_layer(seed + 1)]
    budget = budgets(kind, layers)
    warm = budget.cheapest(layers, [layer.weights**2 * np.diag(layer.hessian) for layer in layers])
    magnitude = budget.cheapest(layers, [np.abs(layer.weights) for layer in layers])
    stop = AtQuestion(questions)
    solution = solve_layers(layers, budget, should_stop=stop, warm_start=warm)
    assert budget.satisfied(solution.pruned)
    if solution.compared:
        assert solution.objective <= min(exact(layers, warm), exact(layers, magnitude)) * (1 + 1e-6)
    else:
        found = np.concatenate([mask.ravel() for mask in solution.pruned])
        assert any((found == np.concatenate([m.ravel() for m in masks])).all() for masks in (warm, magnitude))


def test_prices_of_exchanges_are_close_to_exact_ones():
    """The fitted powers between the bounds against T and a of a row that was not a sample."""
    layer = random_layer(4, rows=9, columns=96)
    wide = wide_admm.WideLayer(layer)
    pruned = np.argsort(np.argsort(np.abs(layer.weights), axis=1), axis=1) < 48
    engine = large.BulkExchange(wide, None, pruned)
    kept, out = np.flatnonzero(~pruned[1]), np.flatnonzero(pruned[1])
    S = wide.S.astype(np.float64)
    T = np.linalg.inv(S[np.ix_(kept, kept)])
    a = 1 - np.einsum("pq,pq->p", S[np.ix_(out, kept)] @ T, S[np.ix_(out, kept)])
    t_found = np.exp(0.5**engine.alpha * engine.upper[kept])
    a_found = np.exp(-(0.5**engine.beta) * engine.upper[out])
    assert np.median(np.abs(np.log(t_found / np.diag(T)))) < 0.15
    assert np.median(np.abs(np.log(a_found / a))) < 0.15
    before, rounds = engine.objective, 0
    while engine.round() or (engine.moves > 0).any():
        rounds += 1
        assert engine.objective <= before
        assert (engine.pruned.sum(1) == 48).all()
        before = engine.objective
    assert rounds


def test_rows_are_updated_like_by_factorisations(monkeypatch):
    layer = random_layer(6, rows=11, columns=40)
    rng = np.random.default_rng(0)
    pruned = rng.random(layer.weights.shape) < rng.uniform(0, 1, (11, 1))
    pruned[0], pruned[1] = True, False
    updated = row_updates.update_rows(layer.hessian, layer.weights, pruned)
    found, slow = updated.weights, refit_layer(layer, pruned)
    assert updated.failed.size == 0 and not updated.stopped
    assert (found[pruned] == 0).all()
    np.testing.assert_allclose(found, slow, rtol=1e-6, atol=1e-6)
    assert (row_losses(layer, found) <= row_losses(layer, slow) * (1 + 1e-11) + 1e-20).all()
    monkeypatch.setattr(row_updates, "_LONG", 1)
    monkeypatch.setattr(row_updates, "_WORTH", 1.0)
    long = row_updates.long_rows(pruned)
    assert long.any() and not long.all()
    shared = SharedBlocks(HessianBlocks(layer.hessian.ravel(), [40]), np.zeros(11, dtype=np.int64))
    weights = shared.best_weights(layer.weights.ravel(), pruned.ravel(), None)
    np.testing.assert_allclose(weights.reshape(11, 40), slow, rtol=1e-6, atol=1e-6)


def test_a_row_that_does_not_converge_is_left_to_a_factorisation(monkeypatch):
    rng = np.random.default_rng(1)
    X = rng.standard_normal((60, 60)) * 10.0 ** np.linspace(0, -9, 60)
    S = X @ np.linalg.qr(rng.standard_normal((60, 60)))[0]
    S = S.T @ S
    W, pruned = rng.standard_normal((5, 60)), rng.random((5, 60)) < 0.3
    monkeypatch.setattr(row_updates, "CORRECTIONS", 2)
    found = row_updates.update_rows(S, W, pruned)
    assert found.failed.tolist() == [0, 1, 2, 3, 4]
    assert np.isfinite(found.weights).all()


@pytest.fixture
def long_instance(monkeypatch):
    """An instance with one wide layer whose rows the evaluator updates by gradients, and counts its iterations."""
    monkeypatch.setattr(row_updates, "_LONG", 1)
    monkeypatch.setattr(row_updates, "_WORTH", 0.1)
    monkeypatch.setattr(row_updates, "_WORTH_FROM_START", 0.1)
    counted, plain = [0], row_updates.solve_on_support

    def counting(S, right, pruned, iterations, tolerance, should_stop):
        def asked():
            counted[0] += 1
            return should_stop()

        return plain(S, right, pruned, iterations, tolerance, asked)

    monkeypatch.setattr(row_updates, "solve_on_support", counting)
    layer = random_layer(8, rows=9, columns=40)
    shared = SharedBlocks(HessianBlocks(layer.hessian.ravel(), [40]), np.zeros(9, dtype=np.int64), layer.scale)
    linear = np.random.default_rng(0).standard_normal(360) * 0.1
    return Instance(layer.weights.ravel(), shared, Budget(200), linear=linear), counted


def test_the_evaluator_starts_from_the_weights_of_the_solver(long_instance, monkeypatch):
    instance, counted = long_instance
    spent = []

    def counting(*arguments, **options):
        counted[0] = 0
        losses = evaluate(*arguments, **options)
        spent.append(counted[0])
        return losses

    monkeypatch.setattr("cbs_opt.run.evaluate", counting)
    result = cbs_opt.solve(instance, "joint", objective="joint", parameters={"proof": 0})
    plain = counting(instance, result.pruned)
    warm, cold = spent[0], spent[-1]  # between them magnitude, where the first-order term hides it
    assert result.joint_loss == pytest.approx(plain.joint_loss, rel=1e-10)
    assert result.weights == pytest.approx(plain.weights, abs=1e-6)
    assert 0 < warm < 0.8 * cold
    wrong = np.random.default_rng(1).standard_normal(360).astype(np.float32)  # of a start nothing is assumed
    assert evaluate(instance, result.pruned, start=wrong).joint_loss == pytest.approx(plain.joint_loss, rel=1e-10)
    row = slice(80, 120)
    step = instance.curvature.best_update(2, instance.weights[row], result.pruned[row], instance.linear[row])
    assert plain.weights[row] == pytest.approx(instance.weights[row] + step, abs=1e-6)


def test_an_interrupted_evaluation_states_the_loss_of_weights_that_exist(long_instance):
    instance, _ = long_instance
    pruned = instance.budget.cheapest(np.abs(instance.weights))
    best = evaluate(instance, pruned)
    for questions in (0, 3, 20):
        losses = evaluate(instance, pruned, should_stop=AtQuestion(questions))
        assert not losses.complete and best.complete
        assert (losses.weights[pruned] == 0).all()
        assert losses.joint_loss == pytest.approx(predicted_loss(instance, losses.weights - instance.weights))
        assert best.joint_loss < losses.joint_loss <= losses.selection_loss
    assert evaluate(instance, pruned, should_stop=lambda: False).joint_loss == best.joint_loss


def test_a_solution_of_an_interrupted_run_is_valid(long_instance, caplog):
    instance, _ = long_instance
    asked = [False]

    def interrupt(monitor):
        asked[0] = monitor.iterations >= 2

    stop = cbs_opt.Stop(should_stop=lambda: asked[0])
    result = cbs_opt.solve(
        instance, "joint", objective="joint", parameters={"proof": 0}, stop=stop, callback=interrupt
    )
    assert result.status == "interrupted"
    assert "not the best ones yet" in caplog.text
    assert cbs_opt.verify(instance, result).valid
    worse = dataclasses.replace(result, joint_loss=2 * result.joint_loss, objective=2 * result.objective)
    assert not cbs_opt.verify(instance, worse).valid
