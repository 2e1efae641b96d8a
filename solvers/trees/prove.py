"""Proving a problem: one tree over all open weights, or a table for every component."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from cbs_opt.errors import SolverError
from cbs_opt.instance import Instance
from cbs_opt.memory import available_bytes
from cbs_opt.monitor import Monitor
from cbs_opt.result import Status
from cbs_opt.solver import Context
from cbs_opt.solvers.kernels import loading
from cbs_opt.solvers.kernels.stop_flag import NEVER, stop_flag
from cbs_opt.solvers.problem.decided import decide
from cbs_opt.solvers.problem.joint_problem import JointProblem
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.trees.beside import NoTurns, Turns, one_core_each
from cbs_opt.solvers.trees.block_search import BlockSearch
from cbs_opt.solvers.trees.enumeration import (
    MOST_SETS,
    SETS_PER_SECOND,
    Enumeration,
    nodes_before,
    number_of_sets,
)
from cbs_opt.solvers.trees.joint_worker import JointTree, prepare_joint
from cbs_opt.solvers.trees.selection_worker import TOLERANCE, SelectionTree, prepare_selection
from cbs_opt.solvers.trees.tables import JointTable, SelectionTable, SeparableTable, Table
from cbs_opt.stop import Stop
from cbs_opt.typing import BoolArray, Int8Array

logger = logging.getLogger("cbs_opt")

MAX_WEIGHTS = 2000
"""Largest dense problem of one tree."""

WITHOUT_LIMIT = 100
"""Largest component, in weights, without a time limit: most such blocks that we have are proven in a second."""

LEAST_NODES = 20_000
NODES_PER_ITERATION = 100
"""Nodes after which a proof without any limit gives up: at least, and for each iteration of the search."""

_TABLE_SPEED = 1e5  # squared component sizes, summed, of which a second of branch and bound proves most
_TABLE_WORK = 1e6  # the same, as much as is taken on without a time limit
_JOINT_BYTES, _SELECTION_BYTES = 256, 132  # that a worker of a tree reserves, over the square of its weights
_TELLING = 0.1  # seconds between reports while something else has a turn
_FIRST_SHARE = 0.1  # of a time limit, for the proof that tells what it promises
_FINEST = 1e-12  # tolerance of a tree
_ATTEMPTS = 3
_SLICE_WORK = 4e6  # nodes of a slice times squared variables: some milliseconds
_STEP = 0.02  # share of the gap that a better bound must close to be reported

Provable = SelectionProblem | JointProblem
"""What can be proven."""


def is_provable(sizes: Sequence[int], groups: int, largest: int, stop: Stop) -> bool:
    """Whether branch and bound is likely to prove something of components of these sizes.

    Parameters
    ----------
    sizes : sequence of int
        Weights of the components.
    groups : int
        Groups with a budget of their own; several tie all components together, in one tree.
    largest : int
        Largest component that is taken on.
    stop : Stop
        The work must fit into half of the time, which heuristics use better for more; no limit on iterations.
    """
    if groups > 1:
        sizes = [sum(sizes)]
    if not sizes or groups == 0 or max(sizes) > largest:
        return False
    if stop.time_limit is None:
        return not stop.limits_work and sum(size**2 for size in sizes) <= _TABLE_WORK
    return sum(size**2 for size in sizes) <= 0.5 * stop.time_limit * _TABLE_SPEED


def check_size(instance: Instance, objective: str) -> None:
    """Refuse, before any work, a joint problem that is too large for dense trees.

    Raises
    ------
    SolverError
    """
    if objective == "selection":
        return
    curvature = instance.curvature
    fixed, _, left = decide(instance)
    sizes = [int((fixed[curvature.block_slice(k)] == 0).sum()) for k in range(curvature.number_of_blocks)]
    together = int((left > 0).sum()) > 1 or np.count_nonzero(sizes) <= 1
    largest = sum(sizes) if together else max(sizes)
    if largest > MAX_WEIGHTS or int(curvature.block_sizes.max()) > 2 * MAX_WEIGHTS:
        what = "the instance" if together else "a block"
        raise _too_large(max(largest, int(curvature.block_sizes.max())), what)


def _too_large(size: int, what: str) -> SolverError:
    return SolverError(
        f"solver 'exact' takes at most {MAX_WEIGHTS} coupled weights, {what} has {size}: "
        "'search', 'joint' and 'relax' have no such limit"
    )


class Prover:
    """Branch and bound over a problem; an iteration is a node.

    Selection: the box and budget relaxation of every node by Newton steps on its free variables, a diagonal shift
    near the semidefinite bound where a subproblem turns out large, reduced costs, warm-started children. Joint:
    the perspective relaxation, likewise with a diagonal fitted to the subproblem. Several components under one
    budget: a table of bounds per component over the numbers to prune, joined by dynamic programming; only the
    entries on which the joined bound rests are solved. With one thread the same problem gives the same nodes.

    Parameters
    ----------
    problem : SelectionProblem or JointProblem

    Attributes
    ----------
    search : BlockSearch or None
        The tables, where there are several components under one budget.
    one_tree : bool
        Whether one tree takes all open weights.
    sorted : bool
        Whether no weight is coupled, so that sorting each group solves the problem.

    Raises
    ------
    SolverError
        When a component is too large.
    """

    def __init__(self, problem: Provable) -> None:
        self.problem = problem
        self.search: BlockSearch | None = None
        several = int((problem.budget > 0).sum()) > 1
        sizes = problem.component_sizes
        self.sorted = several and not sizes
        self.one_tree = several or (len(sizes) <= 1 and problem.n <= MAX_WEIGHTS)
        if self.one_tree and not self.sorted and problem.n > MAX_WEIGHTS:
            raise _too_large(problem.n, "this instance, whose groups tie all its blocks together,")
        if max(sizes, default=0) > MAX_WEIGHTS:
            raise _too_large(max(sizes), "a block")

    @property
    def kernels(self) -> tuple[str, ...]:
        """Units of `kernels.loading` that a proof needs."""
        kind = "selection" if isinstance(self.problem, SelectionProblem) else "joint"
        return f"{kind}_tree", f"{kind}_tables"

    def tables(self) -> BlockSearch | None:
        """The tables of the components, not yet built where the proof has not begun; None for one tree."""
        return self.search or (None if self.one_tree else self._new_tables(TOLERANCE, 1, NEVER))

    def _new_tables(self, tolerance: float, threads: int, stop: Int8Array) -> BlockSearch:
        problem = self.problem
        return BlockSearch(tables_of(problem, stop), int(problem.budget.sum()), tolerance, threads)

    def start(self, context: Context) -> None:
        """Report first selections."""
        report = Report(self.problem, context.monitor)
        report.selection(self.problem.first())
        if context.warm_start is not None:
            report.selection(context.warm_start)

    def run(
        self,
        context: Context,
        out_of_time: Callable[[], bool] | None = None,
        turns: Turns | None = None,
    ) -> Status:
        """Prove the incumbent of the context's monitor until the gap is closed or a rule stops.

        `out_of_time`, by default that of the monitor, also ends the work on a node; see `stop_flag`. `turns` are
        those of a search between nodes.
        """
        problem, monitor = self.problem, context.monitor
        if problem.n == 0:
            assert monitor.objective is not None
            Report(problem, monitor).bound(monitor.objective)
            return Status.OPTIMAL if monitor.closed else Status.CONVERGED
        if isinstance(problem, SelectionProblem) and self.sorted:
            # The first selection has the cheapest weights of each group.
            Report(problem, monitor).bound(problem.certified_bound(np.zeros(problem.n)))
            return Status.OPTIMAL if monitor.closed else Status.CONVERGED
        if not loading.wait(*self.kernels, should_stop=monitor.should_stop):
            return Status.CONVERGED
        solve = self._one_tree if self.one_tree else self._tables
        turns, tolerance = turns or NoTurns(), TOLERANCE
        workers = self._workers(context)
        for _ in range(_ATTEMPTS):
            # Where an offset cancels most of the loss, a tree is closed to a smaller share of its own value.
            assert monitor.objective is not None
            inner = max(abs(monitor.objective - problem.offset), 1e-300)
            tolerance = max(_FINEST, min(tolerance, TOLERANCE * abs(monitor.objective) / inner))
            with one_core_each(workers), stop_flag(out_of_time or monitor.out_of_time) as stop:
                solve(context, Report(problem, monitor), tolerance, stop, turns)
            if monitor.should_stop() or monitor.closed:
                break
            tolerance *= 0.1
        return Status.OPTIMAL if monitor.closed else Status.CONVERGED

    def _one_tree(self, context: Context, report: Report, tolerance: float, stop: Int8Array, turns: Turns) -> None:
        """One tree over all open weights."""
        problem, monitor, extras = self.problem, context.monitor, context.extras
        assert monitor.pruned is not None
        tree = tree_of(problem, monitor.pruned, tolerance, monitor.should_stop, stop)
        queue = tree.queue
        seen = [0, np.inf, 0.0]
        workers = self._workers(context)
        to_count = self._is_countable(context)  # nothing better than what is found then will be missed

        def tell() -> None:
            monitor.advance(queue.nodes - int(seen[0]))
            seen[0] = queue.nodes
            if queue.value < seen[1]:
                seen[1] = queue.value
                report.selection(problem.expand(tree.selection()))
            report.bound(problem.from_units(tree.bound()), last=queue.finished())
            extras.update({"nodes": queue.nodes, "open": queue.open, "diagonals": queue.shifts})
            seen[2] = monitor.elapsed

        def over() -> bool:
            """Whether a turn ends as the other workers have done all; what they find meanwhile is told."""
            if monitor.elapsed > seen[2] + _TELLING:
                tell()
            return queue.finished()

        def progress() -> bool:
            tell()
            if not to_count and turns.due(workers):
                with queue.one_worker_rests():
                    turns.take(over)
                assert monitor.pruned is not None
                tree.offer(monitor.pruned[problem.index].astype(np.int8))
            return monitor.should_stop()

        size = _limited(int(np.clip(_SLICE_WORK / problem.n**2, 1, 200)), monitor.stop)
        if to_count:
            first = nodes_before(problem.n, int(problem.budget.sum()))
            queue.run(lambda: progress() or queue.nodes >= first, workers, size)
            wanted = not queue.finished() and not monitor.should_stop() and self._is_countable(context)
            if wanted and self._count(context, report, tolerance):
                return
            to_count = False
        queue.run(progress, workers, size)
        progress()
        report.bound(problem.from_units(tree.bound()), last=True)

    def _workers(self, context: Context) -> int:
        """Threads: of one tree by default no more than half of the free memory has room for."""
        if not self.one_tree:
            return context.workers
        if context.threads is not None:
            return context.tree_workers
        each = (_JOINT_BYTES if isinstance(self.problem, JointProblem) else _SELECTION_BYTES) * self.problem.n**2
        return max(1, int(min(context.tree_workers, available_bytes() / 2 / max(each, 1))))

    def _is_countable(self, context: Context) -> bool:
        """Whether all selections can be looked at in the time that is left: few weights are kept, or pruned."""
        problem, monitor = self.problem, context.monitor
        if not isinstance(problem, JointProblem) or problem.budget.size != 1 or monitor.stop.max_iterations:
            return False
        number = number_of_sets(problem.n, int(problem.budget[0]))
        if number > MOST_SETS or not 0 < problem.budget[0] < problem.n:
            return False
        return number / SETS_PER_SECOND / context.workers < 0.8 * monitor.remaining

    def _count(self, context: Context, report: Report, tolerance: float) -> bool:
        """Look at all selections; whether that is a proof."""
        problem, monitor = self.problem, context.monitor
        assert isinstance(problem, JointProblem) and monitor.objective is not None
        A, H, w = problem.matrices()
        value = monitor.objective - problem.offset
        enumeration = Enumeration(A, H, w, int(problem.keep[0]), value)
        pruned = enumeration.run(monitor.should_stop, context.workers)
        if pruned is not None:
            report.selection(problem.expand(pruned))
        if not enumeration.complete:
            return False
        value = monitor.objective - problem.offset
        report.bound(problem.from_units(value - tolerance * abs(value)))
        context.extras["counted"] = number_of_sets(problem.n, int(problem.keep[0]))
        return True

    def _tables(self, context: Context, report: Report, tolerance: float, stop: Int8Array, turns: Turns) -> None:
        """A table for every component under one budget."""
        problem, monitor, extras = self.problem, context.monitor, context.extras
        self.search = search = self._new_tables(tolerance, context.workers, stop)
        seen = [0]

        def progress() -> bool:
            monitor.advance(search.nodes - seen[0])
            seen[0] = search.nodes
            if search.path is not None:
                report.selection(problem.expand(search.selection()))
            if np.isfinite(search.bound):
                report.bound(problem.from_units(search.bound), last=True)
            extras.update({"nodes": search.nodes, "open": search.open, "rounds": search.rounds})
            if turns.due(1):  # all workers wait for it
                turns.take()
            return monitor.should_stop()

        search.run(progress, monitor.should_stop)
        progress()


class Report:
    """Passes selections and bounds on to the monitor, in units of the instance.

    A bound is lowered by what the sums of the incumbent's loss may lose in float64: the comparison that proves it
    optimal involves both.
    """

    def __init__(self, problem: Provable, monitor: Monitor) -> None:
        self.problem, self.monitor = problem, monitor
        self._incumbent: BoolArray | None = None
        self._rounding = 0.0

    def selection(self, pruned: BoolArray) -> None:
        """Offer a selection, bool (n,)."""
        self.monitor.report(self.problem.loss(pruned), pruned)

    def bound(self, bound: float, last: bool = True) -> None:
        """Offer a bound, unless it is hardly better than the last one and not to be the `last`."""
        monitor = self.monitor
        if monitor.pruned is not None and monitor.pruned is not self._incumbent:
            self._incumbent, self._rounding = monitor.pruned, self.problem.rounding(monitor.pruned)
        bound -= self._rounding
        if self.problem.nonnegative:
            bound = max(bound, 0.0)
        if monitor.objective is not None:
            bound = min(bound, monitor.objective)
            if not last and monitor.bound is not None:
                missing = monitor.objective - monitor.bound
                if bound - monitor.bound < _STEP * missing:
                    return
        monitor.report_bound(bound)


def tree_of(
    problem: Provable,
    pruned: BoolArray,
    tolerance: float = TOLERANCE,
    should_stop: Callable[[], bool] = lambda: False,
    stop: Int8Array = NEVER,
) -> SelectionTree | JointTree:
    """A branch and bound over all open weights of a problem, from a feasible selection, bool (n,)."""
    start: Int8Array = pruned[problem.index].astype(np.int8)
    if isinstance(problem, SelectionProblem):
        return prepare_selection(
            problem.matrix,
            problem.linear,
            problem.group,
            problem.budget,
            [start],
            tolerance,
            should_stop=should_stop,
            stop=stop,
        )

    def evaluate(y: BoolArray) -> float:
        return problem.loss(problem.expand(y)) - problem.offset

    return prepare_joint(*problem.matrices(), problem.group, problem.keep, [start], evaluate, tolerance, stop)


def tables_of(problem: Provable, stop: Int8Array = NEVER) -> list[Table]:
    """One table per component, in the order of the problem's variables; one for all uncoupled weights."""
    if isinstance(problem, JointProblem):
        return [JointTable(block.A, block.H, block.w, stop) for block in problem.blocks]
    alone = problem.uncoupled
    tables: list[Table] = [SeparableTable(problem.linear[alone])] if alone.size else []
    return [*tables, *(SelectionTable(Q, problem.linear[at], stop) for at, Q in problem.parts)]


def prove_within(prover: Prover, context: Context, search: Callable[[float], object]) -> Status:
    """Prove the incumbent that a heuristic has found, and go on searching where the gap promises no proof.

    With a time limit the proof has a tenth of it first. The square of what it proved of the objective is its share
    of what remains, and the search has the rest before that. Without any limit the proof ends after
    `NODES_PER_ITERATION` nodes for each iteration of the search, and at least `LEAST_NODES`.

    Parameters
    ----------
    prover : Prover
    context : Context
    search : callable
        Searches until the clock of the context's monitor shows the given number of seconds; with infinity until no
        swap gains.
    """
    monitor = context.monitor
    if monitor.stop.time_limit is None:
        nodes = None if monitor.stop.limits_work else LEAST_NODES + NODES_PER_ITERATION * monitor.iterations
        before = monitor.objective
        _prove(prover, context, nodes=nodes)
        if nodes is not None and not (monitor.closed or monitor.should_stop()):
            logger.info(f"the proof ends after {nodes} nodes: without a limit it has no more for such a search")
            if monitor.objective != before:
                search(np.inf)
        return Status.OPTIMAL if monitor.closed else Status.CONVERGED
    first = _FIRST_SHARE * monitor.stop.time_limit
    _prove(prover, context, seconds=first)
    if not (monitor.closed or monitor.should_stop()):
        proven = min(max(1.0 - (1.0 if monitor.gap is None else monitor.gap), 0.0), 1.0)
        for_proof = proven**2 * monitor.remaining
        if for_proof < first:
            for_proof = 0.0
        search(monitor.elapsed + monitor.remaining - for_proof)
        if for_proof and not (monitor.closed or monitor.should_stop()):
            _prove(prover, context)
    return Status.OPTIMAL if monitor.closed else Status.CONVERGED


def _prove(prover: Prover, context: Context, seconds: float | None = None, nodes: int | None = None) -> None:
    """Run a prover for some seconds or nodes."""
    outer = context.monitor
    until = np.inf if seconds is None else outer.elapsed + seconds
    before = outer.iterations

    def count() -> None:
        outer.advance(before + inner.iterations - outer.iterations)

    def pass_on(inner: Monitor) -> None:
        count()
        if inner.objective is not None and inner.pruned is not None:
            outer.report(inner.objective, inner.pruned)
        if inner.bound is not None:
            outer.report_bound(inner.bound)

    limit = None
    if outer.stop.time_limit is not None:
        limit = max(outer.remaining if seconds is None else min(seconds, outer.remaining), 0.0)
    stop = Stop(limit, nodes, should_stop=lambda: outer.should_stop() or outer.elapsed > until)
    inner = Monitor(stop, clock=lambda: outer.elapsed)
    if outer.objective is not None and outer.pruned is not None:
        inner.report(outer.objective, outer.pruned)
    if outer.bound is not None:
        inner.report_bound(outer.bound)
    inner.callback = pass_on
    threads = 1 if prover.one_tree and context.tree_workers == 1 else context.threads  # as the outer rules say
    inside = replace(context, monitor=inner, threads=threads)
    prover.run(inside, lambda: outer.out_of_time() or outer.elapsed > until)
    count()


def _limited(size: int, stop: Stop) -> int:
    """Nodes of a slice: no more than an iteration limit allows."""
    return size if stop.max_iterations is None else max(1, min(size, stop.max_iterations))
