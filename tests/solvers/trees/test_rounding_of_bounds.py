"""What the exact engine reports: thresholds, margins and joined tables on the safe side."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from cbs_opt import Monitor
from cbs_opt.solvers.trees.best_first import BestFirst, Subproblem
from cbs_opt.solvers.trees.block_search import BlockSearch, combine, multiplier
from cbs_opt.solvers.trees.prove import Report


@pytest.mark.parametrize("value", [1.0, -1.0, 0.0, 0.3])
def test_the_threshold_lies_below_the_incumbent(value):
    """By tolerance and rounding, for losses of either sign; a finished tree proves that, not the value."""
    root = Subproblem(-np.inf, np.full(2, -1, np.int8), None, None)
    queue = BestFirst(lambda *_: None, root, np.zeros(2, np.int8), value, 1e-3, 1e-5)
    assert queue.threshold == pytest.approx(value - 1e-3 * abs(value) - 1e-5, rel=1e-12)
    assert queue.bound() == -np.inf
    queue._heap.clear()
    assert queue.bound() == queue.threshold < value
    queue._push(root._replace(bound=value + 1))
    assert queue.bound() == queue.threshold


def test_reported_bounds_are_lowered_by_rounding():
    problem = SimpleNamespace(loss=lambda pruned: 10.0, rounding=lambda pruned: 0.25, nonnegative=True)
    monitor = Monitor()
    report = Report(problem, monitor)
    report.bound(-3.0)
    assert monitor.bound == 0.0
    report.selection(np.array([True, False]))
    report.bound(4.0)
    assert monitor.bound == 3.75
    report.bound(10.5)
    assert monitor.bound == 10.0
    problem.nonnegative = False
    monitor = Monitor()
    report = Report(problem, monitor)
    report.selection(np.array([True, False]))
    report.bound(-3.0)
    assert monitor.bound == -3.25


def best_sum(tables, budget):
    picks = itertools.product(*(range(F.size) for F in tables))
    return min(sum(F[j] for F, j in zip(tables, pick, strict=True)) for pick in picks if sum(pick) == budget)


@pytest.mark.parametrize("seed", range(40))
def test_entries_within_the_slack_are_all_used(seed):
    """One entry may use up the whole gap between the Lagrangian bound and the value, not half of it."""
    rng = np.random.default_rng(seed)
    tables = [np.concatenate([[0.0], np.cumsum(rng.exponential(size=3))]) + rng.normal(size=4) for _ in range(3)]
    for budget in range(1, 9):
        best = best_sum(tables, budget)
        mu, lagrange = multiplier(tables, budget)
        assert lagrange <= best + 1e-12
        slack = (best - lagrange) * (1 + 1e-9) + 1e-12
        value, path = combine(tables, budget, mu, slack)
        assert value == pytest.approx(best, abs=1e-12)
        assert int(path.sum()) == budget


@pytest.mark.parametrize("seed", range(40))
def test_joined_tables(seed):
    """The value is the least sum of the upper ends; the bound never exceeds the least sum of the lower ends."""
    rng = np.random.default_rng(seed)
    upper = [np.cumsum(rng.exponential(size=4)) + rng.normal(size=4) for _ in range(3)]
    lower = [F - rng.exponential(0.3, size=4) * rng.integers(0, 2, 4) for F in upper]
    for budget in range(1, 9):
        search = BlockSearch([], budget, 1e-9)
        search.tables = [SimpleNamespace(upper=u, lower=low) for u, low in zip(upper, lower, strict=True)]
        search._join()
        assert search.value == pytest.approx(best_sum(upper, budget), abs=1e-12)
        assert search.bound <= best_sum(lower, budget) + 1e-12
        assert search.bound == pytest.approx(best_sum(lower, budget), abs=1e-12)
