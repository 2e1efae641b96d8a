"""The relaxation: its bound never exceeds the optimum, and it says what it found."""

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from cbs_opt import (
    Budget,
    GradientFactor,
    HessianBlocks,
    Instance,
    Status,
    Stop,
    UsageError,
    read_instance,
    selection_loss,
    solve,
)
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.selection.relaxation import Relaxation
from cbs_opt.testing import make_problem

KINDS = ("hessian", "inverse_hessian", "gradients")
SHAPES = (
    {"n": 10},
    {"n": 10, "blocks": 3},
    {"n": 10, "groups": "rows"},
    {"n": 12, "groups": "2:4"},
    {"n": 10, "linear": True},
    {"n": 10, "fixed": True, "linear": True, "blocks": 2},
    {"n": 10, "budget": 9, "weights": [1e-5, 1, -1, 3, 1e3, -2, 0, 0, 1, -1]},
)


@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    shape=st.sampled_from(SHAPES),
    spread=st.sampled_from((0.0, 0.5, 1.0, 5.0)),
)
def test_the_bound_of_any_point_is_below_the_optimum(problem, seed, kind, shape, spread):
    made = problem(seed, kind=kind, **shape)
    reduced = SelectionProblem(made.instance)
    x = np.clip(0.5 + spread * np.random.default_rng(seed).standard_normal(reduced.n), 0, 1)
    assert reduced.certified_bound(x) <= made.optimum("selection")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bound_of_a_binary_optimum_of_a_convex_objective_is_close(problem, kind, shape):
    """With a nearly diagonal H the relaxation is tight, so that the bound proves the optimum."""
    made = problem(5, kind="hessian", **shape)
    n = made.instance.n
    diagonal = HessianBlocks.from_blocks([np.diag(np.arange(1.0, n + 1))])
    instance = Instance(made.w, diagonal, made.instance.budget, made.instance.linear, made.instance.fixed)
    result = solve(instance, "relax")
    assert result.status in (Status.OPTIMAL, Status.CONVERGED)
    assert result.bound <= result.objective + 1e-12 * abs(result.objective)
    assert result.objective == pytest.approx(solve(instance, "brute", objective="selection").objective, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bound_rounding_and_extras(problem, kind, shape):
    made = problem(7, kind=kind, **shape)
    result = solve(made.instance, "relax")
    optimum, rounding = made.optimum("selection"), 1e-9 * made.scale()
    assert result.status in (Status.OPTIMAL, Status.CONVERGED)
    assert result.bound <= optimum <= result.objective + rounding
    extras = result.extras
    assert 0 <= extras["fractional"] <= made.instance.n
    assert extras["steps"] >= 0
    # The relaxed minimum lies below the optimum, and was solved to a small tolerance: the bound lies below it by
    # no more, and above it where it counts a damping. Newton steps keep the group sums to 1e-4 only where Q_ii
    # spans 16 orders of magnitude.
    slack = rounding + (1e-3 if "weights" in shape else 1e-6) * abs(optimum)
    assert extras["relaxed_objective"] <= optimum + slack
    assert kind == "gradients" or result.bound - slack <= extras["relaxed_objective"]
    assert extras["relaxed_objective"] - result.bound <= 1e-4 * abs(extras["relaxed_objective"]) + slack
    assert result.objective <= extras["rounding"] + rounding
    if result.status is Status.OPTIMAL:
        assert result.objective == pytest.approx(optimum, rel=1e-6, abs=rounding)


def test_the_relaxation_is_solved_to_its_minimum(problem):
    """Against a general solver of scipy; the bound may count the damping exactly, as y² = y."""
    made = problem(11, n=12, kind="gradients", m=5, budget=7)

    def minimum(H, linear):
        Q = made.w[:, None] * H * made.w
        found = minimize(
            lambda x: 0.5 * x @ Q @ x + linear @ x,
            np.full(12, 7 / 12),
            jac=lambda x: Q @ x + linear,
            method="SLSQP",
            bounds=[(0, 1)] * 12,
            constraints={"type": "eq", "fun": lambda x: x.sum() - 7, "jac": lambda x: np.ones(12)},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert found.success
        return found.fun

    damping = made.instance.curvature.damping
    plain = minimum(made.H, np.zeros(12))
    exact = minimum(made.H - damping * np.eye(12), 0.5 * damping * made.w**2)
    assert plain < exact < made.optimum("selection")
    result = solve(made.instance, "relax", parameters={"tolerance": 1e-9})
    assert result.extras["relaxed_objective"] == pytest.approx(plain, rel=1e-5)
    assert plain * (1 - 1e-4) <= result.bound <= exact * (1 + 1e-9)


@pytest.mark.parametrize("asked", [0, 1, 2, 3, 5, 9])
@pytest.mark.parametrize("solver", ["relax", "search"])
def test_an_interrupted_run_has_a_feasible_selection_and_a_valid_bound(problem, solver, asked):
    made = problem(13, n=14, kind="gradients", m=6, budget=8)
    counter = itertools.count()
    result = solve(made.instance, solver, stop=Stop(should_stop=lambda: next(counter) >= asked))
    assert result.status in (Status.INTERRUPTED, Status.OPTIMAL, Status.CONVERGED)
    assert made.instance.admits(result.pruned)
    assert result.objective == pytest.approx(made.selection_loss(result.pruned), rel=1e-9)
    if result.bound is not None:
        assert result.bound <= made.optimum("selection")


@pytest.mark.parametrize("stop", [Stop(time_limit=0.0), Stop(max_iterations=0), Stop(max_iterations=1)])
@pytest.mark.parametrize("solver", ["relax", "search"])
def test_limits_of_nothing_give_a_selection(problem, solver, stop):
    made = problem(3, n=12, kind="inverse_hessian", budget=6)
    result = solve(made.instance, solver, stop=stop)
    assert made.instance.admits(result.pruned)
    assert result.bound is None or result.bound <= made.optimum("selection")


def test_bounds_in_the_history_rise_and_stay_valid():
    rng = np.random.default_rng(2)
    G = rng.standard_normal((40, 300)) * rng.lognormal(0, 1.0, 300)
    instance = Instance(rng.standard_normal(300), GradientFactor(G, 0.0), 240)
    best = solve(instance, "search", stop=Stop(max_iterations=30)).objective
    bounds = [row.bound for row in solve(instance, "relax").history if row.bound is not None]
    assert bounds == sorted(bounds)
    assert bounds[-1] <= best
    assert bounds[-1] >= 0.5 * best or bounds[-1] > 0


@pytest.mark.parametrize(
    ("parameters", "word"), [({"tolerance": 0.0}, "tolerance"), ({"working_set": 1}, "working_set")]
)
def test_parameters_are_checked(problem, parameters, word):
    with pytest.raises(UsageError, match=word):
        solve(problem(0).instance, "relax", parameters=parameters)


@pytest.mark.parametrize("case", ["all zero", "one weight", "nothing", "everything", "dead", "empty group"])
def test_degenerate_instances(case):
    G = np.random.default_rng(0).standard_normal((3, 6))
    w, budget = np.arange(1.0, 7.0), Budget(3)
    if case == "all zero":
        G = np.zeros((3, 6))
    elif case == "one weight":
        G, w, budget = G[:, :1], w[:1], Budget(1)
    elif case == "nothing":
        budget = Budget(0)
    elif case == "everything":
        budget = Budget(6)
    elif case == "dead":
        G[:, 2:5] = 0.0
    elif case == "empty group":
        budget = Budget(2, np.array([0, 0, 2, 2, 2, 2]), np.array([2, 0, 0]))
    instance = Instance(w, GradientFactor(G, 0.0), budget)
    oracle = solve(instance, "brute", objective="selection").objective
    for solver in ("relax", "search"):
        result = solve(instance, solver)
        assert instance.admits(result.pruned)
        assert result.bound <= oracle + 1e-12
        assert result.objective == selection_loss(instance, result.pruned)
    assert result.objective == pytest.approx(oracle, abs=1e-12)


def test_it_ends_where_rounding_hides_what_is_left():
    """Scales so far apart that no round changes anything, although optimality seems violated."""
    instance = read_instance(Path(__file__).with_name("relax-without-end.npz"))
    started = time.process_time()
    result = solve(instance, "relax", stop=Stop(should_stop=lambda: time.process_time() > started + 30))
    assert result.status is Status.CONVERGED
    assert result.bound <= result.objective


def test_it_ends_where_rounds_go_in_circles(monkeypatch):
    """As many rounds as were asked for, again and again, without a better point or bound."""
    monkeypatch.setattr(Relaxation, "solve", lambda self, **given: given["rounds"])
    made = make_problem(1, n=9, kind="gradients")
    assert solve(made.instance, "relax").iterations <= 100
