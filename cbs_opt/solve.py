"""Run a solver on an instance."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cbs_opt.arguments import as_instance, as_selection, as_solver, check_arguments
from cbs_opt.engines import Engine, Serial, make_engine
from cbs_opt.errors import CbsError, InstanceError, SolverError, UsageError
from cbs_opt.instance import Instance
from cbs_opt.monitor import Callback, Monitor
from cbs_opt.optional import missing
from cbs_opt.result import Result
from cbs_opt.run import Run, run_solver
from cbs_opt.solution import Solution
from cbs_opt.solver import OBJECTIVES, Context, Solver, indefinite_sentence
from cbs_opt.stop import Stop
from cbs_opt.typing import BoolArray
from cbs_opt.version import __version__

logger = logging.getLogger("cbs_opt")

DEFAULT_SOLVERS = {"selection": "search", "joint": "joint"}
"""The default solver of each objective."""


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
    engine: Engine | str | None = None,
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
        The same seed, instance, parameters, number of threads and iteration limit give the same history. With
        another number of threads sums are rounded differently and blocks are visited together, so that a search
        may take another way; docs/reliability.md has the details.
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
    engine : {"serial", "processes", "ray"} or Engine, optional
        Whose workers solve the layers of an instance with shared blocks, one task each: see `cbs_opt.engines`.
        `threads` are then those of each worker. "serial", and nothing, is this process.
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
        device=device, threads=threads, batch_size=batch_size, engine=engine, callback=callback,
    )  # fmt: skip
    chosen_type = as_solver(DEFAULT_SOLVERS[objective or "selection"] if solver is None else solver)
    chosen, solver = chosen_type(parameters), chosen_type.name
    instance = as_instance(instance)
    start = None if warm_start is None else as_selection(instance, warm_start)
    if objective is None:
        objective = next(kind for kind in OBJECTIVES if kind in chosen.supports.objectives)
    if update and not instance.curvature.is_convex:
        raise UsageError(f"`update`: {indefinite_sentence(instance)}")
    monitor = Monitor(stop, callback)
    workers = make_engine(engine, threads=threads or 1) if isinstance(engine, str) else engine
    workers = None if isinstance(workers, Serial) else workers
    context = Context(objective, seed, monitor, start, device, batch_size, threads, update, workers)
    run = run_solver(chosen, instance, context)
    if run.error is not None:
        if run.pruned is None:
            if not _in_range(instance):
                raise SolverError(_RANGE) from run.error
            _raise(solver, run.error)
        if not _in_range(instance):
            logger.warning(_RANGE)
        logger.error("solver '%s' failed; its incumbent is kept", solver, exc_info=run.error)
    result = _result(instance, context, run, solver, update, asdict(chosen.parameters))
    if stop is not None and stop.time_limit is not None:
        parts = result.build_seconds, result.solve_seconds, result.evaluate_seconds
        logger.info(
            f"time limit {stop.time_limit:g} s: {sum(parts):.2f} s used, {parts[0]:.2f} s building, "
            f"{parts[1]:.2f} s solving, {parts[2]:.2f} s evaluating"
        )
    return result


_RANGE = "the loss exceeds the range of float64: rescale the weights or the curvature"


def _in_range(instance: Instance) -> bool:
    """Whether the losses of single weights are numbers with which a solver can work."""
    try:
        costs = instance.weights * instance.curvature.diagonal() * instance.weights
    except InstanceError:  # no question of range
        return True
    largest = float(np.abs(costs).max())
    return bool(np.isfinite(costs).all()) and (largest == 0 or 1e-250 < largest < 1e250)


def _raise(solver: str, error: Exception) -> NoReturn:
    """Raise what a run that failed before it had a selection raises."""
    if isinstance(error, InstanceError):  # valid, but not for this solver
        raise SolverError(f"solver '{solver}' cannot take the instance: {error}") from error
    if isinstance(error, CbsError | MemoryError):
        raise error
    if isinstance(error, ModuleNotFoundError):
        raise SolverError(f"solver '{solver}' {missing(error)}") from error
    raise SolverError(f"solver '{solver}' failed: {type(error).__name__}: {error}") from error


def _result(
    instance: Instance, context: Context, run: Run, solver: str, update: bool, parameters: dict[str, Any]
) -> Result:
    """Check what the solver claims against the recomputed losses, and put everything together."""
    monitor, objective, losses = context.monitor, context.objective, run.losses
    if run.pruned is None or losses is None or not instance.admits(run.pruned):
        raise SolverError(f"solver '{solver}' gave a selection that does not meet the budget: this is a bug")
    value = losses.selection_loss if objective == "selection" else losses.joint_loss
    if value is None:
        raise SolverError(
            "the joint loss has no minimum: the Hessian is singular along `linear`, a positive damping is needed"
        )
    if not np.isfinite(value):
        raise SolverError(_RANGE)
    bound = monitor.bound
    if bound is not None and bound > value:
        if bound - value > 1e-6 * max(abs(value), abs(bound)):
            raise SolverError(
                f"solver '{solver}' claims the bound {bound:.9g} above its own selection's {value:.9g}: "
                "this is a bug"
            )
        bound = value
    return Result(
        status=run.status,
        solver=solver,
        objective_kind=objective,
        pruned=run.pruned,
        weights=losses.weights if update or objective == "joint" else None,
        objective=value,
        selection_loss=losses.selection_loss,
        joint_loss=losses.joint_loss,
        bound=bound,
        iterations=monitor.iterations,
        build_seconds=run.build_seconds,
        solve_seconds=run.solve_seconds or 0.0,
        history=monitor.history,
        seed=context.seed,
        parameters=parameters,
        environment=environment(context),
        extras=context.extras,
        instance=instance.identity(),
        evaluate_seconds=run.evaluate_seconds,
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
