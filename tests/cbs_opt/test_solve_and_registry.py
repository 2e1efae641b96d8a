"""`solve`, the monitor and the registry, with solvers made for the purpose."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import numpy as np
import pytest

from cbs_opt import (
    Capabilities,
    Monitor,
    Solver,
    SolverError,
    Status,
    Stop,
    UsageError,
    get_solver,
    register,
    registry,
    selection_loss,
    solve,
    solver_names,
)
from cbs_opt.result import relative_gap
from cbs_opt.solver import Parameters, option


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """Solvers registered by a test are forgotten after it; the package's own are loaded before."""
    for name in solver_names():
        with suppress(SolverError):
            get_solver(name)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def magnitude(instance):
    return instance.budget.cheapest(np.abs(instance.weights), instance.fixed)


def solver_that(run, name="made", **capabilities):
    """Register a solver whose `run` is the function given."""

    @register(name)
    class Made(Solver):
        summary = "made for a test"
        supports = Capabilities(**capabilities)

        def run(self, instance, context):
            return run(instance, context)

    return Made


def test_losses_are_recomputed_whatever_the_solver_says(problem):
    def boast(instance, context):
        context.monitor.report(-1e9, magnitude(instance))
        return Status.CONVERGED

    solver_that(boast)
    given = problem(1)
    result = solve(given.instance, "made")
    assert result.objective == pytest.approx(given.selection_loss(result.pruned))


def test_infeasible_selection_is_an_error(problem):
    def overdo(instance, context):
        context.monitor.report(0.0, np.ones(instance.n, dtype=bool))
        return Status.CONVERGED

    solver_that(overdo)
    with pytest.raises(SolverError, match="does not meet the budget"):
        solve(problem(1).instance, "made")


def test_bound_above_the_objective_is_an_error(problem):
    def overclaim(factor):
        def run(instance, context):
            pruned = magnitude(instance)
            loss = selection_loss(instance, pruned)
            context.monitor.report(loss, pruned)
            context.monitor.report_bound(factor * loss)
            return Status.CONVERGED

        return run

    solver_that(overclaim(1.001), bound=True)
    with pytest.raises(SolverError, match="claims the bound"):
        solve(problem(1).instance, "made")
    solver_that(overclaim(1 + 1e-9), "rounded", bound=True)
    result = solve(problem(1).instance, "rounded")
    assert result.bound == result.objective
    assert result.gap == 0


@pytest.mark.parametrize("error", [RuntimeError("boom"), SolverError("boom"), AssertionError()])
def test_failure_keeps_the_incumbent(problem, error, caplog):
    def fail(instance, context):
        context.monitor.report(selection_loss(instance, magnitude(instance)), magnitude(instance))
        raise error

    solver_that(fail)
    result = solve(problem(1).instance, "made")
    assert result.status is Status.ERROR
    assert result.pruned.sum() == 4
    assert "its incumbent is kept" in caplog.text


def test_failure_before_any_selection_is_a_sentence(problem):
    def fail(instance, context):
        raise ZeroDivisionError("by zero")

    solver_that(fail)
    with pytest.raises(SolverError, match="solver 'made' failed: ZeroDivisionError: by zero"):
        solve(problem(1).instance, "made")


def test_no_selection_at_all_falls_back_on_magnitude(problem):
    solver_that(lambda instance, context: Status.CONVERGED)
    given = problem(1, fixed=True).instance
    assert solve(given, "made").pruned.tolist() == magnitude(given).tolist()


@pytest.mark.parametrize(
    ("capability", "extras", "words"),
    [
        ("groups", {"groups": "layers"}, "a budget per group"),
        ("several_blocks", {"blocks": 2}, "several blocks"),
        ("linear", {"linear": True}, "a first-order term"),
        ("fixed", {"fixed": True}, "fixed weights"),
    ],
)
def test_what_is_not_claimed_is_refused(problem, capability, extras, words):
    solver_that(lambda instance, context: Status.CONVERGED, **{capability: False})
    with pytest.raises(SolverError, match=f"solver 'made' cannot take {words}"):
        solve(problem(1, **extras).instance, "made")
    assert solve(problem(1).instance, "made").pruned.sum() == 4


def test_status_of_a_rule_comes_before_converged_but_not_before_optimal(problem):
    def run(status):
        def inner(instance, context):
            context.monitor.report(selection_loss(instance, magnitude(instance)), magnitude(instance))
            context.monitor.should_stop()
            return status

        return inner

    solver_that(run(Status.CONVERGED), "converged")
    solver_that(run(Status.OPTIMAL), "optimal")
    assert solve(problem(1).instance, "converged", stop=Stop(time_limit=0)).status is Status.TIME_LIMIT
    assert solve(problem(1).instance, "optimal", stop=Stop(time_limit=0)).status is Status.OPTIMAL


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "both"}, "`objective` must be"),
        ({"device": "tpu"}, "`device` must be"),
        ({"threads": 0}, "`threads` must be at least 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"seed": -1}, "`seed` must not be negative"),
        ({"warm_start": np.ones(8, dtype=bool)}, "the warm start does not meet the budget"),
        ({"parameters": {"nonsense": 1}}, "no parameter 'nonsense'; known: epsilon"),
    ],
)
def test_arguments_that_make_no_sense(problem, options, words):
    with pytest.raises(UsageError, match=words):
        solve(problem(1).instance, "ls", **options)


@dataclass(frozen=True)
class Everything(Parameters):
    """One parameter of each type."""

    flag: bool = option(False, "a switch")
    count: int = option(1, "a number")
    limit: int | None = option(None, "a number or none")
    size: float = option(0.5, "a size")
    word: str = option("a", "a word")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"flag": "yes", "count": "7"}, {"flag": True, "count": 7}),
        ({"flag": False, "limit": "none"}, {"flag": False, "limit": None}),
        ({"limit": 3.0, "size": "1e-3", "word": "b"}, {"limit": 3, "size": 1e-3, "word": "b"}),
        ({"size": 2}, {"size": 2.0}),
    ],
)
def test_parameters_take_the_declared_type(given, expected):
    made = solver_that(lambda *_: Status.CONVERGED)
    made.parameters_type = Everything
    parameters = made(given).parameters
    for key, value in expected.items():
        assert getattr(parameters, key) == value
        assert type(getattr(parameters, key)) is type(value)


@pytest.mark.parametrize(
    "given",
    [
        {"flag": "maybe"},
        {"flag": 1},
        {"count": "1.5"},
        {"count": 1.5},
        {"count": True},
        {"count": None},
        {"count": float("inf")},
        {"size": "nan"},
        {"size": "inf"},
        {"size": True},
        {"word": 3},
    ],
)
def test_parameters_of_another_type_are_refused(given):
    made = solver_that(lambda *_: Status.CONVERGED)
    made.parameters_type = Everything
    (key,) = given
    with pytest.raises(UsageError, match=f"parameter '{key}' of solver 'made' must be a"):
        made(given)


class Foreign(Solver):
    """A third party's solver."""

    summary = "the largest weights"

    def run(self, instance, context):
        pruned = instance.budget.cheapest(-np.abs(instance.weights), instance.fixed)
        context.monitor.report(selection_loss(instance, pruned), pruned)
        return Status.CONVERGED


@pytest.fixture
def entry_point(monkeypatch):
    """Pretend that a package with an entry point is installed."""

    def add(name, value, loaded):
        def load(self):
            if isinstance(loaded, Exception):
                raise loaded
            return loaded

        monkeypatch.setattr(EntryPoint, "load", load)
        entry = EntryPoint(name, value, registry.GROUP)
        monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == registry.GROUP else [])

    return add


def test_third_party_solver(entry_point, problem, instance_file, capsys):
    from cbs_opt.cli.solve import main

    entry_point("largest", "other.package:Foreign", Foreign)
    assert solver_names()[-1] == "largest"
    assert get_solver("largest") is Foreign
    given = problem(1).instance
    result = solve(given, "largest")
    assert result.pruned.tolist() == given.budget.cheapest(-np.abs(given.weights)).tolist()
    assert result.solver == "largest"
    assert main([str(instance_file), "--solver", "largest", "-q"]) == 0
    assert main(["--list-solvers"]) == 0
    assert "largest      the largest weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("loaded", "words"),
    [
        (ModuleNotFoundError("No module named 'other'"), "cannot be loaded: No module named 'other'"),
        (ValueError("broken"), "cannot be loaded: broken"),
        (dict, "is not a subclass of cbs_opt.Solver"),
    ],
)
def test_third_party_solver_that_is_broken(entry_point, loaded, words, capsys):
    from cbs_opt.cli.solve import main

    entry_point("broken", "other.package:Thing", loaded)
    with pytest.raises(SolverError, match=words):
        get_solver("broken")
    assert main(["--list-solvers"]) == 0
    assert "broken       not available" in capsys.readouterr().out


def test_own_solver_whose_package_is_missing(monkeypatch):
    import cbs_opt.solvers

    monkeypatch.setitem(cbs_opt.solvers.MODULES, "lacking", "a_package_that_nobody_has")
    with pytest.raises(SolverError, match="solver 'lacking' needs the package 'a_package_that_nobody_has'"):
        get_solver("lacking")


def test_a_name_is_taken_once():
    solver_that(lambda *_: Status.CONVERGED, "unique")
    other = type("Other", (Solver,), {"run": lambda *_: Status.CONVERGED})
    with pytest.raises(SolverError, match="'unique' is registered already"):
        register("unique")(other)
    again = solver_that(lambda *_: Status.CONVERGED, "unique")  # a cell of a notebook, run twice
    assert get_solver("unique") is again


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_monitor_keeps_the_best_and_its_history():
    clock, seen = Clock(), []
    monitor = Monitor(callback=lambda m: seen.append(m.objective), clock=clock)
    clock.now += 1
    pruned = np.array([True, False])
    assert monitor.report(2.0, pruned)
    pruned[:] = False
    monitor.advance(3)
    assert not monitor.report(2.0, np.array([False, True]))
    assert not monitor.report(np.nan, pruned)
    assert not monitor.report(-np.inf, pruned)
    assert monitor.report_bound(1.0)
    assert not monitor.report_bound(0.5)
    clock.now += 1
    assert monitor.report(1.5, np.array([False, True]))
    assert monitor.pruned.tolist() == [False, True]
    assert [tuple(row) for row in monitor.history] == [
        (1.0, 0, 2.0, None),
        (1.0, 3, 2.0, 1.0),
        (2.0, 3, 1.5, 1.0),
    ]
    assert seen == [2.0, 2.0, 1.5]
    assert monitor.gap == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("stop", "status"),
    [
        (Stop(), None),
        (Stop(time_limit=10), None),
        (Stop(time_limit=5), Status.TIME_LIMIT),
        (Stop(max_iterations=8), None),
        (Stop(max_iterations=7), Status.ITERATION_LIMIT),
        (Stop(no_improvement=5), None),
        (Stop(no_improvement=4), Status.NO_IMPROVEMENT),
        (Stop(target=1.9), None),
        (Stop(target=2.0), Status.TARGET_REACHED),
        (Stop(gap=0.4), None),
        (Stop(gap=0.5), Status.GAP_REACHED),
        (Stop(should_stop=lambda: False), None),
        (Stop(should_stop=lambda: True, target=2.0), Status.INTERRUPTED),
    ],
)
def test_rules_of_stop(stop, status):
    clock = Clock()
    monitor = Monitor(stop, clock=clock)
    monitor.advance(3)
    monitor.report(2.0, np.array([True]))
    monitor.report_bound(1.0)
    monitor.advance(4)
    clock.now += 5
    assert monitor.should_stop() is (status is not None)
    assert monitor.reason is status
    clock.now += 1e9
    assert monitor.should_stop() or stop.time_limit is None
    if status is not None:
        assert monitor.reason is status


@pytest.mark.parametrize("name", ["time_limit", "max_iterations", "no_improvement", "gap"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_limits_that_make_no_sense(name, value):
    with pytest.raises(UsageError, match=f"`{name}`"):
        Stop(**{name: value})


def test_gap():
    assert relative_gap(None, 1.0) is None
    assert relative_gap(1.0, None) is None
    assert relative_gap(2.0, 1.0) == 0.5
    assert relative_gap(-1.0, -2.0) == 1.0
    assert relative_gap(0.0, 0.0) == 0.0
    assert relative_gap(1.0, 1.1) == 0.0


def test_building_counts_for_the_limit_and_not_for_the_history(problem, monkeypatch):
    """Building takes 100 s and solving 7 s, by a clock of the test: the limit counts both."""
    clock = Clock()

    @register("slow builder")
    class SlowBuilder(Solver):
        summary = "made for a test"
        supports = Capabilities()

        def prepare(self, instance, context):
            clock.now += 100

        def run(self, instance, context):
            clock.now += 7
            context.monitor.report(selection_loss(instance, magnitude(instance)), magnitude(instance))
            return Status.TIME_LIMIT if context.monitor.should_stop() else Status.CONVERGED

    # Where `solve` makes its monitor; it has no argument for a clock.
    monkeypatch.setitem(solve.__globals__, "Monitor", lambda stop, callback: Monitor(stop, callback, clock))
    result = solve(problem(1).instance, "slow builder", stop=Stop(time_limit=150))
    assert result.status is Status.CONVERGED
    assert (result.build_seconds, result.solve_seconds) == (100, 7)
    assert [row.seconds for row in result.history] == [7]
    result = solve(problem(1).instance, "slow builder", stop=Stop(time_limit=107))
    assert result.status is Status.TIME_LIMIT
