"""One run of one solver, judged from outside: what an engine sends to a worker, and the row that comes back."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from cbs_opt.bench.anytime import CLOCKS, Anytime
from cbs_opt.bench.peers import PEERS, MissingPeerError, Samplers, run_sampler
from cbs_opt.bench.runs import store
from cbs_opt.bench.runs.store import Key, Row, Trace
from cbs_opt.bench.runs.warm_up import SECONDS, tiny_instance
from cbs_opt.bench.subset_peers import SUBSET_PEERS, solve_subset
from cbs_opt.budget import Budget
from cbs_opt.compilation import finish_compilation
from cbs_opt.errors import CbsError, InstanceError, SolverError
from cbs_opt.files import read_instance
from cbs_opt.instance import Instance
from cbs_opt.losses import Losses, evaluate
from cbs_opt.monitor import Monitor
from cbs_opt.registry import check_supports, get_solver
from cbs_opt.result import Status
from cbs_opt.run import run_solver
from cbs_opt.solve import environment
from cbs_opt.solver import Context
from cbs_opt.stop import Stop
from cbs_opt.threads import thread_limit
from cbs_opt.typing import BoolArray

TOLERANCE = 1e-6
"""Relative difference between what a solver claims and what is found, from which on its row is `wrong`."""

TRACE_STEP = 1e-3
"""Seconds; events of a trace that follow closer than this are merged into one."""

_ROUNDING = 1e-12  # of the terms that the loss sums: they may cancel where there is a linear term
_PACKAGES = ("scipy", "numba", "torch", "highspy", "pyomo", "pyscipopt", "gurobipy", "dwave-samplers")


@dataclass(frozen=True)
class Task:
    """A row to be made: its key, and what the run needs in addition."""

    path: str
    instance_sha256: str
    solver: str
    label: str
    parameters: str
    objective: str
    budget: int
    sparsity: float
    seed: int
    time_limit: float | None
    threads: int | None = 1
    clock: str = "wall"

    @classmethod
    def of(cls, instance: Instance, solver: str, label: str | None = None, **settings: Any) -> Task:
        """The task of a solver on an instance with its budget.

        Parameters
        ----------
        instance : Instance
        solver : str
        label : str, optional
            The solver's name where not given.
        **settings
            `parameters`, `objective`, `seed`, `time_limit`, `threads`, `clock`; without them: none, the selection
            loss, 0, none, 1, the wall.
        """
        given: dict[str, Any] = {"parameters": "{}", "objective": "selection", "seed": 0, "time_limit": None}
        return cls(
            path=str(instance.path),
            instance_sha256=instance.sha256 or "",
            solver=solver,
            label=label or solver,
            budget=instance.budget.total,
            sparsity=instance.budget.total / instance.n,
            **given | settings,
        )

    @property
    def key(self) -> Key:
        """The key of its row."""
        return Key(
            self.instance_sha256,
            self.solver,
            self.parameters,
            self.objective,
            self.budget,
            self.seed,
            self.time_limit,
        )

    def row(self, kind: str, message: str | None = None) -> Row:
        """A row of this task without results."""
        return Row(*self.key, label=self.label, sparsity=self.sparsity, kind=kind, message=message)


class Made(NamedTuple):
    """A row, and the environment that it was made in."""

    row: Row
    environment: dict[str, Any]


def run_task(task: Task, should_stop: Callable[[], bool] | None = None) -> Made:
    """Run a solver on the file of a task and make the row: this never raises, whatever the solver does.

    Losses and feasibility are recomputed by `cbs_opt.evaluate`. Warming up counts neither for the solver nor for
    the row.

    Parameters
    ----------
    task : Task
    should_stop : callable, optional
        True ends the run with status `interrupted`.
    """
    return _make(task, lambda: _instance(task.path, task.instance_sha256).with_budget(task.budget), should_stop)


def run_on(instance: Instance, task: Task) -> Row:
    """As `run_task`, for an instance at hand: the row, with all events in its trace."""
    return _make(task, lambda: instance).row


def _make(task: Task, read: Callable[[], Instance], should_stop: Callable[[], bool] | None = None) -> Made:
    def make() -> tuple[Row, str]:
        _warm_up(task.solver, task.parameters, task.objective, read().curvature.kind, task.threads)
        clock = time.perf_counter()
        instance = read()
        if task.solver in SUBSET_PEERS:
            row, device = _subset_row(task, instance), "cpu"
        elif task.solver in PEERS:
            row, device = _peer_row(task, instance), "cpu"
        else:
            row, device = _solver_row(task, instance, should_stop)
        row.row_s = time.perf_counter() - clock
        return row, device

    made = guarded(task, make)
    return Made(made.row, made.environment | {"threads": task.threads})


class Unmade(Protocol):
    """A row that is still to be made."""

    def row(self, kind: str, message: str | None = None) -> Row:
        """The row without results."""


def guarded(task: Unmade, make: Callable[[], tuple[Row, str]]) -> Made:
    """Make a row; whatever goes wrong becomes a row that says so.

    Parameters
    ----------
    task : Unmade
    make : callable
        Gives the row, and the device that it was made on.
    """
    started, clock = datetime.now(UTC).isoformat(timespec="milliseconds"), time.perf_counter()
    device = "cpu"
    try:
        row, device = make()
    except _UnsupportedError as error:
        row = task.row(store.UNSUPPORTED, str(error))
    except CbsError as error:
        row = task.row(store.ERROR, str(error))
        row.status = str(Status.ERROR)
    except MemoryError:
        row = task.row(store.ERROR, "out of memory")
        row.status = str(Status.ERROR)
    except Exception as error:
        row = task.row(store.ERROR, f"{type(error).__name__}: {error}")
        row.status = str(Status.ERROR)
    row.started = started
    if row.kind == store.OK and row.row_s is None:
        row.row_s = time.perf_counter() - clock
    return Made(row, surroundings() | {"device": device})


class _UnsupportedError(CbsError):
    """The solver refuses the instance with a message."""


def judge(
    task: Task,
    instance: Instance,
    pruned: BoolArray | None,
    losses: Losses | None,
    claimed: float | None = None,
    bound: float | None = None,
    failure: str | None = None,
) -> Row:
    """Make the row of a selection from recomputed values, not from those of the solver.

    Parameters
    ----------
    task : Task
    instance : Instance
        With the budget of the task.
    pruned : bool (n,) or None
    losses : Losses or None
        Of the selection, recomputed; None where it has a wrong shape.
    claimed, bound : float, optional
        The loss and the lower bound as the solver has them.
    failure : str, optional
        Why the run broke off.
    """
    row = task.row(store.OK)
    row.claimed_objective, row.bound = _finite(claimed), _finite(bound)
    if pruned is None:
        row.kind, row.message = store.ERROR, failure or "the solver gave no selection"
        return row
    if losses is None:
        row.kind = store.INFEASIBLE
        row.message = f"the selection must be bool ({instance.n},), got {pruned.dtype} {pruned.shape}"
        return row
    row.selection_loss, row.joint_loss = _finite(losses.selection_loss), _finite(losses.joint_loss)
    row.objective = row.selection_loss if task.objective == "selection" else row.joint_loss
    slack = _slack(instance, pruned, row.objective)
    if not instance.admits(pruned):
        row.kind = store.INFEASIBLE
        row.message = (
            f"the selection, {int(pruned.sum())} weights, misses the budget of {instance.budget.total}, the "
            "groups or `fixed`"
        )
    elif row.objective is None:
        row.kind, row.message = store.ERROR, "the loss of the selection is infinite or has no minimum"
    elif row.claimed_objective is not None and abs(row.claimed_objective - row.objective) > slack:
        row.kind = store.WRONG
        row.message = f"claims the loss {row.claimed_objective:.9g}, it is {row.objective:.9g}"
    elif row.bound is not None and row.bound > row.objective + slack:
        row.kind = store.WRONG
        row.message = f"claims the bound {row.bound:.9g} above its own loss {row.objective:.9g}"
    elif failure is not None:
        row.kind, row.message = store.ERROR, failure
    if row.kind == store.OK and row.bound is not None and row.objective is not None:
        row.bound = min(row.bound, row.objective)
    return row


def _slack(instance: Instance, pruned: BoolArray, value: float | None) -> float:
    """How far a claim may be off: relative to the loss, and to rounding in the terms that it sums."""
    w = instance.weights[pruned]
    terms = 0.5 * float(w**2 @ instance.curvature.diagonal()[pruned])
    if instance.linear is not None:
        terms += float(np.abs(w) @ np.abs(instance.linear[pruned]))
    return TOLERANCE * abs(value or 0.0) + _ROUNDING * terms


def _solver_row(task: Task, instance: Instance, should_stop: Callable[[], bool] | None) -> tuple[Row, str]:
    """The row of a solver of the package, and the device that it ran on."""
    solver = get_solver(task.solver)(json.loads(task.parameters))
    monitor = Monitor(Stop(time_limit=task.time_limit, should_stop=should_stop), clock=CLOCKS[task.clock])
    context = Context(task.objective, task.seed, monitor, threads=task.threads)
    logging.getLogger("pyomo").setLevel(logging.ERROR)  # it warns of every solver that a limit stops
    try:
        check_supports(solver, instance, context)
    except SolverError as error:
        raise _UnsupportedError(str(error)) from error
    run, failure = run_solver(solver, instance, context, finish_compilation), None
    if run.error is not None:
        known = isinstance(run.error, CbsError)
        failure = str(run.error) if known else f"{type(run.error).__name__}: {run.error}"
        if run.pruned is None and (isinstance(run.error, InstanceError) or "licence" in str(run.error)):
            # A valid instance that this solver cannot take: too large for it or for its licence.
            raise _UnsupportedError(str(run.error)) from run.error
    row = judge(task, instance, run.pruned, run.losses, monitor.objective, monitor.bound, failure)
    nodes = context.extras.get("nodes")
    row.status, row.iterations, row.nodes = (
        str(run.status),
        monitor.iterations,
        None if nodes is None else int(nodes),
    )
    row.build_s, row.solve_s, row.cpu_s = run.build_seconds, run.solve_seconds, run.processor_seconds
    own = context.extras.get("solver_seconds")
    row.own_s = None if own is None else float(own)
    row.trace = [(event.seconds, event.objective, event.bound) for event in monitor.history]
    return row, str(context.extras.get("device", "cpu"))


def _peer_row(task: Task, instance: Instance) -> Row:
    """The row of one of the samplers; its trace has what it would have had, had it been asked for less time."""
    if task.objective != "selection":
        raise _UnsupportedError(f"'{task.solver}' minimises the selection loss")
    if task.time_limit is None:
        raise _UnsupportedError(f"'{task.solver}' needs a time limit: it has no end of its own")
    processor, clock = time.process_time(), time.perf_counter()
    try:
        samplers = Samplers(instance)
    except MissingPeerError as error:
        raise _UnsupportedError(str(error)) from error
    build_s, clock = time.perf_counter() - clock, time.perf_counter()
    with thread_limit(task.threads):
        taken: Anytime = run_sampler(samplers, PEERS[task.solver], [task.time_limit], task.seed)
    spent, processor = time.perf_counter() - clock, time.process_time() - processor
    losses = [evaluate(instance, pruned) for pruned in taken.selections]
    last = (taken.selections[-1], losses[-1]) if losses else (None, None)
    row = judge(task, instance, *last)
    row.status, row.build_s, row.cpu_s = str(Status.TIME_LIMIT), build_s, processor
    # Annealings are repeated until one fills the limit: the last counts, as it does in the trace.
    row.solve_s = spent if task.solver == "dwave-tabu" else taken.seconds[-1]
    row.trace = [(s, _finite(found.selection_loss), None) for s, found in zip(taken.seconds, losses, strict=True)]
    return row


def _subset_row(task: Task, instance: Instance) -> Row:
    """The row of a peer of best-subset selection: it proves nothing, and ends by itself."""
    processor, clock = time.process_time(), time.perf_counter()
    try:
        with thread_limit(task.threads):
            pruned = solve_subset(task.solver, instance, task.time_limit)
    except MissingPeerError as error:
        raise _UnsupportedError(str(error)) from error
    spent, processor = time.perf_counter() - clock, time.process_time() - processor
    losses = evaluate(instance, pruned)
    row = judge(task, instance, pruned, losses)
    row.status, row.build_s, row.solve_s, row.cpu_s = str(Status.CONVERGED), 0.0, spent, processor
    row.trace = [(spent, _finite(losses.joint_loss), None)]
    return row


def thinned(events: Trace) -> Trace:
    """The events, of several within `TRACE_STEP` seconds the last, with numbers that JSON can hold."""
    kept: Trace = []
    for seconds, objective, bound in events:
        event = round(seconds, 6), _finite(objective), _finite(bound)
        if len(kept) > 1 and event[0] - kept[-2][0] < TRACE_STEP:
            kept[-1] = event
        else:
            kept.append(event)
    return kept


@lru_cache(maxsize=2)
def _instance(path: str, sha256: str) -> Instance:
    instance = read_instance(path)
    if instance.sha256 != sha256:
        raise InstanceError(f"{path}: is not the file that it was when the benchmark began: its SHA-256 differs")
    return instance


@cache
def _warm_up(solver: str, parameters: str, objective: str, kind: str, threads: int | None) -> None:
    """Let the solver solve a tiny instance once in this process; whatever goes wrong will go wrong in the row."""
    try:
        tiny = tiny_instance(kind)
        if solver in PEERS:
            Samplers(tiny)  # loads the packages
            return
        if solver in SUBSET_PEERS:
            solve_subset(solver, replace(tiny, linear=None, fixed=None, budget=Budget(tiny.n - 1)), SECONDS)
            return
        context = Context(objective, 0, Monitor(Stop(time_limit=SECONDS)), threads=threads)
        chosen = get_solver(solver)(json.loads(parameters))
        run_solver(chosen, tiny, context, finish_compilation)
    except Exception:
        return


@cache
def surroundings() -> dict[str, Any]:
    """Versions, processor and cores of this process; JSON types only."""
    found = environment() | {"processor": _processor(), "memory_gb": _memory()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory() -> int | None:
    """Memory of the machine in GB, rounded."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)
    except (AttributeError, ValueError, OSError):
        return None


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
