"""Analysis of the rows of a store: problems with their best known losses, and the gaps and times of every run.

A *problem* is an instance with a budget and an objective. *Best known* is the least loss of all valid rows of the
store, *proven* a best known loss that some valid row's bound, or its finished search, shows to be optimal. A row
whose bound, or whose claim to be optimal, is refuted by the selection of another row counts as wrong.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cbs_opt.bench.reports.metrics import (
    TOLERANCE,
    certified_gap,
    first_closed,
    first_times,
    is_closed,
    median,
    relative_gap,
    slack,
)
from cbs_opt.bench.runs.store import (
    ERROR,
    INFEASIBLE,
    KINDS,
    LOST,
    OK,
    UNSUPPORTED,
    WRONG,
    Row,
    Store,
    StoredInstance,
)
from cbs_opt.result import Status

logger = logging.getLogger("cbs_opt")

NEAR = 0.01
"""The coarser of the two targets: a loss within 1 % of the best known."""

FAILURES = (WRONG, INFEASIBLE, ERROR, LOST)
"""Kinds of rows that count as runs without a selection."""

_EVERY = 20_000  # rows between two words about progress


@dataclass(slots=True)
class Run:
    """A row, measured.

    Attributes
    ----------
    row : Row
        Its kind is `wrong` where another row refutes what it claims.
    gap : float
        To the best known loss; infinite for a failure.
    certified : float or None
        Of its own bound; None without one.
    exact_s, near_s : float
        Seconds, building included, until the loss was within `TOLERANCE` and within `NEAR` of the best known;
        infinite where it never was.
    proof_s : float
        Seconds until its own bound proved its loss; infinite where it never did.
    total_s : float
        Seconds of building and solving.
    events : int or None
        Events of its trace; None where the trace was not needed.
    """

    row: Row
    gap: float = math.inf
    certified: float | None = None
    exact_s: float = math.inf
    near_s: float = math.inf
    proof_s: float = math.inf
    total_s: float = 0.0
    events: int | None = None

    @property
    def valid(self) -> bool:
        """Whether it gave a selection that counts."""
        return self.row.kind == OK and self.row.objective is not None


@dataclass
class Problem:
    """An instance with a budget and an objective, and the results of all its rows.

    Attributes
    ----------
    instance : StoredInstance
    objective_kind : str
    budget : int
    sparsity : float
    runs : dict of str to list of Run
        By solver.
    refused : dict of str to int
        Rows that a solver refused, which are not among its runs.
    best : float or None
        Best known loss.
    lower : float or None
        Best bound that nothing refutes.
    scale : float
        Largest absolute loss of a valid row.
    proven : bool
    """

    instance: StoredInstance
    objective_kind: str
    budget: int
    sparsity: float
    runs: dict[str, list[Run]] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    best: float | None = None
    lower: float | None = None
    scale: float = 0.0
    proven: bool = False

    @property
    def valid(self) -> list[Run]:
        """Runs that count."""
        return [run for runs in self.runs.values() for run in runs if run.valid]

    def time(self, solver: str, what: str) -> float:
        """Median over the seeds of `exact_s`, `near_s` or `proof_s`; infinite where it was not run."""
        return median([getattr(run, what) for run in self.runs.get(solver, [])] or [math.inf])


@dataclass
class Section:
    """All problems with one objective.

    Attributes
    ----------
    objective_kind : str
    problems : list of Problem
        By size, instance and budget.
    solvers : list of str
        Those with a row, refused ones included, in the order of their first rows.
    """

    objective_kind: str
    problems: list[Problem]
    solvers: list[str]

    def runs(self, solver: str) -> list[Run]:
        """Every run of a solver."""
        return [run for problem in self.problems for run in problem.runs.get(solver, [])]

    @cached_property
    def cap(self) -> float:
        """Seconds at which a run that did not get there is counted: the longest limit or successful time.

        Without any, the longest run; 1 without any run.
        """
        runs = [run for problem in self.problems for runs in problem.runs.values() for run in runs]
        times = [run.row.time_limit for run in runs if run.row.time_limit is not None]
        times += [t for run in runs for t in (run.near_s, run.exact_s, run.proof_s) if math.isfinite(t)]
        return max(times, default=max((run.total_s for run in runs), default=0.0)) or 1.0

    def drawn(self) -> list[str]:
        """Solvers that have at least one run."""
        return [name for name in self.solvers if any(name in problem.runs for problem in self.problems)]


@dataclass
class Analysis:
    """A store, read and measured.

    Attributes
    ----------
    path : Path
    meta : mapping
    rows : list of Row
        All of them, without traces.
    names : dict of int to str
        The solver's name of each row, by the row's id.
    sections : list of Section
    instances : mapping of str to StoredInstance
    environments : mapping of int to mapping
    """

    path: Path
    meta: Mapping[str, str]
    rows: list[Row]
    names: dict[int, str]
    sections: list[Section]
    instances: Mapping[str, StoredInstance]
    environments: Mapping[int, Mapping[str, Any]]

    @property
    def solvers(self) -> list[str]:
        """Every solver of the store, in the order of their first rows."""
        return list(dict.fromkeys(self.names.values()))

    @property
    def problems(self) -> list[Problem]:
        """Of all sections."""
        return [problem for section in self.sections for problem in section.problems]


def analyse(store: Store) -> Analysis:
    """Read a store and measure every run.

    O(rows) time and memory; the traces are read one at a time, and only of runs that reached a target.
    """
    rows = store.rows()
    names = solver_names(rows)
    instances = store.instances()
    grouped: dict[str, dict[tuple[str, int], Problem]] = defaultdict(dict)
    solvers: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        name, kind = names[_id(row)], row.objective_kind
        solvers[kind][name] = None
        if row.kind == OK and row.objective is None:
            row.kind, row.message = ERROR, row.message or "the row has no loss"
        elif row.kind not in KINDS:
            row.kind, row.message = ERROR, f"the kind '{row.kind}' of the row is unknown"
        key = (row.instance_sha256, row.budget)
        problem = grouped[kind].get(key)
        if problem is None:
            instance = instances.get(row.instance_sha256) or _unknown_instance(row)
            problem = grouped[kind][key] = Problem(instance, kind, row.budget, row.sparsity)
        if row.kind == UNSUPPORTED:
            problem.refused[name] = problem.refused.get(name, 0) + 1
            continue
        run = Run(row, total_s=(row.build_s or 0.0) + (row.solve_s or 0.0))
        problem.runs.setdefault(name, []).append(run)
    sections = []
    for kind in sorted(grouped, key=lambda kind: (kind != "selection", kind)):
        problems = sorted(grouped[kind].values(), key=_order)
        for problem in problems:
            _measure(problem)
        sections.append(Section(kind, problems, list(solvers[kind])))
    _time(store, sections)
    return Analysis(store.path, store.meta, rows, names, sections, instances, store.environments())


def solver_names(rows: Sequence[Row]) -> dict[int, str]:
    """The label of each row, by its id, with parameters and time limit where the label alone is ambiguous."""
    settings: dict[str, dict[tuple[str, str], None]] = defaultdict(dict)
    limits: dict[tuple[str, str, str], set[float | None]] = defaultdict(set)
    for row in rows:
        settings[row.label][(row.solver, row.parameters)] = None
        limits[(row.label, row.solver, row.parameters)].add(row.time_limit)
    names = {}
    for row in rows:
        name = row.label
        if len(settings[row.label]) > 1:
            name += f" ({row.solver}{_plain(row.parameters)})"
        if len(limits[(row.label, row.solver, row.parameters)]) > 1:
            name += ", no limit" if row.time_limit is None else f", {row.time_limit:g} s"
        names[_id(row)] = name
    return names


def _plain(parameters: str) -> str:
    """`{"a":1}` as ` a=1`."""
    try:
        given = json.loads(parameters or "{}")
    except ValueError:
        return f" {parameters}"
    return "".join(f" {key}={value}" for key, value in given.items()) if isinstance(given, dict) else f" {given}"


def _id(row: Row) -> int:
    assert row.id is not None  # every row of a store has one
    return row.id


def _unknown_instance(row: Row) -> StoredInstance:
    """A placeholder for an instance without a description in the store."""
    n = round(row.budget / row.sparsity) if row.sparsity else row.budget
    return StoredInstance(row.instance_sha256, row.instance_sha256[:12], n, 0, "unknown", {})


def _order(problem: Problem) -> tuple[int, str, str, int]:
    return problem.instance.n, problem.instance.name, problem.instance.sha256, problem.budget


def _measure(problem: Problem) -> None:
    """Best known loss, bound and proof of a problem, and the gaps of its runs."""
    losses = [run.row.objective for run in problem.valid if run.row.objective is not None]
    if not losses:
        return
    best = problem.best = min(losses)
    scale = problem.scale = max(map(abs, losses))
    holder = next(
        name for name, runs in problem.runs.items() if any(run.valid and run.row.objective == best for run in runs)
    )
    for run in problem.valid:
        row, bound = run.row, run.row.bound
        assert row.objective is not None
        if bound is not None and bound > best + slack(bound, best, scale):
            row.kind, row.message = WRONG, f"claims the bound {bound:.9g}, {holder} has a selection of {best:.9g}"
        elif row.status == Status.OPTIMAL and row.objective > best + slack(row.objective, best, scale):
            row.kind = WRONG
            row.message = f"claims that {row.objective:.9g} is optimal, {holder} has a selection of {best:.9g}"
    valid = problem.valid
    problem.lower = max((run.row.bound for run in valid if run.row.bound is not None), default=None)
    for run in valid:
        row = run.row
        assert row.objective is not None
        run.gap = relative_gap(row.objective, best, scale)
        if row.bound is not None:
            run.certified = certified_gap(row.objective, row.bound, scale)
            finished = row.status == Status.OPTIMAL
            if finished or is_closed(row.objective, row.bound, scale):
                run.proof_s = run.total_s
            problem.proven |= finished
    problem.proven |= is_closed(best, problem.lower, scale)


def _time(store: Store, sections: Sequence[Section]) -> None:
    """Times to the targets and to the proof, from the traces."""
    done = 0
    for problem in (problem for section in sections for problem in section.problems):
        if problem.best is None:
            continue
        best, scale = problem.best, problem.scale
        exact = best + slack(best, best, scale)
        near = max(best + NEAR * abs(best), exact)
        for run in problem.valid:
            row = run.row
            assert row.objective is not None
            if row.objective > near and math.isinf(run.proof_s):
                continue
            build = row.build_s or 0.0
            trace = store.trace(_id(row))
            run.events = len(trace)
            # The solver's own values determine when, the recomputed loss whether.
            said_exact, said_near = first_times(trace, (exact, near))
            if row.objective <= near:
                run.near_s = min(build + said_near, run.total_s)
            if row.objective <= exact:
                run.exact_s = min(build + said_exact, run.total_s)
            if math.isfinite(run.proof_s):
                run.proof_s = min(build + first_closed(trace, scale), run.total_s)
            done += 1
            if done % _EVERY == 0:
                logger.info("%d traces read", done)


def reached(run: Run) -> bool:
    """Whether a run ended within `TOLERANCE` of the best known loss."""
    return run.gap <= TOLERANCE or math.isfinite(run.exact_s)
