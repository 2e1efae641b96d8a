"""`exact` against every selection: 1,080 problems, by family, form of the curvature and objective.

All have at most 16 weights. A quarter have groups, a third fixed weights, a third a linear term; half start from
the worst of all selections, and the heuristics that would improve it are taken away: the tree alone must find the
optimum. Half may not enumerate small blocks; a third are also stopped after a few nodes.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbs_opt import Status, Stop, from_regression, joint_loss, solve

EACH = 36
"""Problems of a family, a kind and an objective."""


def without_heuristics(patch, start):
    """Leave the trees of both objectives with the worst selection as their incumbent."""

    def largest(values, starts, budget):
        y = np.zeros(values.size, np.int8)
        for a, b in enumerate(budget):
            y[starts[a] + np.argsort(-values[starts[a] : starts[a + 1]], kind="stable")[:b]] = 1
        return y

    def improve(Q, c, group, y, seed):
        return y, float(0.5 * y @ Q @ y + c @ y)

    def eliminate(H, b, kept, group, target, stop):
        """The heaviest are pruned, where too many are kept."""
        for a, count in enumerate(target):
            at = np.flatnonzero((group == a) & (kept > 0))
            kept[at[np.argsort(np.abs(b[at]), kind="stable")[count:]]] = 0
        return True

    patch.setattr("cbs_opt.solvers.trees.selection_worker.take_smallest", largest)
    patch.setattr("cbs_opt.solvers.trees.selection_worker.improve", improve)
    patch.setattr("cbs_opt.solvers.trees.joint_worker.eliminate", eliminate)
    for kind in ("selection", "joint"):
        place = f"cbs_opt.solvers.problem.{kind}_problem.{kind.capitalize()}Problem.first"
        patch.setattr(place, lambda self: start.copy())


def compare(cases, seed, family, kind, objective, monkeypatch):
    """One comparison; whether optimality was claimed."""
    instance, every, values, sizes = cases.make(seed, family, kind, objective)
    best = int(np.argmin(values))
    optimum, slack = values[best], 1e-6 * abs(values[best]) + 1e-12 * sizes[best]
    where = f"seed {seed}, {family}, {objective}: {instance.describe()}"
    start = every[int(np.argmax(values))] if seed % 2 else None
    if start is not None:
        without_heuristics(monkeypatch, start)
    result = solve(instance, "exact", objective=objective, warm_start=start, threads=1)
    assert abs(result.objective - optimum) <= slack, where
    assert result.bound is not None, where
    assert result.bound <= optimum + 1e-9 * abs(optimum) + 1e-12 * sizes[best], where
    if seed % 3 == 0:
        stop = Stop(max_iterations=1 + seed % 7)
        result = solve(instance, "exact", objective=objective, warm_start=start, threads=1, stop=stop)
        assert instance.admits(result.pruned), where
        assert result.objective >= optimum - slack, where
        if result.bound is not None:
            assert result.bound <= optimum + 1e-9 * abs(optimum) + 1e-12 * sizes[best], where
    return result.status is Status.OPTIMAL


@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_against_every_selection(cases, family, objective, monkeypatch):
    proven = 0
    for kind in cases.kinds:
        for seed in range(EACH):
            with monkeypatch.context() as patch:
                patch.setattr("cbs_opt.solvers.trees.tables.MAX_WEIGHTS", 18 if seed % 4 < 2 else 2)
                proven += compare(cases, seed, family, kind, objective, patch)
    assert proven >= 0.8 * EACH * len(cases.kinds)


@given(st.integers(0, 10**6), st.integers(0, 4), st.integers(0, 2), st.booleans(), st.integers(1, 12))
def test_bounds_of_interrupted_runs(cases, seed, number, kind, joint, nodes):
    """However few nodes a run may take, the optimum lies between its bound and its objective."""
    objective = "joint" if joint else "selection"
    instance, _, values, sizes = cases.make(100 + seed, cases.families[number], cases.kinds[kind], objective)
    best = int(np.argmin(values))
    result = solve(instance, "exact", objective=objective, stop=Stop(max_iterations=nodes), threads=1)
    assert instance.admits(result.pruned)
    assert result.objective >= values[best] - 1e-9 * abs(values[best]) - 1e-12 * sizes[best]
    if result.bound is not None:
        assert result.bound <= values[best] + 1e-9 * abs(values[best]) + 1e-12 * sizes[best]


@pytest.mark.parametrize("seed", range(4))
def test_brute_proves_ill_conditioned_problems(seed):
    """Losses that rounding has put in the wrong order are evaluated anew: no bound lies above the value."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((12, 6)) + 1e5
    y = X @ rng.standard_normal(6) + rng.standard_normal(12)
    instance = from_regression(X, y, 1e-6, keep=4, intercept=False)
    result = solve(instance, "brute", objective="joint")
    assert result.status is Status.OPTIMAL and result.gap <= 1e-6
    selections = [np.isin(np.arange(6), pair) for pair in itertools.combinations(range(6), 2)]
    assert result.objective <= min(joint_loss(instance, pruned) for pruned in selections)
