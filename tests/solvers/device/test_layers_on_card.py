"""Layers on a card: thresholds, ADMM and exchanges against the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cbs_opt import Budget, HessianBlocks, Instance, joint_loss, solve
from cbs_opt.curvature import SharedBlocks
from cbs_opt.solvers.device.thresholds import smallest
from cbs_opt.solvers.layers import device_wide
from cbs_opt.solvers.layers import layered_instance as layered
from cbs_opt.solvers.layers import solve as entry
from cbs_opt.solvers.layers.problem import Layer, LayerBudget, layer_losses
from cbs_opt.solvers.layers.solve import solve_layers

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("seed", range(3))
def test_smallest_is_a_sort_with_ties_by_index(card, seed):
    rng = np.random.default_rng(seed)
    cost = np.where(rng.random((6, 40)) < 0.3, 0.25, rng.random((6, 40)) * 10.0 ** rng.uniform(-30, 5, (6, 40)))
    cost = cost.astype(np.float32)
    counts = np.array([0, 1, 7, 20, 39, 40])
    chosen = smallest(torch.tensor(cost, device=card.device), torch.tensor(counts, device=card.device))
    rank = np.argsort(np.argsort(cost, axis=1, kind="stable"), axis=1)
    assert (chosen.cpu().numpy() == (rank < counts[:, None])).all()
    locked = rng.integers(-1, 2, cost.shape).astype(np.int8)
    forced = np.where(locked > 0, -1.0, np.where(locked < 0, np.inf, cost))
    rank = np.argsort(np.argsort(forced, axis=1, kind="stable"), axis=1)
    chosen = smallest(*(torch.tensor(a, device=card.device) for a in (cost, counts, locked)))
    assert (chosen.cpu().numpy() == (rank < counts[:, None])).all()


def random_layer(seed, rows=9, columns=24, locked=False):
    rng = np.random.default_rng(seed)
    G = rng.normal(size=(3 * columns, columns)) * np.exp(rng.normal(size=columns))
    G += rng.normal(size=(3 * columns, 1))
    fixed = rng.integers(-1, 2, (rows, columns)).astype(np.int8) * (rng.random((rows, columns)) < 0.2)
    S = G.T @ G / columns + 0.01 * np.eye(columns)
    return Layer(rng.normal(size=(rows, columns)), S, rng.random(rows) + 0.5, fixed if locked else None)


def budgets(kind, layers):
    if kind == "total":
        return LayerBudget(total=sum(layer.weights.size for layer in layers) * 6 // 10)
    if kind == "per_row":
        return LayerBudget(per_row=tuple(np.full(layer.rows, layer.columns * 6 // 10) for layer in layers))
    return LayerBudget(pattern=(2, 4))


@pytest.mark.parametrize(
    ("kind", "locked"), [("total", False), ("total", True), ("per_row", True), ("pattern", False)]
)
def test_layers_on_a_card_are_as_good_as_on_the_cpu(card, monkeypatch, kind, locked):
    monkeypatch.setattr(entry, "TABLEAU_COLUMNS", 0)
    layers = [random_layer(seed, locked=locked) for seed in (1, 2)]
    budget = budgets(kind, layers)
    here, there = (solve_layers(layers, budget, card=where) for where in (None, card))
    magnitude = budget.cheapest(layers, [np.abs(layer.weights) for layer in layers])
    start = layer_losses(layers, [np.where(m, 0.0, la.weights) for m, la in zip(magnitude, layers, strict=True)])
    assert budget.satisfied(there.pruned)
    assert all(
        layer.locked is None or ((mask[layer.locked > 0]).all() and not mask[layer.locked < 0].any())
        for layer, mask in zip(layers, there.pruned, strict=True)
    )
    assert there.objective <= 1.05 * here.objective < start
    assert there.compared and there.objective == pytest.approx(layer_losses(layers, there.weights))


@pytest.mark.parametrize("kind", ["total", "per_row", "pattern"])
def test_short_rows_are_searched_on_the_card_first(card, monkeypatch, kind):
    """The CPU goes on from what the card found, and says so if the card failed."""
    layers = [random_layer(seed, locked=kind != "pattern") for seed in (1, 2)]
    budget, first = budgets(kind, layers), []
    search = device_wide.DeviceWideSearch.run

    def run(self, starts):
        compared = search(self, starts)
        first.append(self.incumbent)
        return compared

    monkeypatch.setattr(device_wide.DeviceWideSearch, "run", run)
    found = solve_layers(layers, budget, card=card)
    assert found.device == card.name and budget.satisfied(found.pruned) and found.compared
    assert found.objective <= first[0].objective * (1 + 1e-5)
    assert found.objective <= 1.01 * solve_layers(layers, budget).objective

    def fail(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device_wide.DeviceLayer, "refit", fail)
    failed = solve_layers(layers, budget, card=card)
    assert failed.device == f"{card.name}, which failed; cpu" and budget.satisfied(failed.pruned)


def test_weights_of_the_card_are_handed_over(card, monkeypatch):
    """The evaluator starts from them: they are near the best ones of the masks."""
    monkeypatch.setattr(entry, "TABLEAU_COLUMNS", 0)
    layers = [random_layer(seed) for seed in (1, 2)]
    found = solve_layers(layers, budgets("total", layers), card=card, refit=False)
    assert found.near and found.objective == pytest.approx(layer_losses(layers, found.weights), rel=1e-4)


def test_a_stop_keeps_the_incumbent(card, monkeypatch):
    monkeypatch.setattr(entry, "TABLEAU_COLUMNS", 0)
    layers, asked = [random_layer(1)], []
    budget = budgets("total", layers)

    def stop():
        asked.append(0)
        return len(asked) > 4

    found = solve_layers(layers, budget, card=card, should_stop=stop)
    assert budget.satisfied(found.pruned) and np.isfinite(found.objective)


def test_the_solver_joint_uses_the_card(card, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(entry, "TABLEAU_COLUMNS", 0)
    monkeypatch.setattr(layered, "TABLEAU_COLUMNS", 0)
    monkeypatch.setattr(layered, "_SHORTEST_ON_CARD", 8)
    layer = random_layer(3, rows=10, columns=16)
    curvature = SharedBlocks(HessianBlocks.from_blocks([layer.hessian]), np.zeros(10, np.int64), layer.scale)
    instance = Instance(layer.weights.ravel(), curvature, Budget(100))
    parameters = {"proof": 0, "bound_share": 0.0}
    found = solve(instance, "joint", device="cuda", parameters=parameters)
    assert found.environment["device"] == card.name and "1 layer of up to 10 × 16 weights: on" in caplog.text
    assert found.objective == pytest.approx(joint_loss(instance, found.pruned), rel=1e-9)
    assert found.objective < 0.9 * solve(instance, "magnitude", objective="joint").objective
