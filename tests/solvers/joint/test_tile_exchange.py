"""Exchanges of four weights on blocks of any form: exact prices, and descent to the optimum of small problems."""

from __future__ import annotations

import numpy as np
import pytest

from cbs_opt import Stop, joint_loss, solve
from cbs_opt.solvers.joint import tile_exchange
from cbs_opt.solvers.joint.tile_exchange import TileExchange
from cbs_opt.testing.problems import CASES, make_problem

TILES = [name for name in CASES if "tiles" in name]


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("seed", range(3))
def test_prices_are_exact(name, seed):
    problem = make_problem(seed, **CASES[name])
    instance = problem.instance
    pruned = instance.budget.cheapest(np.random.default_rng(seed).random(instance.n), instance.fixed)
    state = TileExchange(instance)
    state.start_from(pruned)
    for _ in range(3):
        four = state.possible()
        assert four.size
        before = problem.joint_loss(state.pruned)
        for weights, price in zip(four, state.prices(four), strict=True):
            other = state.pruned.copy()
            other[weights] = ~other[weights]
            assert instance.admits(other)
            assert not state.pruned[weights[:2]].any() and state.pruned[weights[2:]].all()
            exact = 2 * (problem.joint_loss(other) - before)
            assert price == pytest.approx(exact, abs=1e-7 * problem.scale())
        state.make(four[-1])


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("seed", range(3))
def test_small_problems_are_solved(name, seed):
    problem = make_problem(seed, **CASES[name])
    result = solve(problem.instance, "joint", seed=seed)
    optimum = problem.optimum("joint")
    assert result.objective == pytest.approx(optimum, abs=1e-8 * problem.scale())
    assert result.bound is not None and result.bound <= optimum + 1e-9 * problem.scale()


def test_too_large_blocks_are_scored(monkeypatch, caplog):
    monkeypatch.setattr(tile_exchange, "_MOST_EXCHANGES", 1)
    problem = make_problem(1, **CASES["tiles, blocks"])
    instance = problem.instance
    with caplog.at_level("WARNING"):
        result = solve(instance, "joint")
    assert "the better of magnitude and OBS is the answer" in caplog.text
    scores = np.abs(instance.weights), instance.weights**2 / instance.curvature.inverse_diagonal()
    best = min(joint_loss(instance, instance.budget.cheapest(score)) for score in scores)
    assert result.objective == pytest.approx(best, rel=1e-12)


def test_iterations_are_exchanges():
    problem = make_problem(0, **CASES["tiles, blocks"])
    for limit in (0, 1, 2):
        result = solve(problem.instance, "joint", stop=Stop(max_iterations=limit))
        assert result.iterations == limit and problem.instance.admits(result.pruned)
