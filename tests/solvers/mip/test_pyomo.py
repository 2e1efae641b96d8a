"""Pyomo's solvers on the same models."""

from __future__ import annotations

import pytest

from cbs_opt import Context, Monitor, SolverError, Status, Stop, UsageError, get_solver, solve
from cbs_opt.solvers.mip.joint_model import ScaledJoint, pyomo_joint
from cbs_opt.solvers.mip.pyomo_solver import PyomoSolver
from cbs_opt.solvers.mip.selection_model import pyomo_selection
from cbs_opt.solvers.problem.joint_problem import JointProblem
from cbs_opt.solvers.problem.selection_problem import SelectionProblem

KINDS = {
    "hessian": {"kind": "hessian"},
    "blocks": {"kind": "gradients", "blocks": 3, "n": 9},
    "groups": {"kind": "hessian", "blocks": 2, "groups": "layers", "n": 10},
    "tiles": {"kind": "hessian", "groups": "tiles", "n": 12},
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
@pytest.mark.parametrize("formulation", ["auto", "miqp", "perspective"])
@pytest.mark.parametrize("solver", ["highs", "scip", "gurobi"])
def test_joint_equals_enumeration(solver, formulation, kind, problem):
    if not installed(solver):
        pytest.skip(f"NOT TESTED: '{solver}' is not installed")
    if (solver, kind) in (("scip", "hessian"), ("scip", "blocks"), ("scip", "groups")) and formulation != "auto":
        pytest.skip("seconds: one kind is enough for the cones and the MIQP of 'scip'")
    given = problem(3, **KINDS[kind])
    run = {"objective": "joint", "parameters": {"solver": solver, "formulation": formulation}}
    if formulation != "auto" and solver == "highs":
        with pytest.raises(SolverError, match="no mixed-integer quadratic problem"):
            solve(given.instance, "pyomo", **run)
        return
    result = solve(given.instance, "pyomo", **run)
    optimum = given.optimum("joint")
    assert result.objective == pytest.approx(optimum, rel=1e-6)
    assert result.bound <= optimum + 1e-9 * given.scale()
    assert result.gap < 1e-5
    assert result.extras["formulation"] == {"auto": "miqp" if solver == "gurobi" else "outer"}.get(
        formulation, formulation
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("perspective", [True, False])
def test_joint_model_has_the_objective_of_the_instance(kind, perspective, problem):
    import pyomo.environ as pyo

    given = problem(5, **KINDS[kind])
    selections = list(given.selections())
    scaled = ScaledJoint(JointProblem(given.instance), max(selections, key=given.joint_loss))
    model = pyomo_joint(scaled, perspective=perspective)
    for pruned in selections[::5]:
        y = scaled.restrict(pruned)
        x = scaled.best_point(y)
        for i, value in enumerate(y.tolist()):
            model.v[i].set_value(value)
            model.x[i].set_value(x[i] - (scaled.u if perspective else scaled.v)[i])
            if perspective and i in model.r:
                model.full[i].set_value(x[i])
                model.kept[i].set_value(1 - value)
                model.r[i].set_value(x[i] ** 2)
        for row in model.component_data_objects(pyo.Constraint):
            body = pyo.value(row.body)
            assert row.lower is None or body >= pyo.value(row.lower) - 1e-9
            assert row.upper is None or body <= pyo.value(row.upper) + 1e-9
        loss = scaled.from_units(pyo.value(model.objective))
        assert loss == pytest.approx(given.joint_loss(pruned), rel=1e-7, abs=1e-9 * given.scale())


def test_solver_tells_its_own_seconds_and_nodes(problem):
    for solver in ("highs", "scip", "gurobi"):
        if installed(solver):
            extras = solve(problem(3).instance, "pyomo", parameters={"solver": solver}).extras
            assert extras["nodes"] >= 0
            assert extras["solver_seconds"] >= 0


def test_long_log_of_scip_does_not_block(problem):
    """Its log goes through a pipe: what fills that stops everything, time limits too."""
    if not installed("scip"):
        pytest.skip("NOT TESTED: 'scip' is not installed")

    class Recording:
        def solve(self, model, load_solutions, options):
            raise RuntimeError(f"display {options['display/verblevel']}")

    solver = PyomoSolver({"solver": "scip"})
    solver._interface = lambda: Recording()
    given = problem(3).instance
    context = Context("selection", 0, Monitor())
    solver.prepare(given, context)
    with pytest.raises(SolverError, match="display 0"):
        solver.run(given, context)


@pytest.mark.parametrize("kind", KINDS)
def test_model_has_the_objective_of_the_instance(kind, problem):
    import pyomo.environ as pyo

    given = problem(5, **KINDS[kind])
    scaled = SelectionProblem(given.instance)
    model = pyomo_selection(scaled)
    for pruned in list(given.selections())[::5]:
        y = scaled.restrict(pruned)
        for i, value in enumerate(y.tolist()):
            model.v[i].set_value(value)
        assert all(pyo.value(row.body) == row.upper() for row in model.budget.values())
        loss = scaled.from_units(pyo.value(model.objective))
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
