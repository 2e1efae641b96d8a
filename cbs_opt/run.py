"""One run of a solver on an instance, for `solve` and for the benchmarks.

A time limit holds for preparation, run and evaluation together; benchmarks start its clock after the preparation.
Thread limits apply throughout, an error does not lose the incumbent, and the losses are recomputed by the
evaluator. The answer is never worse than the warm start, nor, for solvers that promise it, than magnitude: where a
limit ended the run before it had compared with these, they are compared here.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cbs_opt.blockwise import can_split, solve_by_blocks
from cbs_opt.convex_form import convex_form
from cbs_opt.errors import MemoryShortageError
from cbs_opt.instance import Instance
from cbs_opt.interrupt import Interrupted, checkpoint, interruptible
from cbs_opt.losses import Losses, evaluate, selection_loss
from cbs_opt.memory import hold_products
from cbs_opt.monitor import OPTIMAL_GAP, Monitor
from cbs_opt.registry import check_supports
from cbs_opt.result import Status
from cbs_opt.solver import Context, Solver
from cbs_opt.threads import thread_limit
from cbs_opt.typing import BoolArray
from cbs_opt.view import text

logger = logging.getLogger("cbs_opt")

# Up to this size threads that share a block only wait for each other: seconds, where other processes are busy.
_SMALL_BLOCK = 256

# What a joint loss that is not the objective may take beyond the time limit: a share of it, and seconds at least.
_GRACE, _LEAST_GRACE = 0.1, 0.25

_ROUNDING = 1e-12  # of a loss, relative to that of pruning every weight


@dataclass(frozen=True)
class Run:
    """The outcome of a run, before its evaluation.

    Attributes
    ----------
    monitor : Monitor
        The reports of the solver: history, bound, iterations, and the loss that it states.
    status : Status
        Why it ended; `error` where it failed.
    pruned : bool array or None
        The incumbent; before the first report the warm start, or else the magnitude selection where the run was
        stopped and None where it failed. Shape and budget are as the solver gave them.
    losses : Losses or None
        Of `pruned`, recomputed outside the clock; None where that is None or has a wrong shape.
    error : Exception or None
        What ended the run early; the incumbent is kept.
    build_seconds : float
        Preparation: compilation, float64 copies.
    solve_seconds : float or None
        The run itself; None where the preparation failed or was stopped.
    evaluate_seconds : float
        The losses of the answer.
    processor_seconds : float
        Of preparation and run.
    """

    monitor: Monitor
    status: Status
    pruned: BoolArray | None
    losses: Losses | None
    error: Exception | None
    build_seconds: float
    solve_seconds: float | None
    evaluate_seconds: float
    processor_seconds: float


def run_solver(
    solver: Solver, instance: Instance, context: Context, prepared: Callable[[], None] | None = None
) -> Run:
    """Prepare a solver, run it, and recompute the losses of its incumbent.

    Where H is indefinite the solver is given the instance's `convex_form`: its losses and bounds are the same.

    Parameters
    ----------
    solver : Solver
    instance : Instance
    context : Context
        A fresh one; its monitor holds the rules of stopping, and its clock is the clock of the run. Without
        `threads` the libraries take one thread where all blocks are small, else all.
    prepared : callable, optional
        Called after the preparation: to wait for kernels that compile in the background. The time limit then
        starts after it, and both losses are always computed, as benchmarks need it.

    Returns
    -------
    Run

    Raises
    ------
    SolverError
        When the solver cannot take the instance. Errors of the run itself are not raised: see `Run.error`.
    """
    check_supports(solver, instance, context)
    monitor = context.monitor
    if monitor.stop.gap is not None and not solver.supports.bound:
        logger.warning(f"solver '{solver.name}' proves no bound: the gap of {monitor.stop.gap:g} cannot stop it")
    limit = context.threads
    if limit is None and int(instance.curvature.block_sizes.max()) <= _SMALL_BLOCK:
        limit = 1
    status, error = Status.ERROR, None
    build_seconds = solve_seconds = None
    processor = time.process_time()
    monitor.start()
    with thread_limit(limit):
        try:
            hold_products(limit or 1)
            work = _Work(solver, instance, context)
            with interruptible(monitor.should_stop if prepared is None else None):
                work.prepare()
            if prepared is not None:
                prepared()
            build_seconds = monitor.elapsed
            status = Status.CONVERGED
            monitor.start(spent=build_seconds if prepared is None else 0.0)
            if monitor.reason is None:  # else stopped during the preparation
                with interruptible(monitor.should_stop):
                    status = work.run()
        except Interrupted:
            pass
        except Exception as failure:
            error, status = failure, Status.ERROR
        if build_seconds is None:
            build_seconds = monitor.elapsed
        else:
            solve_seconds = monitor.elapsed
        processor = time.process_time() - processor
        if error is None and status is not Status.OPTIMAL:
            # A run that ended by itself may have reached its goal, without having asked.
            status = monitor.reason or monitor.reached() or status
        pruned = monitor.pruned
        if pruned is None and context.warm_start is not None:  # stopped, or failed, before the first report
            pruned = context.warm_start
        elif pruned is None and error is None:  # magnitude always has a selection
            pruned = instance.budget.cheapest(np.abs(instance.weights), instance.fixed)
        losses, began = None, time.perf_counter()
        if pruned is not None and pruned.shape == (instance.n,):
            needs_both = prepared is not None or context.update or context.objective == "joint"
            losses = _losses(instance, pruned, context, needs_both)
            status = _as_evaluated(instance, context, losses, status)
            if status is not Status.OPTIMAL:
                pruned, losses = _not_worse_than_known(solver, instance, context, pruned, losses, needs_both)
            status = _within_precision(instance, context, pruned, losses, status)
        evaluate_seconds = time.perf_counter() - began
    return Run(monitor, status, pruned, losses, error, build_seconds, solve_seconds, evaluate_seconds, processor)


class _Work:
    """A solver on the convex form of an instance; block by block where that does not fit into memory."""

    def __init__(self, solver: Solver, instance: Instance, context: Context) -> None:
        self.solver, self.instance, self.context = solver, instance, context
        self.worked_on: Instance | None = instance

    def prepare(self) -> None:
        """Make the instance convex, and prepare the solver."""
        try:
            self.worked_on = convex_form(self.instance)
            if self.worked_on is not self.instance:
                blocks = text.count(len(self.instance.curvature.indefinite_blocks), "indefinite block")
                logger.info(f"{blocks} of the Hessian made convex: a shift of the diagonal, the loss is the same")
            self.solver.prepare(self.worked_on, self.context)
        except MemoryShortageError as error:
            self._divide(error)

    def run(self) -> Status:
        """Run the solver on what was prepared."""
        if self.worked_on is not None:
            try:
                return self.solver.run(self.worked_on, self.context)
            except MemoryShortageError as error:
                self._divide(error)
        return solve_by_blocks(self.solver, self.instance, self.context, self._run_block)

    def _divide(self, error: MemoryShortageError) -> None:
        if not can_split(self.instance):
            raise error
        logger.info(f"{str(error).split(':')[0]}")
        self.worked_on = None

    def _run_block(self, block: Instance, context: Context) -> Monitor:
        solver, monitor = copy.copy(self.solver), context.monitor
        monitor.start()
        try:
            with interruptible(monitor.should_stop):
                solver.check_supports(block, context)
                convex = convex_form(block)
                solver.prepare(convex, context)
                if not monitor.should_stop():
                    solver.run(convex, context)
        except Interrupted:
            pass
        return monitor


def _losses(instance: Instance, pruned: BoolArray, context: Context, needs_both: bool) -> Losses:
    """Both losses; where a time limit has passed and not both are needed, perhaps without the joint loss."""
    monitor, limit = context.monitor, context.monitor.stop.time_limit
    if needs_both or limit is None:
        return _evaluate(instance, pruned, context)
    monitor.keep_back(0.0)
    latest = -max(_GRACE * limit, _LEAST_GRACE)
    try:
        with interruptible(lambda: monitor.remaining < latest):
            checkpoint()
            return _evaluate(instance, pruned, context)
    except Interrupted:
        logger.info("the time limit has passed: the joint loss is not computed; `--update` asks for it")
        return Losses(selection_loss(instance, pruned), None, None)


def _as_evaluated(instance: Instance, context: Context, losses: Losses, status: Status) -> Status:
    """The status; no optimum is claimed where rounding misled a solver: the evaluated loss is above its bound."""
    bound, loss = context.monitor.bound, losses.selection_loss
    if context.objective == "joint" and losses.joint_loss is not None:
        loss = losses.joint_loss
    if status is not Status.OPTIMAL or bound is None or not loss - bound > 2 * OPTIMAL_GAP * abs(loss):
        return status
    # What is left of a loss near zero is rounding of its terms.
    if loss - bound <= _ROUNDING * abs(selection_loss(instance, np.ones(instance.n, dtype=bool))):
        return status
    logger.warning(
        f"the loss of the answer, {loss:.6g}, is above the one that the solver proved optimal: "
        "rounding misled it. The Hessian is ill-conditioned, and a larger damping would help"
    )
    return Status.CONVERGED


def _within_precision(
    instance: Instance, context: Context, pruned: BoolArray, losses: Losses, status: Status
) -> Status:
    """The status that the precision of the stored curvature can carry; `extras` and the log say what it is.

    A bound is lowered by the error, and nothing is called optimal where that exceeds `OPTIMAL_GAP`.
    """
    if context.objective != "selection":
        return status
    error = instance.curvature.relative_error(np.where(pruned, instance.weights, 0.0))
    if not error > OPTIMAL_GAP:
        return status
    context.extras["relative_error"] = error
    logger.warning(
        f"the stored inverse Hessian is so ill-conditioned that losses hold only to about {error:.1g}, relative: "
        "no optimum can be claimed. Blocks of H itself (`hessian`) or a larger damping would help"
    )
    monitor = context.monitor
    if monitor.bound is not None:
        monitor.bound -= min(error, 1.0) * abs(losses.selection_loss)
    return Status.CONVERGED if status is Status.OPTIMAL else status


def _evaluate(instance: Instance, pruned: BoolArray, context: Context) -> Losses:
    """The losses, from the solver's weights where it has some; an interrupt ends the update of long rows."""
    monitor = context.monitor
    losses = evaluate(
        instance,
        pruned,
        context.device,
        context.workers,
        start=monitor.weights if pruned is monitor.pruned else None,
        should_stop=monitor.stop.should_stop,
    )
    if not losses.complete:
        logger.warning("interrupted: the kept weights are not the best ones yet, and the loss is that of these")
    return losses


def _not_worse_than_known(
    solver: Solver,
    instance: Instance,
    context: Context,
    pruned: BoolArray,
    losses: Losses,
    needs_both: bool,
) -> tuple[BoolArray, Losses]:
    """The incumbent, or the warm start or magnitude where that is better and the solver never got to it."""
    known = [] if context.warm_start is None else [context.warm_start]
    if solver.supports.not_worse_than_magnitude:
        known.append(instance.budget.cheapest(np.abs(instance.weights), instance.fixed))
    for other in known:
        if context.monitor.has_seen(other) or np.array_equal(other, pruned):
            continue
        before = losses.selection_loss if context.objective == "selection" else losses.joint_loss
        if context.objective == "selection" and selection_loss(instance, other) >= losses.selection_loss:
            continue
        there = _losses(instance, other, context, needs_both)
        value = there.selection_loss if context.objective == "selection" else there.joint_loss
        if value is not None and (before is None or value < before):
            logger.info(f"solver '{solver.name}' was stopped early: a known selection is better than its own")
            context.monitor.report(value, other)
            pruned, losses = other, there
    return pruned, losses
