"""No swap is overlooked, whatever blocks and groups there are; the search converges at such points only."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbs_opt import selection_loss, solve
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.selection import swaps
from cbs_opt.solvers.selection.incumbent import GAIN, Incumbent
from cbs_opt.testing import make_problem

SHAPES = {
    "one block": {"n": 30},
    "blocks": {"n": 36, "blocks": 4},
    "layers": {"n": 30, "blocks": 3, "groups": "layers"},
    "2:4": {"n": 32, "groups": "2:4", "blocks": 2},
    "rows": {"n": 30, "groups": "rows"},
    "linear": {"n": 24, "linear": True, "blocks": 2},
    "everything": {"n": 30, "fixed": True, "linear": True, "groups": "layers", "blocks": 3},
}


def best_change(instance, pruned):
    """The best change of the loss by a feasible swap, one after the other."""
    before, best = selection_loss(instance, pruned), 0.0
    for i in np.flatnonzero(pruned):
        for j in np.flatnonzero(~pruned):
            other = pruned.copy()
            other[i], other[j] = False, True
            if instance.admits(other):
                best = min(best, selection_loss(instance, other) - before)
    return best


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(SHAPES)), st.sampled_from([1, 7, swaps.PAIRS]))
def test_no_swap_gains_afterwards(seed, shape, pairs):
    made = make_problem(seed, kind="gradients", **SHAPES[shape])
    problem = SelectionProblem(made.instance)
    rng = np.random.default_rng(seed)
    point = Incumbent(problem, problem.smallest(rng.standard_normal(problem.n)))
    before = point.f
    made_swaps = swaps.improve_by_all_swaps(point, lambda: False, pairs)
    assert point.f <= before
    assert (made_swaps > 0) == (point.f < before)
    pruned = problem.expand(point.y)
    assert made.instance.admits(pruned)
    loss = selection_loss(made.instance, pruned)
    assert best_change(made.instance, pruned) >= -2 * GAIN * abs(loss) - 1e-12 * made.scale()


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_it_sees_what_candidates_hide(shape, monkeypatch):
    """With candidates switched off, every swap is found by the pass over all pairs."""
    monkeypatch.setattr(swaps, "candidate_swaps", lambda point, should_stop: 0)
    made = make_problem(5, kind="hessian", **SHAPES[shape])
    problem = SelectionProblem(made.instance)
    point = Incumbent(problem, problem.smallest(np.arange(problem.n, dtype=float)))
    swaps.improve_by_all_swaps(point, lambda: False)
    assert best_change(made.instance, problem.expand(point.y)) >= -1e-9 * made.scale()


def test_the_search_converges_where_no_swap_gains(monkeypatch):
    """The candidates are made blind: what they miss is found before the search says that it has converged."""
    monkeypatch.setattr("cbs_opt.solvers.selection.search.candidate_swaps", lambda *_, **__: 0)
    made = make_problem(2, n=60, kind="gradients")
    parameters = {"proof": 0, "patience": 1, "cycles": 1, "core": 8, "stall": 1}
    result = solve(made.instance, "search", parameters=parameters)
    assert result.status == "converged"
    assert best_change(made.instance, result.pruned) >= -1e-9 * made.scale()


def test_a_stop_is_kept():
    made = make_problem(1, n=60, kind="gradients")
    problem = SelectionProblem(made.instance)
    point = Incumbent(problem, problem.smallest(np.arange(problem.n, dtype=float)))
    assert swaps.improve_by_all_swaps(point, lambda: True) == 0


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from(["gradients", "hessian", "inverse_hessian"]),
    st.sampled_from(["search", "cbs"]),
)
def test_no_result_has_a_swap_that_gains(seed, shape, kind, solver):
    made = make_problem(seed, kind=kind, **SHAPES[shape])
    parameters = {"proof": 0, "patience": 3, "cycles": 1} if solver == "search" else {"draws": 3, "starts": 1}
    result = solve(made.instance, solver, seed=seed, parameters=parameters)
    assert result.status in ("converged", "optimal")
    limit = -2 * GAIN * abs(result.objective) - 1e-12 * made.scale()
    assert best_change(made.instance, result.pruned) >= limit


def test_the_windows_of_the_paper_leave_swaps_that_gain():
    """What `cbs` does beyond them has an effect."""
    parameters = {"draws": 1, "starts": 1, "rho": 1, "tau": 0}
    better = 0
    for seed in range(8):
        made = make_problem(seed, n=40, kind="gradients", m=20)
        published = solve(made.instance, "cbs", parameters=parameters | {"epsilon_relative": 1e-6})
        result = solve(made.instance, "cbs", parameters=parameters)
        assert result.objective <= published.objective
        better += result.objective < published.objective
    assert better
