"""Best-known values of the library: `python -m cbs_opt.bench.best_known` solves it and writes the index.

Each instance is solved for both objectives at its own budget and at sparsities .5, .8 and .9, by branch and bound
and, where that proves nothing, by the heuristic of the objective. A value replaces the one in the index where it
is lower, a bound where it is higher, so that running it longer only improves the index.

No view of `cbs-bench`: the heuristic starts from what branch and bound found; rows do not depend on each other.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbs_opt import Instance, Stop, read_instance, solve
from cbs_opt.cli.common import Parser, run_main, start_logging
from cbs_opt.errors import SolverError
from cbs_opt.files.atomic import atomic_write
from cbs_opt.files.library_file import INDEX
from cbs_opt.monitor import OPTIMAL_GAP
from cbs_opt.solve import DEFAULT_SOLVERS

logger = logging.getLogger("cbs_opt")

SPARSITIES = (0.5, 0.8, 0.9)


def problems(instance: Instance) -> dict[int, Instance]:
    """The instance at its own budget and, where it has no groups, at each sparsity; by budget."""
    found = {instance.budget.total: instance}
    if instance.budget.groups is None:
        for sparsity in SPARSITIES:
            other = instance.with_sparsity(sparsity)
            found.setdefault(other.budget.total, other)
    return dict(sorted(found.items()))


def improve(
    best: dict[str, Any] | None, instance: Instance, objective: str, seconds: float
) -> dict[str, Any] | None:
    """Solve by branch and bound and, where that proves nothing, by heuristic, and merge with what is known.

    Parameters
    ----------
    best : dict or None
        A line of the index: objective, budget, value, bound, proven, solver.
    instance : Instance
        With the budget of that line.
    objective : {"selection", "joint"}
    seconds : float
        Time limit of each solver.

    Returns
    -------
    dict or None
        The better of both; None if nothing was known and no solver takes the problem.
    """
    if best is not None and best["proven"]:
        return best
    warm = None
    for solver in ("exact", DEFAULT_SOLVERS[objective]):
        result = solve(
            instance, solver, objective=objective, stop=Stop(time_limit=seconds), warm_start=warm, threads=1
        )
        warm = result.pruned
        if best is None or result.objective < best["value"] - OPTIMAL_GAP * abs(best["value"]):
            bound = None if best is None else best["bound"]
            best = {
                "objective": objective,
                "budget": instance.budget.total,
                "value": result.objective,
                "bound": bound,
                "proven": False,
                "solver": solver,
            }
        if result.bound is not None and (best["bound"] is None or result.bound > best["bound"]):
            best["bound"] = result.bound
        if best["bound"] is not None:
            if best["bound"] - best["value"] > 10 * OPTIMAL_GAP * abs(best["value"]) + 1e-300:
                raise SolverError(
                    f"{objective} {best['budget']}: the bound {best['bound']} is above the value {best['value']}, "
                    "so one of them is wrong"
                )
            best["bound"] = min(best["bound"], best["value"])
            best["proven"] = best["value"] - best["bound"] <= OPTIMAL_GAP * max(abs(best["value"]), 1e-300)
        if best["proven"]:
            break
    return best


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_main("cbs_opt.bench.best_known", _main, arguments)


def _main(arguments: list[str]) -> int:
    from cbs_opt.instances import __file__ as room

    parser = Parser(
        "python -m cbs_opt.bench.best_known", "Solve the library and write best-known values to its index."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="instances to work on; default: all")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(room).parent / "library",
        help="with instances and their index; default: the library",
    )
    parser.add_argument("--time-limit", type=float, default=20.0, metavar="S", help="of each solver; default: 20")
    options = parser.parse_args(arguments)
    start_logging(quiet=False, verbose=False)
    path = options.folder / INDEX
    content = json.loads(path.read_text(encoding="utf-8"))
    for item in content["instances"]:
        if options.names and item["name"] not in options.names:
            continue
        known = {(best["objective"], best["budget"]): best for best in item["best_known"]}
        for budget, instance in problems(read_instance(options.folder / f"{item['name']}.npz")).items():
            for objective in DEFAULT_SOLVERS:
                key = objective, budget
                logging.disable(logging.INFO)
                best = improve(known.get(key), instance, objective, options.time_limit)
                logging.disable(logging.NOTSET)
                if best is not None:
                    known[key] = best
                    state = "proven" if best["proven"] else f"bound {best['bound']}"
                    logger.info(
                        f"{item['name']} {objective} {budget}: {best['value']:.9e} {state} ({best['solver']})"
                    )
        item["best_known"] = [known[key] for key in sorted(known, reverse=True)]
        with atomic_write(path) as out:  # after every instance: an interruption costs one
            out.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
