"""HiGHS on the MILPs, against enumeration, and what it leaves when it is stopped."""

from __future__ import annotations

import threading
import time

import highspy
import numpy as np
import pytest

from cbs_opt import SolverError, Status, Stop, UsageError, read_instance, solve
from cbs_opt.solvers.mip.highs import highs_lp, takes_miqp
from cbs_opt.solvers.mip.selection_model import rlt_model
from cbs_opt.solvers.mip.selection_outer import OuterModel, Separated, affine_hull, optimal_shift
from cbs_opt.solvers.problem.selection_problem import SelectionProblem

KINDS = {
    "hessian": {"kind": "hessian"},
    "inverse": {"kind": "inverse_hessian", "n": 9},
    "low rank": {"kind": "gradients", "m": 3, "damping": 0.0},
    "blocks": {"kind": "gradients", "blocks": 3, "n": 10},
    "blocks of one": {"kind": "gradients", "blocks": 6, "n": 6},
    "layers": {"kind": "hessian", "blocks": 2, "groups": "layers", "n": 10},
    "rows": {"kind": "gradients", "groups": "rows", "n": 10},
    "2:4": {"kind": "inverse_hessian", "groups": "2:4", "n": 10},
    "tiles": {"kind": "hessian", "groups": "tiles", "n": 12},
    "tiles, everything": {
        "kind": "inverse_hessian",
        "groups": "tiles",
        "n": 16,
        "blocks": 2,
        "linear": True,
        "fixed": True,
    },
    "linear": {"kind": "gradients", "linear": True},
    "fixed": {"kind": "hessian", "fixed": True, "n": 9},
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
PLAIN = [{}, {"start": False, "shift": False}, {"formulation": "rlt"}, {"formulation": "rlt", "start": False}]


@pytest.mark.parametrize("parameters", PLAIN, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_equals_enumeration(kind, seed, parameters, problem):
    given = problem(seed, **KINDS[kind])
    rounding = 1e-9 * given.scale()
    result = solve(given.instance, "highs", parameters=parameters)
    optimum = given.optimum("selection")
    assert result.bound <= optimum + rounding
    if kind != "badly scaled":
        assert result.objective == pytest.approx(optimum, rel=1e-6, abs=rounding)
        assert result.status is Status.OPTIMAL or result.gap * abs(optimum) <= rounding
    else:
        assert result.objective == pytest.approx(optimum, rel=1e-6, abs=1e-6 * given.scale())


@pytest.mark.parametrize("kind", ["hessian", "blocks", "layers", "everything", "low rank"])
@pytest.mark.parametrize("shift", [True, False])
def test_separated_objective_is_exact_at_binary_points(kind, shift, problem):
    given = problem(4, **KINDS[kind])
    scaled = SelectionProblem(given.instance)
    selections = [scaled.restrict(pruned) for pruned in given.selections()]
    values = np.array([scaled.value(y) for y in selections])
    worst = float(values.max())
    separated = Separated(scaled, worst, np.zeros(scaled.budget.size), shift, lambda: False)
    model = OuterModel(scaled, separated, 1.0)
    linear = model.build()
    for y, value in zip(selections, values, strict=True):
        u = separated.directions(y)
        rebuilt = float(separated.weight @ u**2 + separated.linear @ y + separated.constant)
        assert rebuilt == pytest.approx(value, rel=1e-7, abs=1e-9)
        assert (u >= separated.lower).all()
        assert (u <= separated.upper).all()
        v = model.point(y)
        sides = linear.matrix @ v
        assert (sides >= linear.row_lower - 1e-9).all()
        assert (sides <= linear.row_upper + 1e-9).all()


def test_shift_raises_the_root_bound(problem):
    given = problem(2, n=12, kind="hessian")
    scaled = SelectionProblem(given.instance)
    (at, Q), *_ = scaled.parts
    x, B = affine_hull(scaled, at)
    d = optimal_shift(Q, scaled.linear[at], x, B, lambda: False)
    assert np.linalg.eigvalsh(B.T @ (Q - np.diag(d)) @ B)[0] > 0

    def bound(d):
        P = Q - np.diag(d)
        y = x - B @ np.linalg.solve(B.T @ P @ B, B.T @ (P @ x + 0.5 * d))
        return 0.5 * y @ P @ y + 0.5 * d @ y

    optimum = min(scaled.value(scaled.restrict(pruned)) for pruned in given.selections())
    assert bound(0 * d) < bound(d) <= optimum + 1e-9


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "badly scaled"])
def test_rlt_is_exact_at_every_binary_point(kind, problem):
    """With y given, the linear program in z has the objective of y."""
    given = problem(7, **KINDS[kind])
    scaled = SelectionProblem(given.instance)
    model = rlt_model(scaled)
    for pruned in list(given.selections())[::7]:
        y = scaled.restrict(pruned)
        highs = highspy.Highs()
        highs.setOptionValue("output_flag", False)
        highs.passModel(highs_lp(model))
        for i, value in enumerate(y):
            highs.changeColBounds(i, value, value)
        highs.run()
        assert highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
        assert highs.getInfo().objective_function_value == pytest.approx(scaled.value(y), abs=1e-7)


@pytest.mark.parametrize("formulation", ["outer", "rlt"])
@pytest.mark.parametrize("limit", [0.0, 0.02, 0.1, 0.3, 1.0])
def test_bound_is_valid_at_a_time_limit(formulation, limit, problem):
    given = problem(11, n=18, kind="hessian", m=25)
    optimum = solve(given.instance, "brute").objective
    solve(problem(1).instance, "highs")  # compilation
    result = solve(given.instance, "highs", parameters={"formulation": formulation}, stop=Stop(time_limit=limit))
    assert result.objective >= optimum * (1 - 1e-9)
    assert result.bound is None or result.bound <= optimum * (1 + 1e-9)
    assert result.status in (Status.OPTIMAL, Status.TIME_LIMIT)


@pytest.mark.parametrize("formulation", ["outer", "rlt"])
def test_interrupt_keeps_incumbent_and_bound(formulation, problem):
    given = problem(12, n=60, kind="hessian", m=70)
    solve(problem(1).instance, "highs")
    pressed = threading.Event()
    timer = threading.Timer(1.5, pressed.set)
    timer.start()
    started = time.perf_counter()
    parameters = {"formulation": formulation, "start": False}
    result = solve(given.instance, "highs", parameters=parameters, stop=Stop(should_stop=pressed.is_set))
    timer.cancel()
    assert time.perf_counter() - started < 20
    assert result.status is Status.INTERRUPTED
    assert given.instance.admits(result.pruned)
    assert 0 <= result.bound <= result.objective


def test_gap_ends_the_run(problem):
    given = problem(13, n=16, kind="hessian", m=20)
    result = solve(given.instance, "highs", stop=Stop(gap=0.2))
    assert result.gap <= 0.2
    assert result.bound <= solve(given.instance, "brute").objective


def test_miqp_is_decided_by_trying(problem):
    if takes_miqp():
        given = problem(1)
        result = solve(given.instance, "highs", parameters={"formulation": "miqp"})
        assert result.objective == pytest.approx(given.optimum("selection"), rel=1e-6)
    else:
        with pytest.raises(SolverError, match="refuses mixed-integer quadratic"):
            solve(problem(1).instance, "highs", parameters={"formulation": "miqp"})


def test_unknown_formulation(problem):
    with pytest.raises(UsageError, match="formulation"):
        solve(problem(1).instance, "highs", parameters={"formulation": "qubo"})


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "sparsity", "value"),
    [
        ("hidden-30-s0", 0.5, 9.190642685256e-08),
        ("output-30-s0", 0.5, 2.424144576888e-05),
        ("output-30-s0", 0.9, 1.515500676994e-03),
        ("hidden-40-s0", 0.9, 1.419765281931e-03),
        ("output-40-s0", 0.9, 2.259122811401e-03),
        ("hidden-80-s0", 0.9, 1.888508797869e-06),
    ],
)
def test_proves_layers_of_up_to_eighty(name, sparsity, value, shared_instances):
    instance = read_instance(shared_instances / f"{name}.npz").with_sparsity(sparsity)
    result = solve(instance, "highs", stop=Stop(time_limit=60))
    assert result.status is Status.OPTIMAL
    assert result.objective == pytest.approx(value, rel=1e-6)
