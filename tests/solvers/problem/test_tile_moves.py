"""Exchanges of four weights on blocks of any form: exact prices, and descent to the optimum of small problems."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cbs_opt import Stop, evaluate, solve
from cbs_opt.solvers.joint.tile_exchange import JointTiles
from cbs_opt.solvers.problem import tile_moves
from cbs_opt.solvers.selection.tile_exchange import SelectionTiles
from cbs_opt.testing.problems import CASES, make_problem

KINDS = {"joint": ("joint", JointTiles), "selection": ("search", SelectionTiles)}
TILES = [name for name in CASES if "tiles" in name]


@pytest.mark.parametrize("objective", KINDS)
@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("seed", range(3))
def test_prices_are_exact(name, seed, objective):
    problem = make_problem(seed, **CASES[name])
    instance = problem.instance
    pruned = instance.budget.cheapest(np.random.default_rng(seed).random(instance.n), instance.fixed)
    state = KINDS[objective][1](instance)
    state.start_from(pruned)
    for _ in range(3):
        four = state.possible()
        assert four.size
        before = problem.loss(objective, state.pruned)
        for weights, price in zip(four, state.prices(four), strict=True):
            other = state.pruned.copy()
            other[weights] = ~other[weights]
            assert instance.admits(other)
            assert not state.pruned[weights[:2]].any() and state.pruned[weights[2:]].all()
            exact = 2 * (problem.loss(objective, other) - before)
            assert price == pytest.approx(exact, abs=1e-7 * problem.scale())
        state.make(four[-1])


@pytest.mark.parametrize("objective", KINDS)
@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("seed", range(3))
def test_small_problems_are_solved(name, seed, objective):
    problem = make_problem(seed, **CASES[name])
    result = solve(problem.instance, KINDS[objective][0], objective=objective, seed=seed)
    optimum = problem.optimum(objective)
    assert result.objective == pytest.approx(optimum, abs=1e-8 * problem.scale())
    assert result.bound is not None and result.bound <= optimum + 1e-9 * problem.scale()


@pytest.mark.parametrize("objective", KINDS)
def test_too_large_blocks_are_scored(objective, monkeypatch, caplog):
    monkeypatch.setattr(tile_moves, "_MOST_EXCHANGES", 1)
    problem = make_problem(1, **CASES["tiles, blocks"])
    instance = problem.instance
    with caplog.at_level("WARNING"):
        result = solve(instance, KINDS[objective][0], objective=objective)
    assert "the best of several scores is the answer" in caplog.text
    scores = ["magnitude", "obs" if objective == "joint" else "obd"]
    best = min(solve(instance, name, objective=objective).objective for name in scores)
    assert result.objective == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("objective", KINDS)
def test_iterations_are_exchanges(objective):
    problem = make_problem(0, **CASES["tiles, blocks"])
    for limit in (0, 1, 2):
        result = solve(problem.instance, KINDS[objective][0], objective=objective, stop=Stop(max_iterations=limit))
        assert result.iterations == limit and problem.instance.admits(result.pruned)


@pytest.mark.parametrize("objective", KINDS)
def test_a_limit_leaves_room_for_a_bound(objective):
    """The search would go on up to the limit; the bound comes before."""
    problem = make_problem(0, **CASES["tiles, blocks"])
    instance = replace(problem.instance, linear=None)
    result = solve(instance, KINDS[objective][0], objective=objective, stop=Stop(max_iterations=300), threads=1)
    assert result.bound is not None and 0 < result.bound <= result.objective


def test_exchanges_in_several_blocks_are_made_together():
    """One pass of a descent changes every pair of rows; the loss is that of the evaluator all the same."""
    problem = make_problem(3, **CASES["tiles of shared rows"])
    instance = problem.instance
    worst = instance.budget.cheapest(-np.abs(instance.weights))
    for objective, (solver, _) in KINDS.items():
        result = solve(instance, solver, objective=objective, warm_start=worst, seed=1)
        losses = evaluate(instance, result.pruned)
        assert result.objective in (losses.joint_loss, losses.selection_loss)
        assert result.objective == pytest.approx(problem.optimum(objective), rel=1e-9)
