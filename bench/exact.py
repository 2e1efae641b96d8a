"""Exact solvers side by side: `python -m cbs_opt.bench.exact [INSTANCE ...]` prints a Markdown table.

Its rows are those of a benchmark, and its table is that of `cbs-bench report --proofs`; the arguments make the
configuration. `exact` and `highs` are the package's; any other name is a solver that `pyomo` is to find, with the
same model, start and bounds as `highs`. One process, one thread, each solver warmed up first.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cbs_opt import Stop, read_instance, solve, solver_names
from cbs_opt.bench.reports.analysis import analyse
from cbs_opt.bench.reports.proofs import proofs
from cbs_opt.bench.runs.configuration import Configuration, SolverEntry, unavailable
from cbs_opt.bench.runs.runner import Plan, make_plan, run_plan
from cbs_opt.bench.runs.show import progress
from cbs_opt.bench.runs.store import Store
from cbs_opt.cli.common import Interrupts, Parser, check_outputs, run_main, say, start_logging
from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.files.atomic import write_text
from cbs_opt.solver import OBJECTIVES

SOLVERS = ("exact", "highs", "scip", "gurobi")
SPARSITIES = (0.5, 0.8, 0.9)
LIBRARY_UP_TO = 200
"""Weights of the instances of the library that are taken where none is named."""


def configuration(
    instances: Sequence[str],
    solvers: Sequence[str],
    sparsities: Sequence[float],
    objectives: Sequence[str],
    time_limit: float,
) -> Configuration:
    """The benchmark of these arguments; `instances` are files, folders or names of the library.

    Raises
    ------
    InstanceError
        For a folder without instances.
    """
    patterns = []
    for source in instances:
        folder = Path(source).is_dir()
        if folder and not any(Path(source).glob("*.npz")):
            raise InstanceError(f"{source}: the folder holds no .npz file")
        patterns.append(f"{source}/*.npz" if folder else source)
    entries = []
    for objective in objectives:
        for name in dict.fromkeys(solvers):
            own = name in solver_names()
            parameters = json.dumps({} if own else {"solver": name}, separators=(",", ":"))
            most = None if instances else LIBRARY_UP_TO
            entries.append(
                SolverEntry(
                    name if own else "pyomo",
                    name,
                    parameters,
                    objective,
                    tuple(sparsities),
                    (),
                    (0,),
                    time_limit,
                    most,
                )
            )
    return Configuration("exact", tuple(patterns or ["library:*"]), Path.cwd(), 1, tuple(entries))


def root_bounds(plan: Plan) -> dict[tuple[str, str, int], float]:
    """Bounds of the root nodes of every problem by the first solver, as `proofs` takes them."""
    found: dict[tuple[str, str, int], float] = {}
    for task in plan.tasks:
        key = task.instance_sha256, task.objective, task.budget
        if key not in found and task.label == plan.tasks[0].label:
            instance = read_instance(task.path).with_budget(task.budget)
            stop = Stop(time_limit=task.time_limit, max_iterations=1)
            result = solve(instance, task.solver, objective=task.objective, stop=stop, threads=1)
            found[key] = result.bound if result.bound is not None else 0.0
    return found


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
    add("--store", type=Path, metavar="FILE.sqlite", help="keep the rows; the same command goes on with them")
    add("-o", "--output", type=Path, metavar="FILE.md", help="also write the table to a file")
    add("-q", "--quiet", action="store_true", help="no progress on stderr")
    options = parser.parse_args(arguments)
    if not options.time_limit > 0:
        raise UsageError(f"`--time-limit` must be positive, got {options.time_limit:g}")
    for sparsity in options.sparsities:
        if not 0 <= sparsity <= 1:
            raise UsageError(f"`--sparsities` must lie in [0, 1], got {sparsity:g}")
    check_outputs(options.instances, (options.output,))
    start_logging(options.quiet, False)
    asked = configuration(
        options.instances, options.solvers, options.sparsities, options.objective, options.time_limit
    )
    plan = make_plan(asked)
    names = {instance.sha256: instance.name for instance in plan.instances}
    with tempfile.TemporaryDirectory() as folder, Interrupts() as interrupts:
        path = options.store or Path(folder) / "exact.sqlite"
        with Store(path, "w") as store, progress(names, options.quiet) as shown:
            outcome = run_plan(plan, store, should_stop=interrupts, progress=shown)
            if not outcome.made and not outcome.there:
                return 1
            analysis = analyse(store)
        text = proofs(analysis, root_bounds(plan) if options.root and not interrupts() else None)
    for label, reason in {entry.label: unavailable(entry) for entry in asked.solvers}.items():
        text += f"\n{label} is left out: {reason}.\n" if reason else ""
    if outcome.interrupted:
        text += f"\nInterrupted after {outcome.there + outcome.made} of {outcome.planned} rows.\n"
    say(text)
    if options.output is not None:
        write_text(options.output, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
