"""Preparation of a model: a first incumbent and bound for either objective, and the scaled problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from cbs_opt.errors import SolverError
from cbs_opt.instance import Instance
from cbs_opt.monitor import Monitor
from cbs_opt.solver import Context
from cbs_opt.solvers.joint.rank_deficient import is_rank_deficient
from cbs_opt.solvers.joint.swap_search import JointSearch
from cbs_opt.solvers.kernels import loading
from cbs_opt.solvers.kernels.warm_up import warm_up_products
from cbs_opt.solvers.mip.joint_model import ScaledJoint, start_joint
from cbs_opt.solvers.mip.joint_outer import JointOuterModel
from cbs_opt.solvers.mip.selection_model import LinearModel, check_open_weights
from cbs_opt.solvers.mip.selection_outer import OuterModel, Separated
from cbs_opt.solvers.problem.joint_problem import JointProblem
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.selection.relaxation import Relaxation
from cbs_opt.solvers.selection.search import Search
from cbs_opt.solvers.trees.prove import check_size
from cbs_opt.stop import Stop
from cbs_opt.typing import FloatArray

_SEARCH_CYCLES = 60
_SEARCH_SECONDS = 10.0  # far above what the cycles take

Scaled = SelectionProblem | ScaledJoint


class Outer(Protocol):
    """A MILP below the objective that grows by tangents."""

    @property
    def tangents(self) -> int:
        """Number of tangents."""

    def touch(self, y: FloatArray) -> bool:
        """Make it exact at a binary y; whether that needed any new tangent."""

    def cut(self, columns: FloatArray, tolerance: float) -> bool:
        """Add the tangents that a point of the linear relaxation violates; whether there were any."""

    def point(self, y: FloatArray) -> FloatArray:
        """All columns at a binary y."""

    def build(self, relaxed: bool = False) -> LinearModel:
        """The model so far."""


def check_objective(instance: Instance, context: Context, formulation: str) -> None:
    """Refuse formulations that an objective does not have, and a singular Hessian for the joint objective.

    Raises
    ------
    SolverError
    """
    wrong = {"joint": "rlt", "selection": "perspective"}[context.objective]
    if formulation == wrong:
        raise SolverError(f"`formulation` '{wrong}' does not apply to the objective '{context.objective}'")
    if context.objective == "joint" and is_rank_deficient(instance):
        raise SolverError(
            "the model of the joint objective needs a positive definite Hessian, this one is singular: a positive "
            "damping is needed, or 'joint' and 'exact' for few kept weights"
        )


class Start:
    """Preparation and start of a run over either objective.

    Parameters
    ----------
    instance : Instance
    context : Context
    heuristic : bool
        Whether a short run of a heuristic finds the first selection, or the diagonal alone.
    """

    def __init__(self, instance: Instance, context: Context, heuristic: bool) -> None:
        self.instance, self.joint = instance, context.objective == "joint"
        self._heuristic: JointSearch | Search | None = None
        if self.joint:
            check_open_weights(instance.n if instance.fixed is None else int((instance.fixed == 0).sum()))
            check_size(instance, "joint")
            loading.wait("joint_tables", should_stop=context.monitor.should_stop)
            self._joint = JointProblem(instance)
            if heuristic:
                self._heuristic = JointSearch({"bound_steps": 0})
        else:
            loading.wait("selection", should_stop=context.monitor.should_stop)
            warm_up_products(instance.curvature.as_factor() is not None)
            self._selection = SelectionProblem(instance)
            check_open_weights(self._selection.n)
            if heuristic:
                self._heuristic = Search()
        if self._heuristic is not None:
            self._heuristic.prepare(instance, context)

    def run(self, context: Context) -> Scaled | None:
        """Report a first selection and bounds; the scaled problem, or None if nothing is left to solve."""
        monitor = context.monitor
        if self.joint:
            assert not isinstance(self._heuristic, Search)
            start_joint(context, self._joint, self._heuristic)
            assert monitor.pruned is not None
            joint = ScaledJoint(self._joint, monitor.pruned)
            if not joint.n:
                assert monitor.objective is not None
                monitor.report_bound(monitor.objective)
                return None
            monitor.report_bound(min(joint.from_units(joint.bound - 1e-9), self._joint.loss(monitor.pruned)))
            return joint
        assert not isinstance(self._heuristic, JointSearch)
        self._multipliers = start_selection(context, self._selection, self._heuristic)
        if not self._selection.parts:
            assert monitor.objective is not None
            monitor.report_bound(monitor.objective)  # a sum of separate terms: the start is its sorted minimum
            return None
        assert monitor.pruned is not None
        problem = self._selection.in_units_of(monitor.pruned)
        self._limit = problem.value(problem.restrict(monitor.pruned))
        return problem

    def outer_model(self, problem: Scaled, units: float, shift: bool, should_stop: Callable[[], bool]) -> Outer:
        """The model with tangents of a problem that `run` has given."""
        if isinstance(problem, ScaledJoint):
            return JointOuterModel(problem, units)
        multipliers = self._multipliers * self._selection.scale / problem.scale
        return OuterModel(problem, Separated(problem, self._limit, multipliers, shift, should_stop), units)


def start_selection(context: Context, problem: SelectionProblem, search: Search | None) -> FloatArray:
    """Report a first selection and bound; returns the multipliers of the groups in the relaxation, float64 (G,).

    With `search` its incumbent after a fixed number of cycles, else the selection that is best by its diagonal.
    The bound is that of the convex relaxation.
    """
    monitor = context.monitor
    first = problem.cheapest()
    monitor.report(problem.objective(first), problem.expand(first))
    if context.warm_start is not None:
        given = problem.restrict(context.warm_start)
        monitor.report(problem.objective(given), context.warm_start)
    if problem.nonnegative:
        monitor.report_bound(0.0)
    if search is not None and not monitor.should_stop():
        inner = Monitor(
            Stop(max_iterations=_SEARCH_CYCLES, time_limit=_SEARCH_SECONDS, should_stop=monitor.should_stop)
        )
        search.run(problem.instance, Context("selection", context.seed, inner, monitor.pruned))
        if inner.objective is not None and inner.pruned is not None:
            monitor.report(inner.objective, inner.pruned)
    relaxed = Relaxation(problem)
    if problem.n and not monitor.should_stop():
        relaxed.solve(size=256, tolerance=1e-7, rounds=50, should_stop=monitor.should_stop)
        monitor.report_bound(relaxed.bound())
    slope = relaxed.slope(0.0)
    threshold = problem.threshold(slope)
    multipliers = np.zeros(problem.budget.size)
    multipliers[problem.group] = np.where(np.isfinite(threshold), threshold, 0.0)
    return multipliers
