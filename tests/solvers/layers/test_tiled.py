"""Layers with cross groups: exact prices of exchanges, the search in bands, and long rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cbs_opt import (
    HessianBlocks,
    Instance,
    InstanceError,
    SharedBlocks,
    SolverError,
    evaluate,
    joint_loss,
    solve,
)
from cbs_opt.instances.recipe import transposable_budget
from cbs_opt.solvers.layers.layered_instance import layered_instance
from cbs_opt.solvers.layers.problem import LayerBudget
from cbs_opt.solvers.layers.refit import refit_row
from cbs_opt.solvers.layers.solve import solve_layers
from cbs_opt.solvers.layers.tile_kernels import best_exchanges, search_band
from cbs_opt.solvers.layers.tiled_budget import TiledBudget
from cbs_opt.solvers.layers.tiled_search import BandState, fits_tableaus
from cbs_opt.solvers.layers.wide_admm import WideLayer


def instance_of(shapes, N=2, M=4, seed=0, scaled=False, **fields):
    """Layers of random weights and correlated inputs, with a transposable pattern."""
    rng = np.random.default_rng(seed)
    matrices, shared, weights, scale = [], [], [], []
    for number, shape in enumerate(shapes):
        rows, K = shape[0], int(np.prod(shape[1:]))
        X = rng.standard_normal((2 * K + 4, K)) @ rng.standard_normal((K, K))
        matrices.append(X.T @ X / len(X) + 0.1 * np.eye(K))
        shared += [number] * rows
        weights.append(rng.standard_normal(rows * K))
        scale += rng.uniform(0.5, 2.0, rows).tolist() if scaled else [1.0] * rows
    curvature = SharedBlocks(HessianBlocks.from_blocks(matrices), shared, scale)
    return Instance(np.concatenate(weights), curvature, transposable_budget(shapes, N, M), **fields)


def exchanges(budget, pruned):
    """Every exchange of four weights of a tile: the two that are pruned, and the two that return."""
    for part in budget.tiles:
        for tile in part.index:
            a, b = tile.shape
            for r1 in range(a):
                for r2 in range(r1 + 1, a):
                    for c1 in range(b):
                        for c2 in range(b):
                            four = tile[r1, c1], tile[r2, c2], tile[r1, c2], tile[r2, c1]
                            if pruned[list(four)].tolist() == [False, False, True, True]:
                                yield four


def flipped(pruned, four):
    out = pruned.copy()
    out[list(four)] = ~out[list(four)]
    return out


SHAPES = {
    "one tile": [(4, 4)],
    "ends": [(6, 7)],
    "a convolution": [(4, 4, 3, 1)],
    "two layers": [(4, 8), (3, 5)],
}


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_gains_in_a_local_optimum(name):
    instance = instance_of(SHAPES[name], scaled=True, seed=3)
    layered = layered_instance(instance, "joint")
    found = solve_layers(layered.layers, layered.budget, max_rounds=1)  # a descent
    pruned = layered.expand(found.pruned)
    assert instance.admits(pruned)
    loss = joint_loss(instance, pruned)
    assert found.objective == pytest.approx(loss, rel=1e-9)
    for four in exchanges(instance.budget, pruned):
        other = flipped(pruned, four)
        assert instance.admits(other)
        assert joint_loss(instance, other) >= loss * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fields", [{}, {"fixed": True}, {"linear": True}])
def test_against_enumeration(seed, fields):
    rng = np.random.default_rng(seed)
    given = {}
    if "linear" in fields:
        given["linear"] = rng.standard_normal(24)
    instance = instance_of([(4, 6)], seed=seed, scaled=True, **given)
    if "fixed" in fields:
        allowed = instance.budget.cheapest(rng.random(24))
        fixed = np.where(rng.random(24) < 0.2, np.where(allowed, 1, -1), 0).astype(np.int8)
        instance = replace(instance, fixed=fixed)
    result = solve(instance, "joint", threads=1)
    optimum = solve(instance, "brute", objective="joint").objective
    assert result.objective == pytest.approx(optimum, rel=1e-9)
    assert result.bound <= optimum + 1e-9 * abs(optimum)
    assert instance.admits(result.pruned)
    losses = evaluate(instance, result.pruned)
    assert losses.joint_loss == result.objective


def test_prices_in_a_band_are_exact():
    instance = instance_of([(4, 12)], seed=5, scaled=True)
    layered = layered_instance(instance, "joint")
    (layer,) = layered.layers
    (band,) = layered.budget.bands(layered.layers)
    assert band.rows.tolist() == [0, 1, 2, 3] and band.cells.shape == (3, 4, 4)
    mask = instance.budget.cheapest(np.abs(instance.weights)).reshape(4, 12)
    state, b = BandState(4, 12, (4, 4)), layer.weights @ layer.hessian

    def doubled(masks):
        rows = (refit_row(layer.hessian, b[r], layer.weights[r], masks[r])[1] for r in range(4))
        return float(layer.scale @ np.array(list(rows)))

    fours = list(exchanges(instance.budget, mask.ravel()))
    least = min(doubled(flipped(mask.ravel(), four).reshape(4, 12)) for four in fours)
    flag = np.zeros(1, dtype=np.uint8)
    for steps, tenure in ((1, 0), (1, 3), (40, 3)):
        losses = np.zeros(4)
        state.mask[:], state.release[:] = mask, 0
        for r, row in enumerate(state.rows):
            row.build(layer.hessian, b[r], layer.weights[r], mask[r])
            losses[r] = row.loss
        best, made, _ = search_band(
            state.U, state.A, state.T, state.VA, state.VT, state.signs, state.sizes, state.x, state.t, state.d,
            state.a, state.pruned, state.kept, state.work, state.mask, state.place, state.release, state.prices,
            band.tile_rows, band.cells, losses, layer.scale, state.best, 0, steps, tenure, 1, flag,
        )  # fmt: skip
        assert best == pytest.approx(doubled(state.best != 0), rel=1e-9)
        assert float(layer.scale @ losses) == pytest.approx(doubled(state.mask != 0), rel=1e-8)
        assert instance.budget.is_met_by(state.mask.ravel() != 0) and made >= steps - 20
        if steps == 1:
            assert float(layer.scale @ losses) == pytest.approx(least, rel=1e-9)


def test_best_exchanges_of_separate_prices():
    instance = instance_of([(6, 7)], seed=1)
    rng, pruned = np.random.default_rng(1), instance.budget.cheapest(np.random.default_rng(0).random(42))
    price = rng.random(42).astype(np.float32)
    cost = np.where(pruned, np.float32(np.inf), price)
    gain = np.where(pruned, price, -np.float32(np.inf))
    found = set()
    for part in instance.budget.tiles:
        change, four = np.zeros(len(part.index)), np.zeros((len(part.index), 4), np.int64)
        best_exchanges(cost, gain, part.index, change, four)
        for tile, value, weights in zip(part.index, change, four, strict=True):
            inside = [f for f in exchanges(instance.budget, pruned) if f[0] in tile]
            prices = [float(price[list(f[:2])].sum() - price[list(f[2:])].sum()) for f in inside]
            assert value == pytest.approx(min([0.0, *prices]), abs=1e-6)
            if value < 0:
                found.add(tuple(weights.tolist()))
                assert instance.budget.is_met_by(flipped(pruned, weights))
            else:
                assert weights.tolist() == [-1] * 4
    assert len(found) >= 2


@pytest.mark.parametrize("name", SHAPES)
def test_long_rows(name):
    """The search without tableaus keeps the pattern, and is no worse than magnitude with the best update."""
    instance = instance_of(SHAPES[name], seed=2, scaled=True)
    layered = layered_instance(instance, "joint")
    found = solve_layers(layered.layers, layered.budget, wide=True, max_rounds=12)
    pruned = layered.expand(found.pruned)
    assert instance.admits(pruned)
    magnitude = joint_loss(instance, instance.budget.cheapest(np.abs(instance.weights)))
    assert found.objective == pytest.approx(joint_loss(instance, pruned), rel=1e-6)
    assert found.objective <= magnitude * (1 + 1e-9)


def test_long_rows_keep_what_is_fixed_and_exchange():
    base = instance_of([(16, 64)], seed=4)
    allowed = base.budget.cheapest(np.random.default_rng(0).random(base.n))
    fixed = np.where(np.random.default_rng(1).random(base.n) < 0.2, np.where(allowed, 1, -1), 0).astype(np.int8)
    for instance in (base, replace(base, fixed=fixed)):
        layered = layered_instance(instance, "joint")
        found = solve_layers(layered.layers, layered.budget, wide=True)
        none = solve_layers(layered.layers, layered.budget, wide=True, max_rounds=1)
        assert instance.admits(layered.expand(found.pruned))
        assert found.objective < none.objective
    rows = [row.columns for row in layered.layers]
    assert rows == [64] and WideLayer(layered.layers[0]).S.shape == (64, 64)


def test_the_relaxation_without_cross_groups_bounds_the_problem():
    instance = instance_of([(8, 16)], seed=0)
    found = solve(instance, "joint", threads=1, parameters={"bound_share": 0.9})
    plain = transposable_budget([(8, 16)], 2, 4)
    layered = layered_instance(instance, "joint")
    assert isinstance(layered.budget, TiledBudget) and layered.budget.pattern == (2, 4)
    assert (layered.budget.crossed.groups == plain.groups).all()
    assert found.bound is not None and 0 < found.bound <= found.objective
    ends = layered_instance(instance_of([(6, 7)]), "joint").budget
    assert ends.pattern is None and [int(c) for c in ends.per_row[0]] == [3, 3, 3, 3, 3, 3]


def test_wrong_warm_starts_and_objectives_are_refused():
    layered = layered_instance(instance_of([(4, 8)]), "joint")
    rows = np.tile([True, False], (4, 4))  # the groups are met, the cross groups are not
    with pytest.raises(InstanceError, match="warm start does not fit"):
        solve_layers(layered.layers, layered.budget, warm_start=[rows])
    with pytest.raises(InstanceError, match="joint objective only"):
        solve_layers(layered.layers, layered.budget, objective="selection")
    assert layered_instance(layered.instance, "selection") is None


def test_engines_and_singular_hessians_are_refused():
    instance = instance_of([(4, 8)])
    with pytest.raises(SolverError, match="this instance has cross groups"):
        solve(instance, "joint", engine="processes")
    G = np.random.default_rng(0).standard_normal((12, 16))
    singular = Instance(np.ones(16), HessianBlocks.from_blocks([G.T @ G]), transposable_budget([(4, 4)], 2, 4))
    with pytest.raises(SolverError, match="cross groups with a singular Hessian: a positive damping"):
        solve(singular, "joint")


def test_bands_of_many_or_long_rows_go_another_way():
    layered = layered_instance(instance_of([(8, 8)], 4, 8), "joint")
    (band,) = layered.budget.bands(layered.layers)
    assert fits_tableaus([band], 1000, 1) and not fits_tableaus([band], 4000, 1)
    assert not fits_tableaus([band] * 64, 1000, 64), "a band a thread"
    many = replace(band, rows=np.arange(65))
    assert not fits_tableaus([many], 8, 1)


def test_groups_across_rows_take_another_way():
    """Where groups have weights of several rows there are no layers, and the search on blocks takes over."""
    instance = instance_of([(4, 4)])
    budget = instance.budget
    across = replace(budget, groups=budget.cross_groups, cross_groups=budget.groups)
    turned = replace(instance, budget=across)
    assert layered_instance(turned, "joint") is None
    assert solve(turned, "joint").objective == pytest.approx(solve(instance, "brute", objective="joint").objective)


@pytest.mark.parametrize("both", [False, True])
def test_large_cells_are_bounded_by_rows(both):
    """2³² masks of a cell are not enumerated."""
    instance = instance_of([(32, 32)], 16, 32)
    layered = layered_instance(instance, "joint")
    budget = layered.budget if both else LayerBudget(pattern=(16, 32))
    found = solve_layers(layered.layers, budget, max_rounds=1, bound_share=0.5)
    assert budget.satisfied(found.pruned)
    assert found.bound is not None and 0 <= found.bound <= found.objective
