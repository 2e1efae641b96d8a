"""The contract that every solver passes, with `brute` as the oracle."""

from __future__ import annotations

import contextlib
import time

import numpy as np
import pytest

import cbs_opt
from cbs_opt import CbsError, Instance, SolverError, Status, Stop, evaluate, solver_names
from cbs_opt.solver import OBJECTIVES

CASES = {
    "hessian": {"kind": "hessian"},
    "inverse hessian": {"kind": "inverse_hessian"},
    "gradients": {"kind": "gradients"},
    "few gradients": {"kind": "gradients", "m": 3, "n": 10},
    "float32 gradients": {"kind": "gradients", "dtype": np.float32},
    "hessian, blocks": {"kind": "hessian", "blocks": 3, "n": 10},
    "inverse hessian, blocks": {"kind": "inverse_hessian", "blocks": 4, "n": 11},
    "gradients, blocks": {"kind": "gradients", "blocks": 3, "n": 10, "m": 4},
    "layers": {"kind": "hessian", "blocks": 2, "groups": "layers", "n": 10},
    "rows": {"kind": "gradients", "groups": "rows", "n": 10},
    "2:4": {"kind": "inverse_hessian", "groups": "2:4", "n": 12},
    "shared hessian": {"kind": "hessian", "shared": (0, 0, 0), "n": 9},
    "shared inverse hessians": {"kind": "inverse_hessian", "shared": (1, 0, 1, 0), "n": 12},
    "shared gradients": {"kind": "gradients", "shared": (0, 0), "n": 10, "m": 3},
    "shared, everything": {
        "kind": "hessian",
        "shared": (0, 1, 0),
        "n": 9,
        "groups": "layers",
        "linear": True,
        "fixed": True,
    },
    "linear": {"kind": "gradients", "linear": True},
    "linear, blocks": {"kind": "inverse_hessian", "linear": True, "blocks": 3},
    "fixed": {"kind": "hessian", "fixed": True},
    "fixed, 2:4": {"kind": "gradients", "fixed": True, "groups": "2:4"},
    "everything": {
        "kind": "inverse_hessian",
        "blocks": 3,
        "groups": "layers",
        "linear": True,
        "fixed": True,
        "n": 10,
    },
    "nothing to prune": {"kind": "gradients", "budget": 0},
    "nothing to prune, linear": {"kind": "hessian", "budget": 0, "linear": True},
    "everything to prune": {"kind": "inverse_hessian", "budget": 8, "blocks": 2},
    "everything to prune, linear": {"kind": "gradients", "budget": 8, "linear": True},
    "one weight, kept": {"kind": "hessian", "n": 1, "budget": 0},
    "one weight, pruned": {"kind": "inverse_hessian", "n": 1, "budget": 1},
    "blocks of one": {"kind": "gradients", "n": 6, "blocks": 6},
    "zero weights": {"kind": "gradients", "weights": [0, 0, 0, 1, -2, 0.5, 0, 0]},
    "all weights zero": {"kind": "hessian", "weights": [0.0] * 8},
    "zero gradients": {"kind": "gradients", "zero_columns": (1, 2, 6)},
    "ties": {"kind": "hessian", "weights": [1, -1, 1, -1, 1, -1, 1, -1], "zero_columns": range(8)},
    "badly scaled": {"kind": "gradients", "weights": [1e-6, 1e6, -1, 1e3, -1e-3, 1, 1e-6, -2]},
}
_SWEPT = {"large": 0, "proof": 0, "patience": 20, "dense_bytes": 0, "threaded_gradients": 0}
VARIANTS = {
    "search, swept": ("search", _SWEPT),
    "search, block by block": ("search", _SWEPT | {"many_blocks": 0, "small_block": 0, "double_bytes": 0}),
}
"""Solvers with parameters that send small problems the way of large ones, by a name for the tests."""

REFUSED = {
    "groups": lambda instance: instance.budget.groups is not None,
    "several_blocks": lambda instance: instance.curvature.number_of_blocks > 1,
    "linear": lambda instance: instance.linear is not None,
    "fixed": lambda instance: instance.fixed is not None,
}


def solve(instance, name, **options):
    """`cbs_opt.solve`, with the parameters of a variant."""
    solver, parameters = VARIANTS.get(name, (name, None))
    return cbs_opt.solve(instance, solver, parameters=parameters, **options)


def get_solver(name):
    """`cbs_opt.get_solver`, also by the name of a variant."""
    return cbs_opt.get_solver(VARIANTS.get(name, (name,))[0])


def available(name):
    try:
        return get_solver(name)
    except SolverError:
        return None


def pairs(**wanted):
    """Solver and objective, for each that it minimises and where it `supports` what is wanted."""
    out = []
    for name in (*solver_names(), *VARIANTS):
        solver = available(name)
        if solver is None:
            mark = pytest.mark.skip(reason=f"NOT TESTED: solver '{name}' is not available here")
            out.append(pytest.param(name, "selection", marks=mark, id=name))
            continue
        if all(getattr(solver.supports, key) == value for key, value in wanted.items()):
            out += [pytest.param(name, kind, id=f"{name}-{kind}") for kind in sorted(solver.supports.objectives)]
    return pytest.mark.parametrize(("name", "objective"), out)


_compiled = set()


@pytest.fixture(autouse=True)
def compiled(request, problem):
    """Imports and compilation, once for each solver and objective, before any test looks at a clock."""
    values = getattr(request.node, "callspec", None)
    pair = values and (values.params.get("name"), values.params.get("objective"))
    if pair and all(pair) and pair not in _compiled and available(pair[0]) is not None:
        _compiled.add(pair)
        for case in ("hessian", "gradients, blocks"):
            with contextlib.suppress(CbsError):
                solve(problem(0, **CASES[case]).instance, pair[0], objective=pair[1], stop=Stop(max_iterations=50))


def own_end():
    """No rule to stop, as a solver must come to its own end; only a test that hangs is ended, and then fails."""
    deadline = time.monotonic() + 15
    return Stop(should_stop=lambda: time.monotonic() > deadline)


def claims(name, objective, instance):
    supports = get_solver(name).supports
    return objective in supports.objectives and all(
        getattr(supports, what) or not applies(instance) for what, applies in REFUSED.items()
    )


def assert_one_sentence(error):
    text = str(error)
    assert text
    assert "\n" not in text
    assert "Traceback" not in text


def assert_feasible(problem, pruned):
    assert pruned.dtype == np.bool_
    assert any(np.array_equal(pruned, allowed) for allowed in problem.selections())


@pairs()
@pytest.mark.parametrize("case", CASES)
def test_result_against_enumeration(name, objective, case, problem):
    given = problem(17, **CASES[case])
    instance = given.instance
    if not claims(name, objective, instance):
        with pytest.raises(SolverError) as refusal:
            solve(instance, name, objective=objective)
        assert_one_sentence(refusal.value)
        assert name in str(refusal.value)
        return
    rounding = 1e-9 * given.scale() + 1e-300

    result = solve(instance, name, objective=objective, seed=3, stop=own_end())

    assert_feasible(given, result.pruned)
    assert result.selection_loss == pytest.approx(given.selection_loss(result.pruned), rel=1e-9, abs=rounding)
    assert result.joint_loss == pytest.approx(given.joint_loss(result.pruned), rel=1e-6, abs=rounding)
    assert result.objective == (result.selection_loss if objective == "selection" else result.joint_loss)
    losses = evaluate(instance, result.pruned)
    assert (result.selection_loss, result.joint_loss) == (losses.selection_loss, losses.joint_loss)
    optimum = given.optimum(objective)
    assert result.objective >= optimum - rounding
    oracle = solve(instance, "brute", objective=objective)
    assert oracle.objective == pytest.approx(optimum, rel=1e-7, abs=rounding)
    if result.bound is not None:
        assert get_solver(name).supports.bound
        assert result.bound <= optimum + rounding
    if result.status is Status.OPTIMAL:
        assert result.objective == pytest.approx(optimum, rel=1e-6, abs=rounding)
        assert result.bound is not None
    assert isinstance(result.status, Status)
    assert result.status not in (Status.ERROR, Status.INFEASIBLE, Status.INTERRUPTED)
    assert (result.weights is not None) == (objective == "joint")
    if result.weights is not None:
        assert (result.weights[result.pruned] == 0).all()
    assert (result.solver, result.objective_kind, result.seed) == (get_solver(name).name, objective, 3)
    assert result.solve_seconds >= 0
    objectives = [row.objective for row in result.history if row.objective is not None]
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[-1] == pytest.approx(result.objective, rel=1e-6, abs=rounding)
    bounds = [row.bound for row in result.history if row.bound is not None]
    assert bounds == sorted(bounds)


@pairs()
@pytest.mark.parametrize("seed", range(5))
def test_many_random_instances(name, objective, seed, problem):
    rng = np.random.default_rng(seed)
    for trial in range(4):
        n = int(rng.integers(2, 10))
        given = problem(
            100 * seed + trial,
            n=n,
            kind=("hessian", "inverse_hessian", "gradients")[trial % 3],
            budget=int(rng.integers(0, n + 1)),
        )
        if not claims(name, objective, given.instance):
            continue
        result = solve(given.instance, name, objective=objective, seed=seed, stop=own_end())
        optimum = given.optimum(objective)
        rounding = 1e-9 * given.scale()
        assert_feasible(given, result.pruned)
        assert result.status is not Status.INTERRUPTED
        assert result.objective >= optimum - rounding
        if result.bound is not None:
            assert result.bound <= optimum + rounding


@pytest.mark.parametrize("name", [name for name in solver_names() if available(name)])
def test_refuses_what_it_does_not_claim(name, problem):
    supports = get_solver(name).supports
    given = problem(1).instance
    refused = [
        (not supports.warm_start, {"warm_start": evaluate_start(given)}),
        (not supports.batched, {"batch_size": 4}),
        (not supports.batched, {"device": "cuda"}),
    ]
    refused += [(kind not in supports.objectives, {"objective": kind}) for kind in OBJECTIVES]
    for applies, options in refused:
        if applies:
            with pytest.raises(SolverError, match=f"'{name}'") as refusal:
                solve(given, name, **options)
            assert_one_sentence(refusal.value)


def evaluate_start(instance: Instance):
    """A feasible selection that is not magnitude's: the largest weights."""
    return instance.budget.cheapest(-np.abs(instance.weights), instance.fixed)


@pairs()
@pytest.mark.parametrize("case", ["gradients", "hessian, blocks", "everything"])
def test_same_seed_same_history(name, objective, case, problem):
    given = problem(5, **CASES[case]).instance
    if not claims(name, objective, given):
        pytest.skip("not claimed")
    runs = [solve(given, name, objective=objective, seed=11, stop=Stop(max_iterations=20)) for _ in range(2)]
    first, second = ([row[1:] for row in run.history] for run in runs)
    assert first == second
    assert first
    assert np.array_equal(runs[0].pruned, runs[1].pruned)
    assert runs[0].iterations == runs[1].iterations
    assert runs[0].status == runs[1].status


@pairs()
@pytest.mark.parametrize("case", ["gradients", "everything", "2:4"])
@pytest.mark.parametrize(
    "stop",
    [
        Stop(time_limit=0),
        Stop(max_iterations=0),
        Stop(should_stop=lambda: True),
        Stop(target=1e30),
        Stop(no_improvement=0),
    ],
    ids=["time limit", "iteration limit", "interrupt", "target", "no improvement"],
)
def test_stopped_from_the_start_still_feasible(name, objective, case, stop, problem):
    given = problem(6, **CASES[case])
    if not claims(name, objective, given.instance):
        pytest.skip("not claimed")
    result = solve(given.instance, name, objective=objective, stop=stop)
    assert_feasible(given, result.pruned)
    assert result.status not in (Status.ERROR, Status.INFEASIBLE)
    assert result.objective == pytest.approx(given.loss(objective, result.pruned), rel=1e-6)
    if result.status is Status.OPTIMAL:
        assert result.objective == pytest.approx(given.optimum(objective), rel=1e-6)


@pairs(warm_start=True)
@pytest.mark.parametrize("limits", [{}, {"time_limit": 0}, {"max_iterations": 1}], ids=str)
@pytest.mark.parametrize("case", ["gradients", "everything", "inverse hessian, blocks"])
def test_warm_start_is_never_worsened(name, objective, case, limits, problem):
    given = problem(8, **CASES[case])
    if not claims(name, objective, given.instance):
        pytest.skip("not claimed")
    best = min(given.selections(), key=lambda pruned: given.loss(objective, pruned))
    for start in (best, evaluate_start(given.instance)):
        stop = Stop(**limits) if limits else own_end()
        result = solve(given.instance, name, objective=objective, warm_start=start, stop=stop)
        assert result.objective <= given.loss(objective, start) + 1e-9 * given.scale()


@pairs()
def test_time_limit_is_kept(name, objective, problem):
    given = problem(9, n=22, kind="hessian").instance
    if not claims(name, objective, given):
        pytest.skip("not claimed")
    solve(problem(9).instance, name, objective=objective)  # imports and compilation
    started = time.perf_counter()
    solve(given, name, objective=objective, stop=Stop(time_limit=0.2))
    assert time.perf_counter() - started < 5


@pairs()
def test_singular_hessian_gives_a_result_or_a_sentence(name, objective, problem):
    given = problem(10, n=8, m=2, damping=0.0, kind="gradients")
    if not claims(name, objective, given.instance):
        pytest.skip("not claimed")
    try:
        result = solve(given.instance, name, objective=objective, stop=own_end())
    except CbsError as refusal:
        assert_one_sentence(refusal)
        assert "singular" in str(refusal)
        return
    assert_feasible(given, result.pruned)
    assert result.selection_loss == pytest.approx(given.selection_loss(result.pruned))
    K = ~result.pruned
    move = result.weights - given.w if result.weights is not None else None
    if move is not None:
        assert (given.H @ move)[K] == pytest.approx(0, abs=1e-8)
        assert result.joint_loss == pytest.approx(0.5 * move @ given.H @ move, abs=1e-12)


@pairs()
def test_parameters_are_reported_and_json(name, objective, problem):
    import json

    given = problem(2).instance
    if not claims(name, objective, given):
        pytest.skip("not claimed")
    result = solve(given, name, objective=objective, stop=own_end())
    json.dumps([dict(result.parameters), dict(result.environment), dict(result.extras)], allow_nan=False)


@pytest.mark.parametrize("name", [name for name in solver_names() if available(name)])
def test_solver_says_what_it_is(name):
    solver = get_solver(name)
    assert solver.name == name
    assert solver.summary
    assert "\n" not in solver.summary
    assert solver.supports.objectives
    assert solver.supports.objectives <= set(OBJECTIVES)
