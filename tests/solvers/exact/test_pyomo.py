"""Pyomo's solvers on the same models."""

from __future__ import annotations

import pytest

from cbs_opt import SolverError, Status, Stop, UsageError, get_solver, solve
from cbs_opt.solvers.exact.model import ScaledSelection, pyomo_selection
from cbs_opt.solvers.exact.pyomo_solver import PyomoSolver

KINDS = {
    "hessian": {"kind": "hessian"},
    "blocks": {"kind": "gradients", "blocks": 3, "n": 9},
    "groups": {"kind": "hessian", "blocks": 2, "groups": "layers", "n": 10},
    "linear, fixed": {"kind": "inverse_hessian", "linear": True, "fixed": True},
}


def installed(name):
    try:
        PyomoSolver({"solver": name})._interface()
    except SolverError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("formulation", ["auto", "miqp", "outer", "rlt"])
@pytest.mark.parametrize("solver", ["highs", "scip", "gurobi", "cbc"])
def test_equals_enumeration(solver, formulation, kind, problem):
    if not installed(solver):
        pytest.skip(f"NOT TESTED: '{solver}' is not installed")
    given = problem(3, **KINDS[kind])
    parameters = {"solver": solver, "formulation": formulation}
    if formulation == "miqp" and solver in ("highs", "cbc"):
        with pytest.raises(SolverError, match="no mixed-integer quadratic problem"):
            solve(given.instance, "pyomo", parameters=parameters)
        return
    result = solve(given.instance, "pyomo", parameters=parameters)
    optimum = given.optimum("selection")
    assert result.objective == pytest.approx(optimum, rel=1e-6)
    assert result.bound <= optimum + 1e-9 * given.scale()
    assert result.gap < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_model_has_the_objective_of_the_instance(kind, problem):
    import pyomo.environ as pyo

    given = problem(5, **KINDS[kind])
    scaled = ScaledSelection(given.instance)
    model = pyomo_selection(scaled)
    for pruned in list(given.selections())[::5]:
        y = scaled.restrict(pruned)
        for i, value in enumerate(y.tolist()):
            model.v[i].set_value(value)
        assert all(pyo.value(row.body) == row.upper() for row in model.budget.values())
        loss = scaled.loss(pyo.value(model.objective))
        assert loss == pytest.approx(given.selection_loss(pruned), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("cplex", "cannot find 'cplex'"), ("no_such_solver", "cannot find 'no_such_solver'")],
)
def test_missing_solver_is_named_in_one_sentence(name, sentence, problem):
    if installed(name):
        pytest.skip(f"'{name}' is installed")
    with pytest.raises(SolverError, match=sentence) as refusal:
        solve(problem(1).instance, "pyomo", parameters={"solver": name})
    assert "\n" not in str(refusal.value)


def test_missing_solver_names_what_to_install(problem, monkeypatch):
    import pyomo.environ as pyo

    class Absent:
        def available(self, exception_flag=False):
            return False

    monkeypatch.setattr(pyo, "SolverFactory", lambda name: Absent())
    for name, how in (("scip", r"cbs-opt\[scip\]"), ("gurobi", r"cbs-opt\[gurobi\]"), ("cbc", "COIN-OR")):
        with pytest.raises(SolverError, match=how):
            solve(problem(1).instance, "pyomo", parameters={"solver": name})


def test_small_licence_is_an_error_and_not_a_result(problem, monkeypatch):
    class Refusing:
        def solve(self, *arguments, **options):
            raise RuntimeError("Model too large for size-limited license; visit\n the vendor")

    monkeypatch.setattr(PyomoSolver, "_interface", lambda self: Refusing())
    with pytest.raises(SolverError, match="'gurobi' refuses this size") as refusal:
        solve(problem(1).instance, "pyomo", parameters={"solver": "gurobi"})
    assert "\n" not in str(refusal.value)


def test_time_limit_keeps_a_selection(problem):
    given = problem(9, n=40, kind="hessian", m=50).instance
    result = solve(given, "pyomo", stop=Stop(time_limit=0.5))
    assert given.admits(result.pruned)
    assert result.status in (Status.TIME_LIMIT, Status.OPTIMAL)
    assert result.bound <= result.objective


def test_unknown_formulation():
    with pytest.raises(UsageError, match="formulation"):
        get_solver("pyomo")({"formulation": "qubo"})
