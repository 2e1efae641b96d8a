"""Exact solutions by HiGHS, through highspy: the MILPs of `selection_outer`, `joint_outer`, `selection_model`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import highspy
import numpy as np

from cbs_opt.errors import SolverError, UsageError
from cbs_opt.instance import Instance
from cbs_opt.monitor import Monitor
from cbs_opt.registry import register
from cbs_opt.result import Status
from cbs_opt.solver import OBJECTIVES, Capabilities, Context, Parameters, Solver, option
from cbs_opt.solvers.mip.joint_model import ScaledJoint, joint_shell
from cbs_opt.solvers.mip.selection_model import UNITS, LinearModel, rlt_model
from cbs_opt.solvers.mip.start import Outer, Scaled, Start, check_objective
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.typing import FloatArray

logger = logging.getLogger("cbs_opt")

FORMULATIONS = ("auto", "outer", "rlt", "miqp")

_TOLERANCE = 1e-7  # of rows, reduced costs and integrality; at 1e-9 HiGHS 1.15.1 loses optimal points
_GAP = 1e-7  # relative, of HiGHS
_MARGIN = 1e-7  # that its bounds are reduced by, in scaled units; reduced costs of 1e-7 make less than 1e-8
_RELAXATION_CUTS = 1e-4  # violation of a tangent that the linear relaxation leaves
_RELAXATION_ROUNDS = 30
_POLL = 0.02  # seconds
_GRACE = 0.5  # seconds: the rules of `Stop` end a run; the limit of HiGHS is used only if it cannot be interrupted
_PATIENCE = 10.0  # seconds that HiGHS has to respond


@dataclass(frozen=True)
class HighsParameters(Parameters):
    """The formulation, and options that strengthen it."""

    formulation: str = option(
        "auto",
        "outer (tangents), rlt (products; selection only), miqp; auto: miqp if HiGHS takes it, or outer",
    )
    start: bool = option(True, "start from a short run of `search` or `joint`; else by the diagonal")
    shift: bool = option(True, "outer, selection: shift the diagonal by the dual of the semidefinite relaxation")

    def __post_init__(self) -> None:
        if self.formulation not in FORMULATIONS:
            listed = "', '".join(FORMULATIONS)
            raise UsageError(f"`formulation` must be one of '{listed}', got '{self.formulation}'")


@register("highs")
class Highs(Solver):
    """Branch and bound by HiGHS on a MILP that is exact at binary points; an iteration is one MILP.

    `outer` minimises a piecewise linear function below the objective, adds the tangents at every selection that
    was found, and repeats this until the bound meets the incumbent. `rlt` needs one MILP. HiGHS refuses
    mixed-integer quadratic problems (up to 1.15); `miqp` is for a release that accepts them. Selections are
    evaluated by the losses of the instance, not by the objective that HiGHS reports.
    """

    summary = "exact by HiGHS: MILP by tangents on a convexified objective, or by products"
    supports = Capabilities(
        objectives=frozenset(OBJECTIVES), cross_groups=True, bound=True, warm_start=True,
        not_worse_than_magnitude=True,
    )  # fmt: skip
    parameters_type = HighsParameters
    parameters: HighsParameters

    def check_supports(self, instance: Instance, context: Context) -> None:
        """Refuse a MIQP if HiGHS does; for the joint objective, refuse products and a singular Hessian."""
        super().check_supports(instance, context)
        check_objective(instance, context, self.parameters.formulation)
        if self.parameters.formulation == "miqp" and not takes_miqp():
            raise SolverError(
                f"HiGHS {highspy.Highs().version()} refuses mixed-integer quadratic problems: take "
                "`formulation` 'outer' or 'rlt'"
            )

    def prepare(self, instance: Instance, context: Context) -> None:
        """Compile, presolve."""
        self._start = Start(instance, context, self.parameters.start)

    def run(self, instance: Instance, context: Context) -> Status:
        """Start, then MILPs until the gap closes."""
        monitor = context.monitor
        context.extras["nodes"] = 0
        problem = self._start.run(context)
        if monitor.closed:
            return Status.OPTIMAL
        if problem is None or monitor.should_stop():
            return Status.CONVERGED
        kind = self.parameters.formulation
        if kind == "auto":
            kind = "miqp" if takes_miqp() else "outer"
        if kind == "outer":
            model = self._start.outer_model(problem, UNITS, self.parameters.shift, monitor.should_stop)
            return self._outer(problem, context, model)
        return self._once(problem, context, kind)

    def _outer(self, problem: Scaled, context: Context, model: Outer) -> Status:
        """MILPs with growing sets of tangents."""
        monitor = context.monitor
        assert monitor.pruned is not None
        best = problem.restrict(monitor.pruned)
        model.touch(best)
        for _ in range(_RELAXATION_ROUNDS):
            if monitor.should_stop():
                return Status.CONVERGED
            highs = load(model.build(relaxed=True), context, monitor)
            if not obey(highs, monitor.should_stop) or highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
                break
            if not model.cut(np.array(highs.getSolution().col_value), _RELAXATION_CUTS):
                break
        while not monitor.should_stop():
            highs = load(model.build(), context, monitor)
            found = _solve(highs, problem, context, model.point(best))
            if found is None:
                return Status.CONVERGED
            context.extras["tangents"] = model.tangents
            if monitor.closed:
                return Status.OPTIMAL
            new = [model.touch(y) for y in found]
            if not any(new):
                break  # as close as the tolerances of HiGHS allow
            best = problem.restrict(monitor.pruned)
        return Status.CONVERGED

    def _once(self, problem: Scaled, context: Context, kind: str) -> Status:
        """One MILP with products, or one MIQP."""
        monitor = context.monitor
        assert monitor.pruned is not None
        best = point = problem.restrict(monitor.pruned)
        if isinstance(problem, ScaledJoint):
            n = problem.n
            highs = load(joint_shell(problem, UNITS), context, monitor)
            Q = np.zeros((2 * n, 2 * n))
            Q[n:, n:] = problem.M
            pass_quadratic(highs, Q * UNITS)
            point = np.concatenate([best, problem.best_point(best) - problem.v])
        elif kind == "miqp":
            highs = load(quadratic_shell(problem), context, monitor)
            pass_quadratic(highs, problem.matrix * UNITS)
        else:
            linear = rlt_model(problem)
            highs = load(linear.in_units(UNITS), context, monitor)
            point = np.array([np.prod([best[i] for i in product]) for product in _products(linear, problem)])
        _solve(highs, problem, context, point)
        return Status.OPTIMAL if monitor.closed else Status.CONVERGED


def _solve(highs: highspy.Highs, problem: Scaled, context: Context, point: FloatArray) -> list[FloatArray] | None:
    """Run a MILP from a known point, report what it found; returns its selections, None where it failed."""
    monitor = context.monitor
    known = highspy.HighsSolution()
    known.col_value = point.tolist()
    highs.setSolution(known)
    pool: list[FloatArray] = []
    highs.cbMipImprovingSolution.subscribe(lambda event: pool.append(np.array(event.data_out.mip_solution)))
    obeyed = obey(highs, monitor.should_stop)
    if not obeyed:
        return None
    status, info = highs.getModelStatus(), highs.getInfo()
    monitor.advance()
    context.extras["nodes"] += max(int(info.mip_node_count), 0)
    solved = highspy.HighsModelStatus.kOptimal
    stopped = (
        highspy.HighsModelStatus.kTimeLimit,
        highspy.HighsModelStatus.kInterrupt,
        highspy.HighsModelStatus.kObjectiveTarget,
        highspy.HighsModelStatus.kSolutionLimit,
    )
    if status != solved and status not in stopped:
        logger.warning("HiGHS ends with '%s'; the bound so far is kept", highs.modelStatusToString(status))
        return None
    if info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
        pool.append(np.array(highs.getSolution().col_value))
    found = []
    for v in pool:
        y = np.round(v[: problem.n])
        pruned = problem.selection(y)
        if pruned is not None:
            monitor.report(problem.loss(pruned), pruned)
            found.append(y)
    bound = info.mip_dual_bound / UNITS
    if status == solved and not np.isfinite(bound):
        # Presolve proved that nothing improves on the known point: there is no tree, and no bound of one.
        bound = highs.getInfo().objective_function_value / UNITS * (1.0 - _GAP)
    if np.isfinite(bound) and abs(bound) < 1e20:
        assert monitor.objective is not None
        monitor.report_bound(min(problem.from_units(bound - _MARGIN), monitor.objective))
    return found


def load(model: LinearModel, context: Context, monitor: Monitor) -> highspy.Highs:
    """A HiGHS instance that holds the model, silent and with our tolerances."""
    highs = highspy.Highs()
    gap = monitor.stop.gap
    options = {
        "output_flag": False,
        "threads": context.threads or 1,
        "random_seed": context.seed % 2**31,
        "mip_rel_gap": _GAP if gap is None else max(_GAP, 0.5 * gap),
        "mip_abs_gap": 1e-9 * UNITS,
        "primal_feasibility_tolerance": _TOLERANCE,
        "dual_feasibility_tolerance": _TOLERANCE,
        "mip_feasibility_tolerance": _TOLERANCE,
    }
    if np.isfinite(monitor.remaining):
        options["time_limit"] = max(monitor.remaining, 0.0) + _GRACE
    for name, value in options.items():
        highs.setOptionValue(name, value)
    highs.passModel(highs_lp(model))
    return highs


def highs_lp(model: LinearModel) -> highspy.HighsLp:
    """The arrays in the form that HiGHS requires."""
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = model.cost.size, model.matrix.shape[0]
    lp.col_cost_, lp.offset_ = model.cost, model.offset
    lp.col_lower_, lp.col_upper_ = model.lower, model.upper
    lp.row_lower_, lp.row_upper_ = model.row_lower, model.row_upper
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = model.matrix.indptr.astype(np.int32)
    lp.a_matrix_.index_ = model.matrix.indices.astype(np.int32)
    lp.a_matrix_.value_ = model.matrix.data
    kind = {True: highspy.HighsVarType.kInteger, False: highspy.HighsVarType.kContinuous}
    if model.integer.any():
        lp.integrality_ = [kind[i] for i in model.integer.tolist()]
    lp.col_names_ = model.names
    return lp


def obey(highs: highspy.Highs, should_stop: Callable[[], bool]) -> bool:
    """Run HiGHS in a separate thread and cancel it when `should_stop`; returns whether it ended."""
    highs.HandleUserInterrupt = True
    thread = highs.startSolve()
    try:
        while not highs.wait(_POLL)[0]:
            if should_stop():
                break
        else:
            thread.join(_PATIENCE)
            return not thread.is_alive()
    finally:
        if thread.is_alive():
            highs.cancelSolve()
            thread.join(_PATIENCE)
    if thread.is_alive():
        logger.warning("HiGHS did not stop within %g seconds; the run ends without it", _PATIENCE)
    return not thread.is_alive()


@cache
def takes_miqp() -> bool:
    """Whether HiGHS solves a small mixed-integer quadratic problem: tested, not inferred from its version."""
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    inf = highspy.kHighsInf
    for _ in range(2):
        highs.addVar(0.0, 1.0)
    for i in range(2):
        highs.changeColIntegrality(i, highspy.HighsVarType.kInteger)
        highs.changeColCost(i, -1.0)
    highs.addRow(-inf, 1.0, 2, np.array([0, 1]), np.array([1.0, 1.0]))
    if pass_quadratic(highs, np.diag([1.0, 1.5])) != highspy.HighsStatus.kOk:
        return False
    highs.run()
    return (
        highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
        and np.allclose(highs.getSolution().col_value, [1.0, 0.0], atol=1e-6)
        and abs(highs.getInfo().objective_function_value + 0.5) < 1e-6
    )


def pass_quadratic(highs: highspy.Highs, Q: FloatArray) -> highspy.HighsStatus:
    """Give HiGHS the term ½ vᵀQv."""
    n = Q.shape[0]
    hessian = highspy.HighsHessian()
    hessian.dim_ = n
    hessian.format_ = highspy.HessianFormat.kTriangular
    lower = [np.arange(j, n) for j in range(n)]
    hessian.start_ = np.concatenate([[0], np.cumsum(np.arange(n, 0, -1))]).astype(np.int32)
    hessian.index_ = np.concatenate(lower).astype(np.int32)
    hessian.value_ = np.concatenate([Q[rows, j] for j, rows in enumerate(lower)])
    status: highspy.HighsStatus = highs.passHessian(hessian)
    return status


def quadratic_shell(problem: SelectionProblem) -> LinearModel:
    """The MIQP without its quadratic term."""
    from scipy.sparse import csr_array

    sums = problem.sums()
    rows = np.zeros((len(sums), problem.n))
    for row, (members, _) in zip(rows, sums, strict=True):
        row[members] = 1.0
    sides = np.array([float(p) for _, p in sums])
    names = [f"y{i}" for i in problem.index.tolist()]
    ones = np.ones(problem.n)
    return LinearModel(problem.linear * UNITS, 0 * ones, ones, ones > 0, csr_array(rows), sides, sides, names)


def _products(model: LinearModel, problem: SelectionProblem) -> list[tuple[int, ...]]:
    """The open weights whose product each column of `rlt_model` is."""
    out: list[tuple[int, ...]] = [(i,) for i in range(problem.n)]
    for at, _ in problem.parts:
        out += [(int(at[a]), int(at[b])) for a in range(at.size) for b in range(a + 1, at.size)]
    return out
