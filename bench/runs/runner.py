"""Run a benchmark: plan its rows, omit those in the store, write each as it is produced."""

from __future__ import annotations

import fnmatch
import glob
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from cbs_opt.bench.reports.metrics import slack
from cbs_opt.bench.runs import store as kinds
from cbs_opt.bench.runs.configuration import Configuration, SolverEntry, unavailable
from cbs_opt.bench.runs.store import Key, Row, Store, StoredInstance
from cbs_opt.bench.runs.task import Made, Task, run_task, thinned
from cbs_opt.engines import Engine, Serial, never
from cbs_opt.errors import UsageError
from cbs_opt.files import library_names, library_path, read_instance
from cbs_opt.files.library_file import PREFIX
from cbs_opt.instance import Instance
from cbs_opt.result import Status

logger = logging.getLogger("cbs_opt")


class Job(Protocol):
    """A row to be made, as a plan lists it: a solver on an instance, a network to prune."""

    @property
    def key(self) -> Key:
        """What no two rows of a store share."""

    @property
    def label(self) -> str:
        """Of the method, for summaries."""

    @property
    def time_limit(self) -> float | None:
        """Seconds of solving."""

    def row(self, kind: str, message: str | None = None) -> Row:
        """The row without results."""


@dataclass(frozen=True)
class Plan:
    """The rows that a benchmark asks for.

    Attributes
    ----------
    name : str
    threads : int
    tasks : tuple of Job
    instances : tuple of StoredInstance
    skipped : tuple of str
        Labels of solvers that cannot run here; the log says why.
    """

    name: str
    threads: int
    tasks: tuple[Any, ...]
    instances: tuple[StoredInstance, ...]
    skipped: tuple[str, ...]


class Progress(Protocol):
    """Receives the progress of a run."""

    def start(self, total: int) -> None:
        """So many rows are to be made."""

    def row(self, row: Row) -> None:
        """A row has been written."""


@dataclass
class Outcome:
    """The outcome of a run of a benchmark.

    Attributes
    ----------
    planned, there, made : int
        Rows that the benchmark asks for; rows that were there; rows that this run wrote.
    refuted : int
        Rows, old ones too, that became `wrong` because another row has a loss below their bound.
    kinds : Counter
        Of the rows that this run wrote, as they were when they came.
    interrupted : bool
    seconds : float
    """

    planned: int
    there: int
    made: int = 0
    refuted: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    interrupted: bool = False
    seconds: float = 0.0


def make_plan(configuration: Configuration) -> Plan:
    """Read the instances and list every row.

    Raises
    ------
    UsageError
        For a pattern that no instance matches, or a benchmark without rows.
    InstanceError
        For a file that is no instance.
    """
    skipped: list[str] = []
    entries = []
    for entry in configuration.solvers:
        reason = unavailable(entry)
        if reason is None:
            entries.append(entry)
        else:
            skipped.append(entry.label)
            logger.warning(f"{entry.label} is skipped: {reason}")
    instances = _instances(configuration)
    tasks: dict[Key, Task] = {}
    for name, instance in instances:
        fitting = [e for e in entries if e.most_weights is None or instance.n <= e.most_weights]
        # One seed of every solver before the next seed: so workers that start together compile different kernels.
        for turn in range(max((len(entry.seeds) for entry in fitting), default=0)):
            for entry in (entry for entry in fitting if turn < len(entry.seeds)):
                for budget in _budgets(instance, entry):
                    task = _task(configuration, instance, entry, budget, entry.seeds[turn])
                    tasks.setdefault(task.key, task)
        if instance.budget.groups is not None and any(set(e.sparsities) != {"file"} or e.keep for e in entries):
            logger.info(f"{name} has a budget per group, and is solved with that only")
    if not tasks and not skipped:
        raise UsageError(f"{configuration.name}: no solver takes any of its instances")
    return Plan(
        configuration.name,
        configuration.threads,
        tuple(tasks.values()),
        tuple(
            StoredInstance(
                instance.sha256 or "",
                name,
                instance.n,
                instance.curvature.number_of_blocks,
                instance.curvature.kind,
                dict(instance.metadata),
            )
            for name, instance in instances
        ),
        tuple(skipped),
    )


def _task(configuration: Configuration, instance: Instance, entry: SolverEntry, budget: int, seed: int) -> Task:
    return Task.of(
        instance.with_budget(budget),
        entry.name,
        entry.label,
        parameters=entry.parameters,
        objective=entry.objective,
        seed=seed,
        time_limit=entry.time_limit,
        threads=configuration.threads,
    )


def _budgets(instance: Instance, entry: SolverEntry) -> list[int]:
    """The different budgets, in the order of the entry; where there are groups only that of the file."""
    if instance.budget.groups is not None:
        return [instance.budget.total]
    found = []
    for sparsity in entry.sparsities:
        if isinstance(sparsity, str):
            found.append(instance.budget.total)
        else:
            found.append(instance.with_sparsity(sparsity).budget.total)
    for keep in entry.keep:
        if keep > instance.n:
            raise UsageError(
                f"`keep` {keep} is more than the {instance.n} weights of {instance.path or 'an instance'}"
            )
        found.append(instance.with_kept(keep).budget.total)
    return list(dict.fromkeys(found))


def _instances(configuration: Configuration) -> list[tuple[str, Instance]]:
    """Name and content of every instance, each content once."""
    found: dict[str, tuple[str, Instance]] = {}
    names: set[str] = set()
    for pattern in configuration.instances:
        for name, path in _matches(pattern, configuration.folder):
            instance = read_instance(path)
            if (instance.sha256 or "") in found:
                continue
            if name in names:
                name = f"{path.parent.name}/{name}"
            names.add(name)
            found[instance.sha256 or ""] = name, instance
    return list(found.values())


def _matches(pattern: str, folder: Path) -> list[tuple[str, Path]]:
    if pattern.startswith(PREFIX):
        wanted = pattern.removeprefix(PREFIX)
        matching = [name for name in library_names() if fnmatch.fnmatchcase(name, wanted)]
        if not matching:
            raise UsageError(f"`instances`: {pattern} matches none of the library's {', '.join(library_names())}")
        return [(name, library_path(name)) for name in matching]
    path = Path(pattern).expanduser()
    path = path if path.is_absolute() else folder / path
    if not glob.has_magic(pattern):
        return [(path.stem, path)]  # if there is none, reading it reports that
    paths = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207
    if not paths:
        raise UsageError(f"`instances`: no file matches {path}")
    return [(path.stem, path) for path in paths]


def due(plan: Plan, there: dict[Key, tuple[str, str | None]], timeouts: bool, errors: bool) -> list[Any]:
    """The tasks whose rows are not there, or are to be made again.

    Parameters
    ----------
    plan : Plan
    there : dict
        Kind and status by key, as `Store.keys` has them.
    timeouts : bool
        Make rows again that ended at their time limit.
    errors : bool
        Make rows again of any kind but `ok`.
    """

    def wanted(task: Job) -> bool:
        if task.key not in there:
            return True
        kind, status = there[task.key]
        return (timeouts and status == Status.TIME_LIMIT) or (errors and kind != kinds.OK)

    return [task for task in plan.tasks if wanted(task)]


def run_plan(
    plan: Plan,
    store: Store,
    engine: Engine | None = None,
    *,
    rerun_timeouts: bool = False,
    rerun_errors: bool = False,
    should_stop: Callable[[], bool] = never,
    progress: Progress | None = None,
    work: Callable[[Any], Made] | None = None,
) -> Outcome:
    """Make the rows that are not in the store yet, and write each as it comes.

    Parameters
    ----------
    plan : Plan
    store : Store
        Open for writing.
    engine : Engine, optional
        `Serial` when not given.
    rerun_timeouts, rerun_errors : bool
        See `due`. A row stays until the one that replaces it is there.
    should_stop : callable
        True ends the run; what is unfinished is left for the next.
    progress : Progress, optional
    work : callable, optional
        Makes the row of a job, in a worker; `run_task` where it is not given.
    """
    engine = engine or Serial()
    tasks = due(plan, store.keys(), rerun_timeouts, rerun_errors)
    outcome = Outcome(planned=len(plan.tasks), there=len(plan.tasks) - len(tasks))
    for instance in plan.instances:
        store.add_instance(instance)
    if progress is not None:
        progress.start(len(tasks))
    started = time.perf_counter()
    if work is None:
        work = partial(run_task, should_stop=should_stop) if isinstance(engine, Serial) else run_task
    for task, made in engine.run(tasks, work, should_stop):
        if made is None:
            row = task.row(kinds.LOST, "killed its worker at every try: out of memory, perhaps")
        else:
            row = made.row
            if row.status == Status.INTERRUPTED:
                continue  # unfinished: the next run makes it
            row.environment = store.add_environment(made.environment)
            row.trace = None if row.trace is None else thinned(row.trace)
        store.add(row, replace=True)
        outcome.made += 1
        outcome.kinds[row.kind] += 1
        if progress is not None:
            progress.row(row)
    outcome.interrupted = should_stop() and outcome.there + outcome.made < outcome.planned
    outcome.seconds = time.perf_counter() - started
    outcome.refuted = refute(store)
    return outcome


def refute(store: Store) -> int:
    """Turn rows `wrong` whose bound lies above the loss of another row of the same problem; returns how many."""
    best: dict[tuple[str, str, int], Row] = {}
    scale: dict[tuple[str, str, int], float] = {}
    rows = [row for row in store.rows() if row.kind == kinds.OK and row.objective is not None]
    for row in rows:
        problem = row.instance_sha256, row.objective_kind, row.budget
        if problem not in best or _loss(row) < _loss(best[problem]):
            best[problem] = row
        scale[problem] = max(scale.get(problem, 0.0), abs(_loss(row)))
    refuted = 0
    for row in rows:
        problem = row.instance_sha256, row.objective_kind, row.budget
        other = best[problem]
        if row.bound is None or row.bound <= _loss(other) + slack(row.bound, _loss(other), scale[problem]):
            continue
        message = f"claims the bound {row.bound:.9g}, {other.label} has the loss {_loss(other):.9g}"
        logger.warning(f"{row.label}, budget {row.budget}, seed {row.seed}: {message}")
        store.set_kind(row.id, kinds.WRONG, message)
        refuted += 1
    return refuted


def _loss(row: Row) -> float:
    assert row.objective is not None
    return row.objective


def summary(plan: Plan, tasks: Sequence[Job], workers: int = 1) -> list[str]:
    """What a run would do: rows by solver, and the longest that it can take."""
    counts: dict[str, tuple[int, float]] = {}
    unlimited = False
    for task in tasks:
        rows, seconds = counts.get(task.label, (0, 0.0))
        unlimited |= task.time_limit is None
        counts[task.label] = rows + 1, seconds + (task.time_limit or 0.0)
    width = max((len(label) for label in counts), default=0)
    lines = [
        f"{label:<{width}}  {rows:>6} rows" + (f", at most {seconds:,.0f} s of solving" if seconds else "")
        for label, (rows, seconds) in counts.items()
    ]
    total = sum(seconds for _, seconds in counts.values()) / workers
    limit = "solvers without a time limit on top" if unlimited else "building, reading and warm-up on top"
    return [
        f"{plan.name}: {len(plan.tasks)} rows on {len(plan.instances)} instances, {len(tasks)} of them to be made",
        *lines,
        f"at most {total:,.0f} s of solving with {workers} worker{'s' if workers > 1 else ''}; {limit}",
    ]
