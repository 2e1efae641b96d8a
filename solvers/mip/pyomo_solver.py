"""The same models with any solver that Pyomo finds."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from cbs_opt.errors import SolverError, UsageError
from cbs_opt.instance import Instance
from cbs_opt.monitor import Monitor
from cbs_opt.registry import register
from cbs_opt.result import Status
from cbs_opt.solver import OBJECTIVES, Capabilities, Context, Parameters, Solver, option
from cbs_opt.solvers.mip.joint_model import ScaledJoint, pyomo_joint
from cbs_opt.solvers.mip.selection_model import UNITS, pyomo_linear, pyomo_selection, rlt_model
from cbs_opt.solvers.mip.start import Scaled, Start, check_objective
from cbs_opt.stop import Stop
from cbs_opt.typing import FloatArray

logger = logging.getLogger("cbs_opt")

FORMULATIONS = ("auto", "miqp", "perspective", "outer", "rlt")

_INTERFACES = {
    "highs": ("appsi_highs",),
    "scip": ("scip_direct", "scip"),
    "gurobi": ("gurobi_direct", "gurobi"),
    "cplex": ("cplex_direct", "cplex"),
}
"""Names of Pyomo's interfaces to a solver, best first; others go by their own name."""

_INSTALL = {
    "highs": "pip install highspy",
    "scip": 'pip install "cbs-opt[scip]"',
    "gurobi": 'pip install "cbs-opt[gurobi]"',
    "cbc": "install the program `cbc` of COIN-OR",
    "glpk": "install the program `glpsol` of GLPK",
}

_LINEAR = ("highs", "cbc", "glpk")  # take no MIQP
_TIME_LIMIT = {
    "highs": "time_limit",
    "scip": "limits/time",
    "gurobi": "TimeLimit",
    "cbc": "seconds",
    "glpk": "tmlim",
    "cplex": "timelimit",
}
_GAP = {
    "highs": "mip_rel_gap",
    "scip": "limits/gap",
    "gurobi": "MIPGap",
    "cbc": "ratioGap",
    "glpk": "mipgap",
    "cplex": "mip_tolerances_mipgap",
}
_RELATIVE_GAP = 1e-7
_MARGIN = 5e-7  # that bounds are reduced by, in scaled units: the tolerances are those of other solvers
_POLL = 0.05
_PATIENCE = 10.0


@dataclass(frozen=True)
class PyomoParameters(Parameters):
    """Which solver, and which formulation."""

    solver: str = option("highs", "highs, scip, gurobi, cbc, glpk, cplex, or the name of a Pyomo interface")
    formulation: str = option(
        "auto",
        "miqp, perspective (cones; joint only), outer (tangents), rlt (products; selection only); auto: miqp, or "
        "outer for a solver of linear problems, and for scip on the joint objective",
    )
    start: bool = option(True, "scale and bound by the selection of a short run of `search` or `joint`")

    def __post_init__(self) -> None:
        if self.formulation not in FORMULATIONS:
            listed = "', '".join(FORMULATIONS)
            raise UsageError(f"`formulation` must be one of '{listed}', got '{self.formulation}'")


@register("pyomo")
class PyomoSolver(Solver):
    """A solver called through Pyomo on the MIQP, the cones, or the MILPs of `highs`; an iteration is one call."""

    summary = "exact by any solver that Pyomo finds: MIQP, cones, or the MILPs of `highs`"
    supports = Capabilities(
        objectives=frozenset(OBJECTIVES), cross_groups=True, bound=True, warm_start=True,
        not_worse_than_magnitude=True,
    )  # fmt: skip
    parameters_type = PyomoParameters
    parameters: PyomoParameters

    def check_supports(self, instance: Instance, context: Context) -> None:
        """Refuse solvers that are not installed, and quadratic formulations for solvers of linear problems."""
        super().check_supports(instance, context)
        formulation = self.parameters.formulation
        check_objective(instance, context, formulation)
        self._interface()
        if formulation in ("miqp", "perspective") and self._family() in _LINEAR:
            raise SolverError(
                f"'{self.parameters.solver}' takes no mixed-integer quadratic problem: set `formulation` to "
                + ("'outer' or 'rlt'" if context.objective == "selection" else "'outer'")
            )

    def prepare(self, instance: Instance, context: Context) -> None:
        """Compile, presolve."""
        self._start = Start(instance, context, self.parameters.start)

    def run(self, instance: Instance, context: Context) -> Status:
        """Start, then one model, or a sequence of them with growing sets of tangents."""
        monitor = context.monitor
        # The first incumbent is withheld until the solver has accepted the model: if it refuses, the run ends with
        # an error and not with the result of a heuristic.
        self._held = Monitor(Stop(should_stop=monitor.should_stop))
        held = Context(context.objective, context.seed, self._held, context.warm_start)
        problem = self._start.run(held)
        if held.monitor.closed or problem is None or monitor.should_stop():
            self._publish(monitor)
            return Status.OPTIMAL if context.monitor.closed else Status.CONVERGED
        formulation = self.parameters.formulation
        joint = isinstance(problem, ScaledJoint)
        if formulation == "auto":
            outer = self._family() in _LINEAR or (joint and self._family() == "scip")
            formulation = "outer" if outer else "miqp"
        context.extras["formulation"] = formulation
        if formulation == "outer":
            return self._outer(problem, context)
        if isinstance(problem, ScaledJoint):
            model = pyomo_joint(problem, UNITS, formulation == "perspective")
        elif formulation == "miqp":
            model = pyomo_selection(problem, UNITS)
        else:
            model = pyomo_linear(rlt_model(problem).in_units(UNITS))
        self._call(model, problem, context)
        return Status.OPTIMAL if context.monitor.closed else Status.CONVERGED

    def _publish(self, monitor: Monitor) -> None:
        """Report the withheld incumbent."""
        held = self._held
        if held.objective is not None and held.pruned is not None:
            monitor.report(held.objective, held.pruned)
        if held.bound is not None:
            monitor.report_bound(held.bound)

    def _outer(self, problem: Scaled, context: Context) -> Status:
        monitor = context.monitor
        assert self._held.pruned is not None
        model = self._start.outer_model(problem, UNITS, True, monitor.should_stop)
        model.touch(problem.restrict(self._held.pruned))
        while not monitor.should_stop():
            y = self._call(pyomo_linear(model.build()), problem, context)
            if context.monitor.closed:
                return Status.OPTIMAL
            if y is None or not model.touch(y):
                break
        return Status.CONVERGED

    def _call(self, model: Any, problem: Scaled, context: Context) -> FloatArray | None:
        """Solve one model, report its selection and bound; returns the selection's y."""
        monitor = context.monitor
        backend = self._interface()
        family = self._family()
        options: dict[str, Any] = {}
        if family == "scip":
            # Its log goes through a pipe that is not read while it computes: a long one would block forever.
            options["display/verblevel"] = 0
        if family in _GAP:
            options[_GAP[family]] = _RELATIVE_GAP
        if family in _TIME_LIMIT and np.isfinite(monitor.remaining):
            seconds = max(monitor.remaining, 0.01)
            options[_TIME_LIMIT[family]] = int(np.ceil(seconds)) if family == "glpk" else seconds
        outcome: list[Any] = []

        def work() -> None:
            try:
                outcome.append(backend.solve(model, load_solutions=False, options=options))
            except Exception as error:
                outcome.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        waited = 0.0
        while thread.is_alive() and waited < _PATIENCE:
            thread.join(_POLL)
            # Not every interface can be interrupted: the limit was passed on, and an interrupt does not wait.
            if monitor.should_stop():
                waited = _PATIENCE if monitor.reason is Status.INTERRUPTED else waited + _POLL
        monitor.advance()
        if outcome and isinstance(outcome[0], Exception):
            raise SolverError(self._complaint(outcome[0])) from outcome[0]
        self._publish(monitor)
        if not outcome:
            return None
        results = outcome[0]
        _count(backend, results, context.extras)
        condition = str(results.solver.termination_condition)
        context.extras["termination"] = condition
        bound = results.problem.lower_bound
        if isinstance(bound, int | float) and np.isfinite(bound) and condition not in ("infeasible", "error"):
            assert monitor.objective is not None
            value = float(bound) / UNITS
            monitor.report_bound(
                min(problem.from_units(value - _MARGIN * max(1.0, abs(value))), monitor.objective)
            )
        if len(results.solution) == 0:
            return None
        with _silent():  # it warns about solutions at a limit
            model.solutions.load_from(results)
        values = [model.v[i].value for i in range(problem.n)]
        if any(value is None for value in values):
            return None
        y: FloatArray = np.array(values, dtype=np.float64).round()
        pruned = problem.selection(y)
        if pruned is None:
            return None
        monitor.report(problem.loss(pruned), pruned)
        return y

    def _family(self) -> str:
        """The solver behind the name of an interface."""
        name = self.parameters.solver
        return next((family for family in _TIME_LIMIT if family in name), name)

    def _interface(self) -> Any:
        """The first of Pyomo's interfaces that works here."""
        try:
            import pyomo.environ as pyo
        except ModuleNotFoundError as error:
            raise SolverError("solver 'pyomo' needs pyomo: pip install pyomo") from error
        name = self.parameters.solver
        try:
            with _silent():  # it prints a traceback for an unknown name
                for interface in _INTERFACES.get(name, (name,)):
                    backend = pyo.SolverFactory(interface)
                    if backend.available(exception_flag=False):
                        return backend
        except Exception as error:
            raise SolverError(self._complaint(error)) from error
        remedy = _INSTALL.get(self._family(), "install it, or set `solver` to one that is installed")
        raise SolverError(f"solver 'pyomo' cannot find '{name}': {remedy}")

    def _complaint(self, error: Exception) -> str:
        """One sentence for an exception of a solver."""
        text = " ".join(str(error).split())
        name = self.parameters.solver
        if "icense" in text:
            return (
                f"'{name}' refuses this size with its present licence: install a full licence of '{name}' ({text})"
            )
        return f"'{name}' failed: {type(error).__name__}: {text}"


@contextmanager
def _silent() -> Iterator[None]:
    """Suppress the log of Pyomo on the terminal."""
    pyomo_logger = logging.getLogger("pyomo")
    level = pyomo_logger.level
    pyomo_logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        pyomo_logger.setLevel(level)


def _count(backend: Any, results: Any, extras: dict[str, Any]) -> None:
    """Add the nodes and the seconds that the solver reports, if its interface provides them."""
    inner: Any = getattr(backend, "_solver_model", None)
    told: dict[str, tuple[Callable[[], Any], ...]] = {
        "nodes": (lambda: inner.NodeCount, lambda: inner.getNNodes(), lambda: inner.getInfo().mip_node_count),
        "solver_seconds": (lambda: inner.Runtime, lambda: inner.getSolvingTime(), lambda: inner.getRunTime()),
    }
    for name, ways in told.items():
        for way in ways:
            try:
                value = way()
            except Exception:
                continue
            extras[name] = extras.get(name, 0) + (max(int(value), 0) if name == "nodes" else float(value))
            break
