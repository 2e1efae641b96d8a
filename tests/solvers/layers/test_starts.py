"""Quick starts against plain computations, and the pieces of the bound."""

import itertools

import numpy as np
import pytest

from cbs_opt.solvers.layers.bound import lagrangian_bound, row_bounds
from cbs_opt.solvers.layers.bound_kernels import ascend_blocks
from cbs_opt.solvers.layers.problem import Layer, LayerBudget, layer_losses, row_losses
from cbs_opt.solvers.layers.refit import brief_refit, quick_refit, refit_layer
from cbs_opt.solvers.layers.starts import PricedSweep, swept_weights


def random_layer(seed, rows=5, columns=90, locked=False):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((2 * columns, columns)) @ rng.standard_normal((columns, columns))
    S = X.T @ X / (2 * columns)
    fixed = rng.choice([-1, 0, 0, 0, 1], size=(rows, columns)).astype(np.int8) if locked else None
    return Layer(rng.standard_normal((rows, columns)), S, rng.uniform(0.2, 5.0, rows), fixed)


@pytest.mark.parametrize("locked", [False, True])
def test_priced_sweep_is_optimal_brain_surgeon_on_the_columns_that_are_left(locked):
    """Each decision by the inverse of S on the later columns, which make up for what goes."""
    layer = random_layer(0, locked=locked)
    sweep = PricedSweep(layer)
    first = layer.scale[:, None] * layer.weights**2 / np.diag(np.linalg.inv(layer.hessian))
    price = float(np.quantile(first, 0.5))
    costs, weights = sweep.costs(price)
    costs, weights = sweep.unsorted(costs), sweep.unsorted(weights)
    for r in range(layer.rows):
        w, left = layer.weights[r].copy(), sweep.order.copy()
        for c in sweep.order:
            inverse = np.linalg.inv(layer.hessian[np.ix_(left, left)])
            cost = layer.scale[r] * w[c] ** 2 / inverse[0, 0]
            lock = 0 if layer.locked is None else layer.locked[r, c]
            expected = {1: -np.inf, -1: np.inf}.get(int(lock), cost)
            assert costs[r, c] == pytest.approx(expected, rel=1e-6)
            if expected < price:
                w[left] -= inverse[0] * w[c] / inverse[0, 0]
                w[c] = 0.0
            left = left[1:]
        assert weights[r] == pytest.approx(w, rel=1e-6, abs=1e-9)


def test_swept_weights_fit_their_masks_and_refits_improve_them():
    layer = random_layer(1, rows=20)
    budget = LayerBudget(total=1200)
    masks, weights = swept_weights([layer], budget)
    assert budget.satisfied(masks) and (weights[0][masks[0]] == 0).all()
    exact = layer_losses([layer], [refit_layer(layer, masks[0])])
    brief = [brief_refit(layer, masks[0], weights[0], iterations) for iterations in (0, 3, 200)]
    assert brief[0] == pytest.approx(layer_losses([layer], weights), rel=1e-4)
    assert brief[0] > brief[1] > brief[2] >= exact * (1 - 1e-9)
    assert brief[2] == pytest.approx(exact, rel=1e-2)
    losses, is_exact = quick_refit(layer, masks[0])
    assert is_exact and losses == pytest.approx(row_losses(layer, refit_layer(layer, masks[0])))


def test_bounds_of_rows_with_given_numbers_are_those_of_single_rows():
    rng = np.random.default_rng(2)
    scale, kept = rng.uniform(0.5, 2, 6), rng.integers(3, 12, 6).astype(float)
    tables = np.cumsum(rng.uniform(0, 1, (6, 5, 4)) * [1, 1, 0.6, 0.3], axis=2)
    constant = rng.uniform(20, 30, 6)
    value, _ = row_bounds((constant, tables, 0.25), scale, kept)
    single = [
        lagrangian_bound([(constant[r : r + 1], tables[r : r + 1], 0.0)], [scale[r : r + 1]], int(kept[r]))[0]
        for r in range(6)
    ]
    assert value == pytest.approx(sum(single) - 0.125, rel=1e-9)


def test_a_cycle_over_the_blocks_keeps_the_inverse_and_rises():
    """W stays (S − B)⁻¹ over lists of changes of more than one product, and the barrier function rises."""
    S = random_layer(3, columns=100).hessian
    S += 0.2 * np.mean(np.diag(S)) * np.eye(100)
    starts = np.array([0, 9, *range(12, 100, 8), 100])
    m, barrier = 9, 0.5
    B, target = np.zeros((100, 100)), np.zeros((100, m))
    inverse = np.linalg.inv(S)
    for a, b in itertools.pairwise(starts):
        B[a:b, a:b] = 0.02 * np.linalg.eigvalsh(S)[0] * np.eye(b - a)
        target[a:b, : b - a] = inverse[a:b, a:b]

    def height(B):
        linear = sum((target[a:b, : b - a] * B[a:b, a:b]).sum() for a, b in itertools.pairwise(starts))
        return linear + barrier * np.linalg.slogdet(S - B)[1]

    before = height(B)
    W = np.linalg.inv(S - B)
    ascend_blocks(W, B, target, starts, barrier)
    assert np.allclose(W, np.linalg.inv(S - B), rtol=1e-5, atol=1e-9 * W.max())
    assert height(B) > before
    outside = np.ones_like(B, dtype=bool)
    for a, b in itertools.pairwise(starts):
        outside[a:b, a:b] = False
        assert np.linalg.eigvalsh(B[a:b, a:b])[0] > 0
    assert (B[outside] == 0).all()
