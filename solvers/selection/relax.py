"""The convex relaxation as a solver: a lower bound, and the rounding of its solution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cbs_opt.device import Card, is_wanted, or_on_cpu
from cbs_opt.errors import UsageError
from cbs_opt.instance import Instance
from cbs_opt.registry import register
from cbs_opt.result import Status
from cbs_opt.solver import Capabilities, Context, Parameters, Solver, option
from cbs_opt.solvers.kernels import loading
from cbs_opt.solvers.kernels.warm_up import warm_up_products
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.selection.incumbent import Incumbent, candidate_swaps
from cbs_opt.solvers.selection.relaxation import Relaxation

_ROUNDS_AT_A_TIME = 8
_STALE = 5  # times that many rounds without a better point or bound, after which rounding hides what is left


@dataclass(frozen=True)
class RelaxParameters(Parameters):
    """Accuracy of the relaxation."""

    tolerance: float = option(1e-7, "largest violation of optimality, relative to the objective")
    working_set: int = option(256, "violating variables of a working set")

    def __post_init__(self) -> None:
        if self.tolerance <= 0:
            raise UsageError(f"`tolerance` must be positive, got {self.tolerance}")
        if self.working_set < 2:
            raise UsageError(f"`working_set` must be at least 2, got {self.working_set}")


@register("relax")
class Relax(Solver):
    """min ½ xᵀQx + cᵀx over the box and the budget, for its bound; an iteration is a round of `Relaxation`.

    The selection is the rounding of x, repaired by swaps. `extras` tells the number of fractional variables, the
    relaxed objective, and the loss of the plain rounding.
    """

    summary = "convex relaxation: lower bound, rounding"
    supports = Capabilities(bound=True, device=True, not_worse_than_magnitude=True)
    parameters_type = RelaxParameters
    parameters: RelaxParameters

    def prepare(self, instance: Instance, context: Context) -> None:
        """Compile, presolve, build columns."""
        loading.request("selection")
        warm_up_products(instance.curvature.as_factor() is not None)
        self._problem = SelectionProblem(instance, context.threads)
        self._card: Card | None = None
        if is_wanted(context.device, instance.n):
            from cbs_opt.solvers.selection.device_relaxation import card_for

            self._card = card_for(self._problem, context)

    def run(self, instance: Instance, context: Context) -> Status:
        """Solve, and report bound and rounding every few rounds."""
        problem, monitor = self._problem, context.monitor
        if self._card is not None and problem.n:
            with or_on_cpu("the relaxation", context.extras):
                from cbs_opt.solvers.selection.device_relaxation import relax_on

                return relax_on(self._card, problem, context, self.parameters.tolerance)
        relaxed = Relaxation(problem)
        rounded = Incumbent(problem, relaxed.x)
        monitor.report(problem.objective(rounded.y), problem.expand(rounded.y))
        done = problem.n == 0 or not loading.wait("selection", should_stop=monitor.should_stop)
        stale, value = 0, np.inf
        while not done and not monitor.should_stop():
            rounds = relaxed.solve(
                size=self.parameters.working_set,
                tolerance=self.parameters.tolerance,
                rounds=_ROUNDS_AT_A_TIME,
                should_stop=monitor.should_stop,
            )
            monitor.advance(rounds)
            better = monitor.report_bound(relaxed.bound()) or relaxed.value() < value - 1e-14 * abs(value)
            stale, value = 0 if better else stale + 1, min(value, relaxed.value())
            done = rounds < _ROUNDS_AT_A_TIME or stale >= _STALE
            rounded = Incumbent(problem, problem.smallest(-relaxed.x))
            monitor.report(problem.objective(rounded.y), problem.expand(rounded.y))
        monitor.report_bound(relaxed.bound())
        context.extras["rounding"] = problem.objective(rounded.y)
        candidate_swaps(rounded, monitor.should_stop)
        monitor.report(problem.objective(rounded.y), problem.expand(rounded.y))
        context.extras["fractional"] = relaxed.fractional
        context.extras["relaxed_objective"] = problem.from_units(relaxed.value())
        context.extras["steps"] = relaxed.steps
        return Status.OPTIMAL if monitor.closed else Status.CONVERGED
