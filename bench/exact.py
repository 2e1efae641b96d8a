"""Exact solvers side by side: `python -m cbs_opt.bench.exact [INSTANCE ...]` prints a Markdown table.

A row for each instance, sparsity and objective, a column for each solver: seconds, nodes, and either the proof or
the gap that is left. `exact` and `highs` are the package's; any other name is a solver that `pyomo` is to find,
with the same model, start and bounds as `highs`. One process, one thread, each solver warmed up first; every value
is recomputed by the package's evaluator, and claims that contradict each other are listed.
"""

from __future__ import annotations

import logging
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cbs_opt import Instance, Result, Status, Stop, library, library_entries, read_instance, solve, solver_names
from cbs_opt.bench.anytime import load, short
from cbs_opt.bench.startup import machine
from cbs_opt.cli.common import Interrupts, Parser, run_main, say, start_logging
from cbs_opt.errors import CbsError, InstanceError, SolverError, UsageError
from cbs_opt.files.atomic import atomic_write
from cbs_opt.files.library_file import PREFIX
from cbs_opt.monitor import OPTIMAL_GAP
from cbs_opt.solver import OBJECTIVES

logger = logging.getLogger("cbs_opt")

SOLVERS = ("exact", "highs", "scip", "gurobi")
SPARSITIES = (0.5, 0.8, 0.9)
MEDIAN_UP_TO = 100
"""Weights of the instances over which the median times are taken."""

WARM_UP = "mlp-output-12"
"""Instance of the library that every solver solves before the clock counts."""

_SHARED = ("exact", "highs")  # by their own names; others through `pyomo`


@dataclass(frozen=True)
class Problem:
    """A row of the table."""

    name: str
    instance: Instance
    sparsity: float
    objective: str


@dataclass
class Row:
    """A problem with what each solver made of it; None where it refused."""

    problem: Problem
    results: dict[str, Result | None] = field(default_factory=dict)
    root: Result | None = None

    @property
    def value(self) -> float:
        """The best value of all solvers."""
        return min((r.objective for r in self.results.values() if r is not None), default=math.nan)

    @property
    def bound(self) -> float:
        """The best bound."""
        return max(
            (r.bound for r in self.results.values() if r is not None and r.bound is not None), default=-math.inf
        )


def run_solver(
    problem: Problem, solver: str, limit: float, should_stop: Callable[[], bool], iterations: int | None = None
) -> Result:
    """Solve a problem on one thread.

    Parameters
    ----------
    problem : Problem
    solver : str
        A name of the package's, or of a solver that `pyomo` finds.
    limit : float
        Seconds.
    should_stop : callable
    iterations : int, optional
        Iteration limit.

    Raises
    ------
    SolverError
        When it is missing, or cannot take the problem.
    """
    own = solver in _SHARED or solver in solver_names()
    return solve(
        problem.instance,
        solver if own else "pyomo",
        objective=problem.objective,
        parameters=None if own else {"solver": solver},
        stop=Stop(time_limit=limit, max_iterations=iterations, should_stop=should_stop),
        threads=1,
    )


def compare(
    problems: Sequence[Problem],
    solvers: Sequence[str],
    limit: float,
    should_stop: Callable[[], bool],
    notes: list[str],
    root: bool = False,
) -> Iterator[Row]:
    """Rows as they are made; what was left out is added to `notes`. An interrupted row is not given.

    Parameters
    ----------
    problems : sequence of Problem
    solvers : sequence of str
    limit : float
        Seconds of each solve.
    should_stop : callable
    notes : list of str
    root : bool
        Whether to solve the root node by itself too, with the first solver.
    """
    ready = dict.fromkeys(solvers, True)
    for objective in dict.fromkeys(problem.objective for problem in problems):
        whole = library(WARM_UP)
        for solver in solvers:
            try:
                run_solver(Problem(WARM_UP, whole, 0.5, objective), solver, 10.0, should_stop)
            except CbsError as error:
                ready[solver] = False
                _note(notes, f"{solver} is left out: {error}.")
    for problem in problems:
        row = Row(problem)
        for solver in solvers:
            if should_stop():
                return
            row.results[solver] = None
            if not ready[solver]:
                continue
            try:
                row.results[solver] = run_solver(problem, solver, limit, should_stop)
            except SolverError as error:
                _note(notes, f"{solver} on {problem.name} ({problem.instance.n} weights): {error}.")
            logger.info("%s, %g, %s: %s", problem.name, problem.sparsity, problem.objective, solver)
        if root:
            row.root = run_solver(problem, solvers[0], limit, should_stop, iterations=1)
        if should_stop():
            return
        notes += contradictions(row)
        yield row


def _note(notes: list[str], text: str) -> None:
    text = text.replace("..", ".")
    if text not in notes:
        notes.append(text)


def contradictions(row: Row) -> list[str]:
    """A sentence for each bound above another's value, by more than the tolerance of a proof."""
    found = []
    for solver, result in row.results.items():
        if result is None or result.bound is None:
            continue
        excess = result.bound - row.value
        if excess > OPTIMAL_GAP * abs(row.value):
            found.append(
                f"**{solver} is wrong** on {row.problem.name}, {row.problem.sparsity:g}, {row.problem.objective}: "
                f"its bound {result.bound:.9g} is above the value {row.value:.9g}."
            )
    return found


def own_seconds(result: Result) -> float:
    """Seconds that the solver itself says it took; all of them for the package's own."""
    return float(result.extras.get("solver_seconds", result.solve_seconds))


def seconds(value: float) -> str:
    """Milliseconds below ten seconds, else tenths."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def cell(result: Result | None, best: float) -> str:
    """Seconds (the solver's own in brackets), nodes, and the gap where there is one."""
    if result is None:
        return "–"
    text = f"{seconds(result.solve_seconds)} s"
    if "solver_seconds" in result.extras:
        text += f" ({seconds(own_seconds(result))})"
    if "nodes" in result.extras:
        nodes = int(result.extras["nodes"])
        text += f", {nodes:,} node{'' if nodes == 1 else 's'}"
    if result.status is not Status.OPTIMAL:
        gap = "no bound" if result.gap is None else f"gap {100 * result.gap:.2g} %"
        text += f", **{gap}**" + ("" if result.bound is None else f", bound {short(result.bound)}")
    if result.objective > best * (1 + OPTIMAL_GAP) and best > 0:
        text += f", value {short(result.objective)}"
    return text


def head(solvers: Sequence[str], root: bool) -> str:
    """The first two lines of the table."""
    columns = [
        "instance",
        "n",
        "sparsity",
        "objective",
        "value",
        "bound",
        *solvers,
        *(["root gap"] if root else []),
    ]
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"


def line(row: Row) -> str:
    """A row of the table."""
    problem, value = row.problem, row.value
    cells = [problem.name, str(problem.instance.n), f"{problem.sparsity:.3g}", problem.objective]
    cells += ["–" if math.isnan(value) else f"{value:.6e}", "–" if math.isinf(row.bound) else f"{row.bound:.6e}"]
    cells += [cell(result, value) for result in row.results.values()]
    if row.root is not None:
        known = row.root.bound is not None and value > 0
        cells.append(f"{100 * (value - (row.root.bound or 0.0)) / value:.2g} %" if known else "–")
    return f"| {' | '.join(cells)} |\n"


def medians(rows: Sequence[Row], solvers: Sequence[str]) -> str:
    """Median times of each solver over the rows of at most `MEDIAN_UP_TO` weights that all of them took."""
    text = ""
    for objective in OBJECTIVES:
        small = [
            row for row in rows if row.problem.objective == objective and row.problem.instance.n <= MEDIAN_UP_TO
        ]
        able = [solver for solver in solvers if any(row.results[solver] is not None for row in small)]
        small = [row for row in small if all(row.results[solver] is not None for solver in able)]
        if not small:
            continue
        text += (
            f"\n{objective.capitalize()}, n ≤ {MEDIAN_UP_TO}, the {len(small)} rows that every solver took; a row "
            "that was not proven counts with the time it was given:\n\n"
            "| solver | proven | median | of the solver's own seconds | total |\n|---|---|---|---|---|\n"
        )
        for solver in able:
            results = [result for row in small if (result := row.results[solver]) is not None]
            proven = sum(result.status is Status.OPTIMAL for result in results)
            waits = [result.solve_seconds for result in results]
            own = statistics.median(own_seconds(result) for result in results)
            text += (
                f"| {solver} | {proven} of {len(results)} | {statistics.median(waits):.4f} s | {own:.4f} s "
                f"| {sum(waits):.1f} s |\n"
            )
    return text


def problems_of(sources: Sequence[str], sparsities: Sequence[float], objectives: Sequence[str]) -> list[Problem]:
    """The problems of files, folders and names of the library, small ones first.

    Raises
    ------
    InstanceError
        For a folder without instances, or a file that cannot be read.
    """
    found: list[tuple[str, Instance]] = []
    for source in sources:
        folder = Path(source)
        if folder.is_dir():
            files = sorted(folder.glob("*.npz"))
            if not files:
                raise InstanceError(f"{folder}: the folder holds no .npz file")
            found += [(file.stem, read_instance(file)) for file in files]
        elif source.startswith(PREFIX):
            name = source.removeprefix(PREFIX)
            found.append((name, library(name)))
        else:
            found.append((folder.stem, read_instance(folder)))
    found.sort(key=lambda pair: pair[1].n)
    out = []
    for objective in objectives:
        for name, whole in found:
            if whole.budget.groups is not None:
                out.append(Problem(name, whole, whole.budget.total / whole.n, objective))
                continue
            out += [Problem(name, whole.with_sparsity(s), s, objective) for s in sparsities]
    return out


def default_sources(most: int = 200) -> list[str]:
    """Instances of the library of up to `most` weights."""
    return [f"{PREFIX}{entry.name}" for entry in library_entries() if entry.n <= most]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_main("cbs_opt.bench.exact", _main, arguments)


def _main(arguments: list[str]) -> int:
    parser = Parser("python -m cbs_opt.bench.exact", "Print what exact solvers prove, side by side.")
    add = parser.add_argument
    add("instances", nargs="*", metavar="INSTANCE", help="file, folder or library:NAME; default: the library")
    add("--solvers", nargs="+", default=list(SOLVERS), metavar="NAME", help=f"default: {' '.join(SOLVERS)}")
    add("--sparsities", type=float, nargs="+", default=list(SPARSITIES), metavar="F", help="default: .5 .8 .9")
    add("--objective", nargs="+", choices=OBJECTIVES, default=["selection"], help="default: selection")
    add("--time-limit", type=float, default=60.0, metavar="S", help="of each solve; default: 60")
    add("--root", action="store_true", help="also the gap of the root node of the first solver")
    add("-o", "--output", type=Path, metavar="FILE.md", help="also write the table to a file, row by row")
    add("-q", "--quiet", action="store_true", help="no progress on stderr")
    options = parser.parse_args(arguments)
    if not options.time_limit > 0:
        raise UsageError(f"`--time-limit` must be positive, got {options.time_limit:g}")
    for sparsity in options.sparsities:
        if not 0 <= sparsity <= 1:
            raise UsageError(f"`--sparsities` must lie in [0, 1], got {sparsity:g}")
    start_logging(options.quiet, False)
    problems = problems_of(options.instances or default_sources(), options.sparsities, options.objective)
    solvers = list(dict.fromkeys(options.solvers))
    pieces: list[str] = []

    def put(text: str) -> None:
        pieces.append(text)
        say(text)
        if options.output is not None:
            with atomic_write(options.output) as file:
                file.write("".join(pieces).encode())

    put(
        f"{machine()}, one thread, {options.time_limit:g} s each. Seconds of solving by the wall, start and model "
        "building included, reading and compilation not; in brackets the seconds that an outside solver reports "
        f"for itself. A cell without a gap is proven optimal. {load()}\n\n"
    )
    put(head(solvers, options.root))
    notes: list[str] = []
    rows: list[Row] = []
    with Interrupts() as interrupts:
        for row in compare(problems, solvers, options.time_limit, interrupts, notes, options.root):
            rows.append(row)
            put(line(row))
        if interrupts():
            notes.append(f"Interrupted after {len(rows)} of {len(problems)} rows.")
    put(medians(rows, solvers) + "".join(f"\n{note}\n" for note in notes))
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
