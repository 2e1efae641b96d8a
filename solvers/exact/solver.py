"""Branch and bound with proof, for both objectives, over one dense piece or many under one budget."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cbs_opt.errors import OutputError, SolutionError, UsageError
from cbs_opt.files.atomic import check_writable
from cbs_opt.instance import Instance
from cbs_opt.monitor import Monitor
from cbs_opt.registry import register
from cbs_opt.result import Status
from cbs_opt.solver import OBJECTIVES, Capabilities, Context, Parameters, Solver, option
from cbs_opt.solvers.joint.swap_search import JointSearch as JointHeuristic
from cbs_opt.solvers.problem.cases import JointCase, SelectionCase
from cbs_opt.solvers.selection.search import Search as SelectionHeuristic
from cbs_opt.solvers.trees.best_first import Int8Array
from cbs_opt.solvers.trees.block_search import BlockSearch
from cbs_opt.solvers.trees.joint_worker import JointSearch, prepare_joint
from cbs_opt.solvers.trees.selection_worker import TOLERANCE, SelectionSearch, prepare_selection
from cbs_opt.solvers.trees.tables import JointPiece, SelectionPiece
from cbs_opt.stop import Stop
from cbs_opt.typing import BoolArray

logger = logging.getLogger("cbs_opt")

_FINEST = 1e-12  # tolerance of a tree
_ATTEMPTS = 3
_SLICE_WORK = 4e6  # nodes of a slice times squared variables: some milliseconds
_STEP = 0.02  # share of the gap that a better bound must close to be reported


@dataclass(frozen=True)
class ExactParameters(Parameters):
    """Where the first selection comes from, and whether the proof is kept."""

    heuristic: int = option(120, "weights from which on a heuristic of the package looks for the first selection")
    effort: int = option(12, "its iterations: cycles for selection, tens of moves for joint")
    certificate: str | None = option(None, "file for what proves the bound, which `cbs-solve --check` can check")

    def __post_init__(self) -> None:
        for name in ("heuristic", "effort"):
            if getattr(self, name) < 0:
                raise UsageError(f"`{name}` must not be negative, got {getattr(self, name)}")


@register("exact")
class Exact(Solver):
    """Best-first search over depth-first trees; an iteration is a node.

    Selection: the box and budget relaxation of every node by Newton steps on its free variables, a diagonal shift
    near the semidefinite bound where a subproblem turns out large, reduced costs, warm-started children. Joint:
    the perspective relaxation, likewise with a diagonal fitted to the subproblem. Several blocks under one budget:
    a table of bounds per block over the numbers to prune, joined by dynamic programming; only the entries on which
    the joined bound rests are solved. With one thread the same instance gives the same nodes.
    """

    summary = "branch and bound: proven optima, valid bounds when stopped, blocks joined exactly"
    supports = Capabilities(objectives=frozenset(OBJECTIVES), bound=True, warm_start=True)
    parameters_type = ExactParameters
    parameters: ExactParameters

    def check_supports(self, instance: Instance, context: Context) -> None:
        """Refuse a singular Hessian where the joint problem needs its inverse."""
        super().check_supports(instance, context)
        if context.objective == "joint":
            instance.curvature.check_regular()

    def prepare(self, instance: Instance, context: Context) -> None:
        """Compile, presolve, check sizes."""
        if self.parameters.certificate is not None:
            check_target(instance, self.parameters.certificate)
        warm_up(context.objective)
        self._search: BlockSearch | None = None
        self._case = SelectionCase(instance) if context.objective == "selection" else JointCase(instance)

    def run(self, instance: Instance, context: Context) -> Status:
        """Find a first selection, then prove, and write down the proof where that is asked for."""
        status = self._prove(instance, context)
        if self.parameters.certificate is not None:
            self._certify(Path(self.parameters.certificate), instance, context)
        return status

    def _certify(self, path: Path, instance: Instance, context: Context) -> None:
        """Write the certificate; the solution stands without it too."""
        from cbs_opt.solvers.exact.certify import certify

        try:
            found = certify(path, instance, self._case, context.monitor, self._search)
        except (OutputError, SolutionError) as error:
            logger.warning(f"no certificate: {error}")
            found = {"error": str(error)}
        context.extras["certificate"] = found

    def _prove(self, instance: Instance, context: Context) -> Status:
        case, monitor = self._case, context.monitor
        report = _Report(case, monitor)
        report.selection(case.first())
        if context.warm_start is not None:
            report.selection(context.warm_start)
        if case.n == 0:
            report.bound(monitor.objective if monitor.objective is not None else case.offset)
            return self._status(monitor)
        if monitor.should_stop():
            return Status.CONVERGED
        context.extras |= {"nodes": 0, "open": 1}
        if self.parameters.effort and case.n >= self.parameters.heuristic:
            self._heuristic(instance, context, report)
        solve = self._dense if case.dense else self._blocks
        tolerance = TOLERANCE
        for _ in range(_ATTEMPTS):
            # Where an offset cancels most of the loss, a tree is closed to a smaller share of its own value.
            assert monitor.objective is not None
            inner = max(abs(monitor.objective - case.offset), 1e-300)
            tolerance = max(_FINEST, min(tolerance, TOLERANCE * abs(monitor.objective) / inner))
            solve(context, report, tolerance)
            if monitor.should_stop() or self._status(monitor) is Status.OPTIMAL:
                break
            tolerance *= 0.1
        return self._status(monitor)

    def _status(self, monitor: Monitor) -> Status:
        return Status.OPTIMAL if monitor.closed else Status.CONVERGED

    def _heuristic(self, instance: Instance, context: Context, report: _Report) -> None:
        """A first selection from the package's heuristic, for a fixed number of its iterations."""
        joint = context.objective == "joint"
        steps = self.parameters.effort * (10 if joint else 1)
        stop = Stop(max_iterations=steps, should_stop=context.monitor.should_stop)
        inner = Context(context.objective, context.seed, Monitor(stop), context.warm_start, threads=1)
        solver: Solver = (
            JointHeuristic({"bound_steps": 0, "proof": 0}) if joint else SelectionHeuristic({"proof": 0})
        )
        solver.prepare(instance, inner)
        solver.run(instance, inner)
        if inner.monitor.pruned is not None:
            report.selection(inner.monitor.pruned)
        if inner.monitor.bound is not None:
            report.bound(inner.monitor.bound)

    def _dense(self, context: Context, report: _Report, tolerance: float) -> None:
        """One tree over all open weights."""
        case, monitor = report.case, context.monitor
        assert monitor.pruned is not None
        start: Int8Array = monitor.pruned[case.index].astype(np.int8)
        search: SelectionSearch | JointSearch
        if isinstance(case, SelectionCase):
            problem = case.problem
            search = prepare_selection(
                case.matrix(),
                problem.linear,
                problem.group,
                problem.budget,
                [start],
                tolerance,
                should_stop=monitor.should_stop,
            )
        else:
            A, H, w = case.matrices()
            search = prepare_joint(
                A,
                H,
                w,
                case.group,
                case.keep,
                [start],
                lambda y: case.value(case.expand(y)) - case.offset,
                tolerance,
            )
        queue = search.queue
        seen = [0, np.inf]

        def progress() -> bool:
            monitor.advance(queue.nodes - int(seen[0]))
            seen[0] = queue.nodes
            if queue.value < seen[1]:
                seen[1] = queue.value
                report.selection(case.expand(search.selection()))
            report.bound(case.offset + case.scale * search.bound(), last=queue.finished())
            context.extras |= {"nodes": queue.nodes, "open": queue.open, "diagonals": queue.diagonals}
            return monitor.should_stop()

        size = int(np.clip(_SLICE_WORK / case.n**2, 1, 200))
        queue.run(progress, context.threads or 1, _limited(size, monitor.stop))
        progress()
        report.bound(case.offset + case.scale * search.bound(), last=True)

    def _blocks(self, context: Context, report: _Report, tolerance: float) -> None:
        """Pieces under one budget."""
        case, monitor = report.case, context.monitor
        left = case.problem.budget if isinstance(case, SelectionCase) else case.left
        search = BlockSearch(case.pieces(), int(left.sum()), tolerance, context.threads or os.cpu_count() or 1)
        self._search = search
        seen = [0]

        def progress() -> bool:
            monitor.advance(search.nodes - seen[0])
            seen[0] = search.nodes
            if search.path is not None:
                report.selection(case.expand(search.selection()))
            if np.isfinite(search.bound):
                report.bound(case.offset + case.scale * search.bound, last=True)
            context.extras |= {"nodes": search.nodes, "open": search.open, "rounds": search.rounds}
            return monitor.should_stop()

        search.run(progress, monitor.should_stop)
        progress()


class _Report:
    """Passes selections and bounds on to the monitor, in units of the instance."""

    def __init__(self, case: SelectionCase | JointCase, monitor: Monitor) -> None:
        self.case, self.monitor = case, monitor
        self._rounding = 0.0

    def selection(self, pruned: BoolArray) -> None:
        """Offer a selection, bool (n,)."""
        if self.monitor.report(self.case.value(pruned), pruned):
            self._rounding = self.case.rounding(pruned)

    def bound(self, bound: float, last: bool = True) -> None:
        """Offer a bound, unless it is hardly better than the last one and not to be the `last`."""
        monitor = self.monitor
        bound -= self._rounding
        if self.case.nonnegative:
            bound = max(bound, 0.0)
        if monitor.objective is not None:
            bound = min(bound, monitor.objective)
            if not last and monitor.bound is not None:
                missing = monitor.objective - monitor.bound
                if bound - monitor.bound < _STEP * missing:
                    return
        monitor.report_bound(bound)


def check_target(instance: Instance, certificate: str) -> None:
    """Refuse a certificate that would overwrite the instance or cannot be written."""
    if instance.path is not None and Path(certificate).resolve() == instance.path.resolve():
        raise OutputError(f"{certificate}: is an input; the certificate would overwrite it")
    check_writable(certificate)


def _limited(size: int, stop: Stop) -> int:
    """Nodes of a slice: no more than an iteration limit allows."""
    return size if stop.max_iterations is None else max(1, min(size, stop.max_iterations))


def warm_up(objective: str) -> None:
    """Compile the kernels of an objective, by a small problem of every kind."""
    rng = np.random.default_rng(0)
    G = rng.standard_normal((16, 14))
    H, w, group = G.T @ G, rng.standard_normal(14), np.zeros(14, np.int64)
    never: Callable[[], bool] = lambda: False  # noqa: E731
    if objective == "selection":
        Q = H * w[:, None] * w
        search = prepare_selection(Q, np.zeros(14), group, np.array([7]), [])
        worker = search.queue._make_worker(0.0, 0.0, np.array([np.inf]))
        worker.load(search.queue._heap[0][2])
        worker.better_diagonal()
        search.queue.run(never)
        piece: SelectionPiece | JointPiece = SelectionPiece(Q[:3, :3], w[:3])
    else:
        A = np.linalg.inv(H)
        joint = prepare_joint(A, H, w, group, np.array([7]), [])
        worker = joint.queue._make_worker(0.0, 0.0, np.array([np.inf]))
        worker.load(joint.queue._heap[0][2])
        worker.better_diagonal()
        joint.queue.run(never)
        joint.value()
        piece = JointPiece(A[:3, :3], np.linalg.inv(A[:3, :3]), w[:3])
    BlockSearch([piece, piece], 3, TOLERANCE).run(never, never)
