"""The joint problem as MILP, against enumeration; what its bounds and fixings claim."""

from __future__ import annotations

import highspy
import numpy as np
import pytest

from cbs_opt import (
    Budget,
    Context,
    GradientFactor,
    Instance,
    Monitor,
    SolverError,
    Status,
    Stop,
    read_instance,
    solve,
)
from cbs_opt.solvers.mip.highs import highs_lp
from cbs_opt.solvers.mip.joint_model import ScaledJoint, joint_shell
from cbs_opt.solvers.mip.joint_outer import JointOuterModel
from cbs_opt.solvers.mip.start import Start
from cbs_opt.solvers.problem.joint_problem import JointProblem

KINDS = {
    "hessian": {"kind": "hessian"},
    "inverse": {"kind": "inverse_hessian", "n": 9},
    "few gradients": {"kind": "gradients", "m": 3, "damping": 1e-3},
    "blocks": {"kind": "gradients", "blocks": 3, "n": 10},
    "blocks of one": {"kind": "gradients", "blocks": 6, "n": 6},
    "layers": {"kind": "hessian", "blocks": 2, "groups": "layers", "n": 10},
    "2:4": {"kind": "inverse_hessian", "groups": "2:4", "n": 10},
    "linear": {"kind": "gradients", "linear": True},
    "everything": {
        "kind": "inverse_hessian",
        "blocks": 3,
        "groups": "layers",
        "linear": True,
        "fixed": True,
        "n": 10,
    },
    "badly scaled": {"kind": "gradients", "weights": [1e-6, 1e6, -1, 1e3, -1e-3, 1, 1e-6, -2]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("heuristic", [True, False])
def test_equals_enumeration(kind, seed, heuristic, problem):
    given = problem(seed, **KINDS[kind])
    rounding = 1e-9 * given.scale()
    result = solve(given.instance, "highs", objective="joint", parameters={"start": heuristic})
    optimum = given.optimum("joint")
    assert result.bound <= optimum + rounding
    assert result.objective == pytest.approx(optimum, rel=1e-6, abs=rounding)
    assert result.status is Status.OPTIMAL or result.gap * abs(optimum) <= rounding


def scaled_from(given, pruned):
    return ScaledJoint(JointProblem(given.instance), pruned)


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_and_fixings_hold_for_every_selection_within_the_limit(kind, problem):
    given = problem(5, **KINDS[kind])
    selections = list(given.selections())
    losses = np.array([given.joint_loss(pruned) for pruned in selections])
    start = selections[int(np.argsort(losses)[len(losses) // 3])]
    scaled = scaled_from(given, start)
    limit = given.joint_loss(start)
    within = [pruned for pruned, loss in zip(selections, losses, strict=True) if loss <= limit]
    assert within
    assert scaled.from_units(scaled.bound) <= losses.min() + 1e-8 * given.scale()
    for pruned in within:
        y = scaled.restrict(pruned)
        x = scaled.best_point(y)
        assert ((scaled.decided < 0) | (scaled.decided == y)).all()
        kept = y == 0
        assert (x[kept] >= scaled.lower[kept]).all()
        assert (x[kept] <= scaled.upper[kept]).all()


def test_relaxation_decides_weights(problem):
    """Fixing has something to show for itself where one weight towers over the rest."""
    given = problem(3, n=9, kind="hessian", weights=[0.1, 0.1, -0.1, 40.0, 0.1, 0.1, -0.1, 0.1, 0.1])
    best = min(given.selections(), key=given.joint_loss)
    scaled = scaled_from(given, best)
    assert scaled.decided[3] == 0
    assert scaled.bound > 0


@pytest.mark.parametrize("kind", ["hessian", "blocks", "layers", "everything"])
def test_outer_model_is_below_everywhere_and_exact_where_touched(kind, problem):
    given = problem(4, **KINDS[kind])
    selections = list(given.selections())
    worst = max(selections, key=given.joint_loss)
    scaled = scaled_from(given, worst)
    model = JointOuterModel(scaled, 1.0)

    def least(y):
        highs = highspy.Highs()
        highs.setOptionValue("output_flag", False)
        highs.passModel(highs_lp(model.build(relaxed=True)))
        for i, value in enumerate(y):
            highs.changeColBounds(i, value, value)
        highs.run()
        assert highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
        return highs.getInfo().objective_function_value

    for pruned in selections[::9]:
        y = scaled.restrict(pruned)
        if ((scaled.decided >= 0) & (scaled.decided != y)).any():
            continue
        assert least(y) <= scaled.value(y) + 1e-6
        model.touch(y)
        assert least(y) == pytest.approx(scaled.value(y), abs=1e-6)
        assert not model.touch(y)
        linear, point = model.build(), model.point(y)
        sides = linear.matrix @ point
        assert (sides >= linear.row_lower - 1e-9).all()
        assert (sides <= linear.row_upper + 1e-9).all()
        assert linear.cost @ point + linear.offset == pytest.approx(scaled.value(y), abs=1e-8)


def test_miqp_shell_holds_the_problem(problem):
    """HiGHS is not asked, since it takes no MIQP: rows and columns are checked at every selection."""
    given = problem(6, n=9, kind="hessian")
    selections = list(given.selections())
    scaled = scaled_from(given, max(selections, key=given.joint_loss))
    shell = joint_shell(scaled, 1.0)
    for pruned in selections[::5]:
        y = scaled.restrict(pruned)
        t = scaled.best_point(y) - scaled.v
        point = np.concatenate([y, t])
        assert 0.5 * t @ scaled.M @ t == pytest.approx(scaled.value(y), rel=1e-8)
        sides = shell.matrix @ point
        assert (sides >= shell.row_lower - 1e-9).all()
        assert (sides <= shell.row_upper + 1e-9).all()
        assert (point >= shell.lower - 1e-9).all()
        assert (point <= shell.upper + 1e-9).all()


@pytest.mark.parametrize("limit", [0.0, 0.05, 0.4])
def test_bound_is_valid_at_a_time_limit(limit, problem):
    given = problem(11, n=18, kind="hessian", m=25)
    optimum = solve(given.instance, "exact", objective="joint").objective
    result = solve(given.instance, "highs", objective="joint", stop=Stop(time_limit=limit))
    assert result.objective >= optimum * (1 - 1e-9)
    assert result.bound is None or result.bound <= optimum * (1 + 1e-9)
    assert result.status in (Status.OPTIMAL, Status.TIME_LIMIT)


def test_start_reports_the_loss_of_the_evaluator(problem):
    given = problem(0, **KINDS["badly scaled"])
    monitor = Monitor()
    context = Context("joint", 0, monitor)
    Start(given.instance, context, True).run(context)
    assert monitor.objective == pytest.approx(given.joint_loss(monitor.pruned), rel=1e-6)


def test_products_are_for_the_selection_problem(problem):
    with pytest.raises(SolverError, match="'rlt' does not apply to the objective 'joint'"):
        solve(problem(1).instance, "highs", objective="joint", parameters={"formulation": "rlt"})


def test_what_is_too_large_is_refused_before_any_work():
    n = 1001
    instance = Instance(np.ones(n), GradientFactor(np.eye(2, n), 1e-3, [n]), Budget(10))
    with pytest.raises(SolverError, match="at most 1000 open weights, the instance has 1001"):
        solve(instance, "highs", objective="joint")


@pytest.mark.shared
@pytest.mark.parametrize(("name", "sparsity"), [("hidden-30-s0", 0.8), ("output-30-s0", 0.5)])
def test_joint_layers_of_thirty(name, sparsity, shared_instances):
    instance = read_instance(shared_instances / f"{name}.npz").with_sparsity(sparsity)
    result = solve(instance, "highs", objective="joint", stop=Stop(time_limit=60))
    assert result.status is Status.OPTIMAL
    assert result.objective == pytest.approx(solve(instance, "exact", objective="joint").objective, rel=1e-6)
