"""Shifts of the selection problem, and trees that use one at every node, against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cbs_opt.certificate_bounds import SelectionPart
from cbs_opt.certificate_tree import least
from cbs_opt.solvers.trees import best_first
from cbs_opt.solvers.trees.best_first import Shift, Subproblem
from cbs_opt.solvers.trees.selection_shift import best_shift, inverse_on_complement
from cbs_opt.solvers.trees.selection_worker import DenseSelection, SelectionWorker, prepare_selection

SEEDS = range(24)


def problem(seed):
    """Q, c, the group of each variable and the ones wanted; weights cancel, and c may be negative."""
    rng = np.random.default_rng(seed)
    n, m = int(rng.integers(8, 14)), int(rng.integers(2, 14))
    G = rng.normal(size=(m, n)) * (rng.random((m, n)) < 0.7)
    Q = G.T @ G / m + 1e-6 * np.eye(n)
    c = 0.2 * rng.normal(size=n) * (seed % 2)
    group = np.zeros(n, np.int64)
    if seed % 3 == 0:
        group = np.sort(rng.permutation(np.arange(n) % 2)).astype(np.int64)
    return Q, c, group, np.maximum(np.bincount(group) * int(rng.integers(2, 6)) // 7, 1)


def selections(n, group, budget):
    """All that meet the budget, float64 (R, n)."""
    every = np.array(list(itertools.product([0.0, 1.0], repeat=n)))
    sums = np.stack([every[:, group == a].sum(1) for a in range(budget.size)], axis=1)
    return every[(sums == budget).all(1)]


def least_value(Q, c, group, budget):
    """By enumeration."""
    every = selections(c.size, group, budget)
    return float((0.5 * np.einsum("ri,ij,rj->r", every, Q, every) + every @ c).min())


def bound_at(Q, c, group, budget, shift, x):
    """The bound that the check gives at x with the multipliers of a shift."""
    part = SelectionPart(np.arange(c.size), Q, c, group, budget)
    products = (shift.first.astype(int), shift.second.astype(int), shift.price) if shift.price.size else None
    frame = part.frame(part.state, shift.diagonal, budget, products)
    base, price = frame.prices(x[None], part.state[None])
    return float(least(base, price, part.state[None], group, budget)[0][0])


@pytest.mark.parametrize("seed", SEEDS)
def test_multipliers_are_valid(seed):
    Q, c, group, budget = problem(seed)
    starts = np.concatenate([[0], np.cumsum(np.bincount(group))]).astype(np.int64)
    truth = least_value(Q, c, group, budget)
    scale = max(abs(truth), 1e-3)
    found = best_shift(Q / scale, c / scale, starts, budget)
    assert found is not None
    assert (found.price > 0).all()
    assert (found.first > found.second).all()
    N = found.products()
    assert np.array_equal(N, N.T)
    assert inverse_on_complement(Q / scale - np.diag(found.diagonal) - N, starts) is not None
    rng = np.random.default_rng(seed)
    for x in (np.full(c.size, 0.5), *rng.random((5, c.size))):
        assert scale * bound_at(Q / scale, c / scale, group, budget, found, x) <= truth + 1e-9 * scale


def test_products_lift_the_bound():
    """Weights that cancel: with squares alone fractions of all of them do."""
    lifted = []
    for seed in SEEDS:
        G = np.random.default_rng(seed).normal(size=(9, 12))
        Q, c, group, budget = G.T @ G / 9, np.zeros(12), np.zeros(12, np.int64), np.array([5])
        dense = DenseSelection(Q / least_value(Q, c, group, budget), c, group, budget)
        bounds = []
        for with_products in (False, True):
            shift = best_shift(dense.Q, c, np.array([0, 12]), budget, with_products)
            assert (shift.price.size > 0) == with_products
            worker = SelectionWorker(dense, 0.0, 0.0, np.array([np.inf]))
            worker.load(Subproblem(-np.inf, np.full(12, -1, np.int8), None, shift))
            assert worker.run(1)
            bounds.append(worker.bound())
        assert bounds[1] <= 1 + 1e-9
        lifted.append(bounds[1] - bounds[0])
    assert np.mean(lifted) > 0.03
    assert min(lifted) > -0.02


@pytest.mark.parametrize("seed", SEEDS)
def test_bounds_of_nodes_below_a_shift(seed):
    """No node has a bound above the best selection below it, whatever is pruned above and by reduced costs."""
    Q, c, group, budget = problem(seed)
    every = selections(c.size, group, budget)
    values = 0.5 * np.einsum("ri,ij,rj->r", every, Q, every) + every @ c
    scale = max(abs(values.min()), 1e-3)
    dense = DenseSelection(Q / scale, c / scale, group, budget)
    first, second = (at.astype(np.int32) for at in np.tril_indices(c.size, -1))
    price = 0.3 * np.random.default_rng(seed).random(first.size)
    rows = np.bincount(first, price, c.size) + np.bincount(second, price, c.size)
    ordered = np.sort(values) / scale
    for shift, limit in itertools.product(
        (best_shift(dense.Q, dense.c, dense.starts, budget), Shift(-rows, first, second, price)),
        (1e3, ordered[values.size // 2], ordered[values.size // 20]),
    ):
        worker = SelectionWorker(dense, 0.0, 0.0, np.array([limit]))
        worker.load(Subproblem(-np.inf, np.full(c.size, -1, np.int8), None, shift))
        more = True
        while more:
            worker.best[0] = np.inf  # so that nodes are closed by `limit` only
            more = worker.run(1)
            view = worker.snapshot()
            for i in range(view.top + 1):
                y = view.decisions(i, view.entry(i).level)
                below = values[((y < 0) | (every == y)).all(1)] / scale
                assert below.min(initial=limit) >= min(view.bounds[i], limit) - 1e-9


@pytest.mark.parametrize("seed", SEEDS)
def test_trees_with_shifts_everywhere(seed, monkeypatch):
    """The optimum is found, and no bound on the way lies above it."""
    monkeypatch.setattr(best_first, "HARD", 0)
    monkeypatch.setattr(best_first, "SHIFT_SIZE", 4)
    monkeypatch.setattr(best_first.Patience, "before_shift", lambda self, cost: 1)
    monkeypatch.setattr(best_first.Patience, "of_dive", lambda self, cost: 3)
    monkeypatch.setattr(best_first.Patience, "is_better", lambda self, gain, gap: True)
    Q, c, group, budget = problem(seed)
    truth = least_value(Q, c, group, budget)
    tree = prepare_selection(Q, c, group, budget, [], roundings=0)
    # A bad incumbent, so that nodes stay open.
    tree.queue._shared[0] = tree.queue.value + 2.0 + abs(tree.queue.value)
    bounds = []
    tree.queue.run(lambda: bounds.append(tree.bound()) or False, 1, 1)
    assert tree.queue.finished()
    assert tree.queue.value * tree.scale == pytest.approx(truth, rel=2e-6, abs=1e-9)
    assert max(bounds) <= truth + 1e-9 * abs(truth) + 1e-12
