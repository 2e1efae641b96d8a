"""Waiting times on a new machine: `python -m cbs_opt.bench.first_minute` prints a Markdown table.

Every run is a fresh process with an empty cache of compiled kernels. Seconds count from the start of the process
to the first selection, and to the result that the README states for the solver; processor seconds are those of
the process and of all processes that it starts.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cbs_opt.bench.startup import Run, fresh_process, machine
from cbs_opt.cli.arguments import whole_option
from cbs_opt.cli.common import Parser, run_main


class Job(NamedTuple):
    """A solver, its objective, a loss at which it may stop, and what is waited for, in words."""

    solver: str
    objective: str
    target: float | None
    wanted: str


JOBS = (
    Job("search", "selection", None, "proof"),
    Job("exact", "selection", None, "proof"),
    Job("joint", "joint", 1.4485e-3, "1.448e-3"),
    Job("cbs", "selection", None, "end"),
)
"""For the shipped digits-mlp."""


class Wait(NamedTuple):
    """Seconds to the first selection and to what was wanted, and the whole run."""

    first: float
    wanted: float
    run: Run


def wait(job: Job, instance: Path, cache: str) -> Wait:
    """Make one run with a given cache folder."""
    arguments = ["-c", _SCRIPT, str(time.time()), str(instance), job.solver, job.objective, str(job.target)]
    run = fresh_process(arguments, {"CBS_OPT_CACHE": cache, "NUMBA_CACHE_DIR": cache})
    first, wanted = json.loads(run.out)
    return Wait(first, wanted, run)


_SCRIPT = """
import sys, time, json
started, path, solver, objective, target = sys.argv[1:]
import cbs_opt
first = []
def note(monitor):
    if not first:
        first.append(time.time() - float(started))
stop = cbs_opt.Stop(target=None if target == "None" else float(target))
result = cbs_opt.solve(cbs_opt.read_instance(path), solver, objective=objective, stop=stop, callback=note)
assert solver not in ("search", "exact") or result.status == "optimal", result.status
sys.stdout.write(json.dumps([first[0], time.time() - float(started)]))
"""


def table(instance: Path, jobs: Sequence[Job], repeats: int) -> str:
    """Medians and extremes of runs with an empty cache, and of runs after them, as a Markdown table."""
    lines = [
        "| solver | kernels | to the first selection | to | median | slowest | processor, median | runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for job in jobs:
        found: dict[str, list[Wait]] = {"to be compiled": [], "compiled": []}
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as cache:
                for waits in found.values():
                    waits.append(wait(job, instance, cache))
        for kernels, waits in found.items():
            first = statistics.median(one.first for one in waits)
            wanted = [one.wanted for one in waits]
            cpu = statistics.median(one.run.cpu for one in waits)
            lines.append(
                f"| `{job.solver}` | {kernels} | {first:.1f} s | {job.wanted} | {statistics.median(wanted):.1f} s "
                f"| {max(wanted):.1f} s | {cpu:.1f} s | {len(waits)} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_main("cbs_opt.bench.first_minute", _main, arguments)


def _main(arguments: list[str]) -> int:
    from cbs_opt.instances import __file__ as room

    parser = Parser("python -m cbs_opt.bench.first_minute", "Measure the first runs on a new machine.")
    names = [job.solver for job in JOBS]
    parser.add_argument("--solvers", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--repeats", type=whole_option(1), default=3, metavar="N", help="default: 3")
    options = parser.parse_args(arguments)
    shipped = Path(room).parent / "library" / "digits-mlp.npz"
    jobs = [job for job in JOBS if job.solver in options.solvers]
    sys.stdout.write(f"{machine()}\n\n{table(shipped, jobs, options.repeats)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
