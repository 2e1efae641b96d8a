"""Run a solver on an instance."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cbs_opt.arguments import as_instance, as_selection, as_solver, check_arguments
from cbs_opt.errors import CbsError, InstanceError, SolverError
from cbs_opt.instance import Instance
from cbs_opt.losses import evaluate
from cbs_opt.monitor import Callback, Monitor
from cbs_opt.optional import missing
from cbs_opt.result import Result, Status
from cbs_opt.solution import Solution
from cbs_opt.solver import OBJECTIVES, Context, Solver
from cbs_opt.stop import Stop
from cbs_opt.typing import BoolArray
from cbs_opt.version import __version__

logger = logging.getLogger("cbs_opt")

DEFAULT_SOLVERS = {"selection": "search", "joint": "joint"}
"""The default solver of each objective."""

# Up to this size threads that share a block only wait for each other: seconds, where other processes are busy.
_SMALL_BLOCK = 256


def solve(
    instance: Instance | Path | str,
    solver: str | type[Solver] | None = None,
    *,
    objective: str | None = None,
    stop: Stop | None = None,
    seed: int = 0,
    parameters: Mapping[str, Any] | None = None,
    update: bool = False,
    warm_start: BoolArray | Result | Solution | None = None,
    device: str = "auto",
    threads: int | None = None,
    batch_size: int | None = None,
    callback: Callback | None = None,
) -> Result:
    """Choose the weights to prune.

    Parameters
    ----------
    instance : Instance, Path or str
        An instance, the path of an instance file, or `library:NAME`.
    solver : str or subclass of Solver, optional
        A name of `solver_names()`; that of `DEFAULT_SOLVERS` when not given.
    objective : {"selection", "joint"}, optional
        The loss to minimise: of the selection without an update, or after the best update of the kept weights.
        "selection" when not given, unless the solver minimises only the other.
    stop : Stop, optional
        Without one the solver runs to its own end.
    seed : int
        The same seed, instance, parameters and iteration limit give the same history.
    parameters : mapping, optional
        Parameters of the solver by name.
    update : bool
        Also return the updated weights (CBS-U); always so for the joint objective.
    warm_start : bool (n,), Result or Solution, optional
        A feasible selection to start from.
    device : {"auto", "cpu", "cuda"}
        For solvers that work in batches.
    threads : int, optional
        Threads that linear algebra and kernels may use; without it one where all blocks are small, else all.
    batch_size : int, optional
        Candidates per batch.
    callback : callable, optional
        Called with the `Monitor` at each improvement.

    Returns
    -------
    Result
        Its losses are recomputed in float64, independently of the solver.

    Raises
    ------
    UsageError
        For invalid arguments.
    SolverError
        When the solver is unknown, cannot take the instance, or failed before it had a selection. When it
        fails later the incumbent is returned with status `error`.
    """
    check_arguments(
        objective=objective, stop=stop, seed=seed, parameters=parameters, update=update,
        device=device, threads=threads, batch_size=batch_size, callback=callback,
    )  # fmt: skip
    chosen_type = as_solver(DEFAULT_SOLVERS[objective or "selection"] if solver is None else solver)
    chosen, solver = chosen_type(parameters), chosen_type.name
    instance = as_instance(instance)
    start = None if warm_start is None else as_selection(instance, warm_start)
    if objective is None:
        objective = next(kind for kind in OBJECTIVES if kind in chosen.supports.objectives)
    monitor = Monitor(stop, callback)
    context = Context(objective, seed, monitor, start, device, batch_size, threads)
    chosen.check_supports(instance, context)
    if monitor.stop.gap is not None and not chosen.supports.bound:
        logger.warning(f"solver '{solver}' proves no bound: the gap of {monitor.stop.gap:g} cannot stop it")

    if threads is None and int(instance.curvature.block_sizes.max()) <= _SMALL_BLOCK:
        limit: int | None = 1
    else:
        limit = threads
    monitor.start()
    with thread_limit(limit, chosen.supports.batched):
        status = None
        try:
            chosen.prepare(instance, context)
            build_seconds = monitor.elapsed
            monitor.start()
            status = chosen.run(instance, context)
        except CbsError as error:
            if monitor.pruned is None:
                if isinstance(error, InstanceError):  # valid, but not for this solver
                    raise SolverError(f"solver '{solver}' cannot take the instance: {error}") from error
                raise
            logger.exception("solver '%s' failed; its incumbent is kept", solver)
        except Exception as error:
            if monitor.pruned is None:
                reason = f"failed: {type(error).__name__}: {error}"
                if isinstance(error, ModuleNotFoundError):
                    reason = missing(error)
                raise SolverError(f"solver '{solver}' {reason}") from error
            logger.exception("solver '%s' failed; its incumbent is kept", solver)
        solve_seconds = monitor.elapsed
        if status is None:
            status = Status.ERROR
        elif monitor.reason is not None and status is not Status.OPTIMAL:
            status = monitor.reason
        return _result(
            instance,
            context,
            status=status,
            solver=solver,
            update=update,
            parameters=asdict(chosen.parameters),
            build_seconds=build_seconds,
            solve_seconds=solve_seconds,
        )


def _result(
    instance: Instance,
    context: Context,
    *,
    status: Status,
    solver: str,
    update: bool,
    parameters: dict[str, Any],
    build_seconds: float,
    solve_seconds: float,
) -> Result:
    """Recompute the losses of the incumbent and assemble the result."""
    monitor, objective = context.monitor, context.objective
    pruned = monitor.pruned
    if pruned is None:  # stopped before the first selection: magnitude always has one
        pruned = instance.budget.cheapest(np.abs(instance.weights), instance.fixed)
    if not instance.admits(pruned):
        raise SolverError(f"solver '{solver}' gave a selection that does not meet the budget: this is a bug")
    losses = evaluate(instance, pruned)
    value = losses.selection_loss if objective == "selection" else losses.joint_loss
    if value is None:
        raise SolverError(
            "the joint loss has no minimum: the Hessian is singular along `linear`, a positive damping is needed"
        )
    if not np.isfinite(value):
        raise SolverError("the loss exceeds the range of float64: rescale the weights or the curvature")
    bound = monitor.bound
    if bound is not None and bound > value:
        if bound - value > 1e-6 * max(abs(value), abs(bound)):
            raise SolverError(
                f"solver '{solver}' claims the bound {bound:.9g} above its own selection's {value:.9g}: "
                "this is a bug"
            )
        bound = value
    return Result(
        status=status,
        solver=solver,
        objective_kind=objective,
        pruned=pruned,
        weights=losses.weights if update or objective == "joint" else None,
        objective=value,
        selection_loss=losses.selection_loss,
        joint_loss=losses.joint_loss,
        bound=bound,
        iterations=monitor.iterations,
        build_seconds=build_seconds,
        solve_seconds=solve_seconds,
        history=monitor.history,
        seed=context.seed,
        parameters=parameters,
        environment=environment(context),
        extras=context.extras,
        instance=instance.identity(),
    )


def environment(context: Context | None = None) -> dict[str, Any]:
    """Versions, processor and threads, as results carry them; JSON types only."""
    found: dict[str, Any] = {
        "cbs_opt": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
    }
    if context is not None:
        found |= {"threads": context.threads, "device": context.extras.pop("device", "cpu")}
    return found


@contextmanager
def thread_limit(threads: int | None, batched: bool) -> Iterator[None]:
    """Limit BLAS, OpenMP and torch to `threads`; torch only where it is loaded or `batched` solvers will."""
    if threads is None:
        yield
        return
    import sys

    from threadpoolctl import threadpool_limits

    with_torch = batched or "torch" in sys.modules
    if with_torch:
        try:
            import torch  # before the limits, which hold for the libraries that are loaded
        except ModuleNotFoundError:
            with_torch = False  # a solver that needs it reports it
    with ExitStack() as stack:
        stack.enter_context(threadpool_limits(threads))
        if with_torch:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
        yield
