"""The solver `exact`: branch and bound, with incumbents from a heuristic, and optionally a certificate."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cbs_opt.errors import OutputError, SolutionError, SolverError, UsageError
from cbs_opt.files.atomic import check_writable
from cbs_opt.files.paths import real_path
from cbs_opt.instance import Instance
from cbs_opt.losses import joint_loss
from cbs_opt.monitor import Monitor
from cbs_opt.registry import register
from cbs_opt.result import Status
from cbs_opt.solver import OBJECTIVES, Capabilities, Context, Parameters, Solver, option
from cbs_opt.solvers.exact.kept_sets import PAIRS_PER_SECOND, KeptSets
from cbs_opt.solvers.exact.turns import PausedSearch, SearchTurns
from cbs_opt.solvers.joint.breeding import LARGEST
from cbs_opt.solvers.joint.rank_deficient import check_well_posed, is_rank_deficient
from cbs_opt.solvers.joint.swap_search import QUICK, JointSearch
from cbs_opt.solvers.kernels import loading
from cbs_opt.solvers.problem.joint_problem import JointProblem
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.selection.search import Search
from cbs_opt.solvers.trees.prove import MAX_WEIGHTS, Prover, check_size
from cbs_opt.stop import Stop

logger = logging.getLogger("cbs_opt")

_MOVES = 10  # of `joint` for a cycle of `search`
_SMALL, _LONGEST = 500, 10  # weights below which a heuristic takes more iterations, and how many times more

MOST_SECONDS = 600.0
"""Estimated time up to which the kept sets of a singular problem are counted without a time limit."""


@dataclass(frozen=True)
class ExactParameters(Parameters):
    """The source of the first incumbent, and the certificate."""

    heuristic: int = option(120, "number of weights from which a heuristic comes before any branching")
    effort: int = option(
        12, "iterations of the heuristic at least: cycles for selection, tens of moves for joint; 0 for none"
    )
    certificate: str | None = option(
        None, "file for the proof of the bound, which `cbs-solve --check` verifies", writes=True
    )

    def __post_init__(self) -> None:
        for name in ("heuristic", "effort"):
            if getattr(self, name) < 0:
                raise UsageError(f"`{name}` must not be negative, got {getattr(self, name)}")


@register("exact")
class Exact(Solver):
    """Branch and bound with proof, for both objectives, over one problem or many components under one budget.

    `search` or `joint` finds the first incumbent, before any branching for larger problems, after a few nodes for
    smaller ones; then `trees.prove.Prover` branches, and with a time limit the search goes on between nodes; see
    `turns`. An iteration is a node.
    """

    summary = "branch and bound: proven optima, valid bounds when stopped, blocks joined exactly"
    supports = Capabilities(
        objectives=frozenset(OBJECTIVES), bound=True, warm_start=True, not_worse_than_magnitude=True
    )
    parameters_type = ExactParameters
    parameters: ExactParameters

    def check_supports(self, instance: Instance, context: Context) -> None:
        """Refuse a singular Hessian for the joint problem where too many weights are kept, or there are groups."""
        super().check_supports(instance, context)
        if context.objective == "joint" and is_rank_deficient(instance):
            check_well_posed(instance, self.name)
            if instance.budget.groups is not None:
                raise SolverError(
                    "solver 'exact' cannot take the instance: the Hessian is singular, and with groups the kept "
                    "sets are not counted: 'joint' searches, and a positive damping allows a proof"
                )

    def prepare(self, instance: Instance, context: Context) -> None:
        """Compile, presolve, check sizes."""
        if self.parameters.certificate is not None:
            check_target(instance, self.parameters.certificate)
        check_size(instance, context.objective)
        self._singular = context.objective == "joint" and is_rank_deficient(instance)
        if self._singular:
            loading.request("joint")
            return
        problem = SelectionProblem(instance) if context.objective == "selection" else JointProblem(instance)
        self._prover = Prover(problem)
        loading.request(*(context.objective,) * bool(self.parameters.effort), *self._prover.kernels)

    def run(self, instance: Instance, context: Context) -> Status:
        """Find a first incumbent, prove, and write the certificate if one is requested."""
        if self._singular:
            if self.parameters.certificate is not None:
                context.extras["certificate"] = {"error": "the Hessian is singular"}
                logger.warning("no certificate: the Hessian is singular, and the proof counts the kept sets")
            return self._count(instance, context)
        status = self._prove(instance, context)
        if self.parameters.certificate is not None:
            self._certify(Path(self.parameters.certificate), instance, context)
        return status

    def _prove(self, instance: Instance, context: Context) -> Status:
        prover, monitor = self._prover, context.monitor
        prover.start(context)
        if prover.problem.n and monitor.should_stop():
            return Status.CONVERGED
        context.extras |= {"nodes": 0, "open": 1}
        if not (self.parameters.effort and prover.problem.n):
            return prover.run(context)
        with contextlib.closing(PausedSearch(self._heuristic(), instance, context, prover.problem)) as search:
            turns = SearchTurns(search, context, self._steps(context))
            if prover.problem.n >= self.parameters.heuristic:
                turns.take()
            if monitor.closed or monitor.should_stop():
                return Status.OPTIMAL if monitor.closed else Status.CONVERGED
            return prover.run(context, turns=turns)

    def _count(self, instance: Instance, context: Context) -> Status:
        """Search, then count all kept sets of a singular problem, if that takes no longer than what remains."""
        monitor = context.monitor
        steps = Stop(max_iterations=max(1, 10 * self.parameters.effort), should_stop=monitor.should_stop)
        inner = replace(context, monitor=Monitor(steps), threads=1, extras={})
        search = JointSearch()
        search.check_supports(instance, inner)
        search.prepare(instance, inner)
        search.run(instance, inner)
        if inner.monitor.pruned is not None:
            monitor.report(joint_loss(instance, inner.monitor.pruned), inner.monitor.pruned)
        monitor.report_bound(0.0 if inner.monitor.bound is None else inner.monitor.bound)
        if monitor.closed:
            return Status.OPTIMAL
        sets = KeptSets(instance)
        seconds = sets.work / PAIRS_PER_SECOND
        allowed = MOST_SECONDS if monitor.stop.time_limit is None else 2.0 * monitor.remaining
        if monitor.closed or seconds > allowed:
            if not monitor.closed:
                logger.info(
                    "the Hessian is singular: only counting all kept sets proves an optimum, about "
                    f"{seconds:.0f} s; a damping allows other bounds"
                )
            return Status.OPTIMAL if monitor.closed else Status.CONVERGED
        finished = sets.run(monitor.should_stop)
        pruned = sets.mask()
        if pruned is not None:
            monitor.report(joint_loss(instance, pruned), pruned)
        if finished and sets.unclear:
            logger.info("some sets of columns are nearly dependent, beyond the precision of float64: no proof")
        elif finished and monitor.objective is not None:
            whole = joint_loss(instance, np.ones(instance.n, dtype=bool))
            least = whole - sets.gain - 1e-14 * whole / sets.least_pivot
            monitor.report_bound(min(max(least, 0.0), monitor.objective))
        return Status.OPTIMAL if monitor.closed else Status.CONVERGED

    def _heuristic(self) -> Solver:
        """The heuristic of the package for the objective, without a proof of its own."""
        if isinstance(self._prover.problem, JointProblem):
            return JointSearch({"bound_steps": 0, "proof": 0})
        return Search({"proof": 0})

    def _steps(self, context: Context) -> int:
        """Iterations of the heuristic without improvement that end its first turn, more where they are short."""
        joint, n = context.objective == "joint", self._prover.problem.n
        steps = int(self.parameters.effort * (_MOVES if joint else 1) * np.clip(_SMALL / n, 1, _LONGEST))
        return steps * QUICK if joint and n <= LARGEST else steps

    def _certify(self, path: Path, instance: Instance, context: Context) -> None:
        """Write the certificate; if this fails, the solution is kept."""
        from cbs_opt.solvers.exact.certify import certify

        try:
            if self._prover.sorted and self._prover.problem.n > MAX_WEIGHTS:
                raise SolutionError(
                    f"{self._prover.problem.n} uncoupled weights in groups are sorted, without a tree to record"
                )
            found = certify(path, instance, self._prover.problem, context.monitor, self._prover.tables())
        except (OutputError, SolutionError) as error:
            logger.warning(f"no certificate: {error}")
            found = {"error": str(error)}
        context.extras["certificate"] = found


def check_target(instance: Instance, certificate: str) -> None:
    """Refuse a certificate that would overwrite the instance or cannot be written."""
    if instance.path is not None and real_path(certificate) == real_path(instance.path):
        raise OutputError(f"{certificate}: is an input; the certificate would overwrite it")
    check_writable(certificate)
