"""Start-up times as a user experiences them: `python -m cbs_opt.bench.startup` prints a Markdown table.

Everything is measured in fresh processes from their start to their end, so that the interpreter, imports and
reading count. "First run" means with empty caches of bytecode and compiled kernels. The processor's seconds, of
all threads, show what remains of a figure on an idle machine.

No view of `cbs-bench`: it measures within a process, after imports and warm-up.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cbs_opt.cli.arguments import whole_option
from cbs_opt.cli.common import Parser, run_main
from cbs_opt.errors import CbsError


class Run(NamedTuple):
    """A process that has ended: seconds from start to end, processor seconds of all threads, its stdout."""

    seconds: float
    cpu: float
    out: str = ""


class Row(NamedTuple):
    """One line of the table: what was measured, the seconds asked for, and the runs."""

    what: str
    demand: float | None
    runs: list[Run]


def fresh_process(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Run:
    """Run the interpreter with `arguments`.

    Raises
    ------
    CbsError
        When the process fails.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise CbsError(f"{' '.join(arguments)} ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(seconds, cpu, done.stdout)


def measure(
    instance: Path, ls_instance: Path, ls_budget: int | None, ls_epsilon: float, repeats: int
) -> list[Row]:
    """Make all rows.

    Parameters
    ----------
    instance : Path
        For magnitude and cbs.
    ls_instance, ls_budget, ls_epsilon : Path, int or None, float
        For ls, whose solving alone is measured, after a warm-up in the same process.
    repeats : int
        Runs of each measurement.
    """
    command = ["-m", "cbs_opt.cli.solve", str(instance), "-q", "--solver"]
    bare = [fresh_process(["-c", "pass"]) for _ in range(repeats)]
    imported = [fresh_process(["-c", "import cbs_opt"]) for _ in range(repeats + 1)][1:]
    base = statistics.median(run.seconds for run in bare), statistics.median(run.cpu for run in bare)
    alone = [Run(run.seconds - base[0], run.cpu - base[1]) for run in imported]
    rows = [
        Row("start of the interpreter alone", None, bare),
        Row("`import cbs_opt`, the interpreter taken off", 0.3, alone),
    ]
    for solver, first_demand, demand in (("magnitude", 3.0, 3.0), ("cbs", 15.0, 5.0)):
        first = []
        for _ in range(min(repeats, 3)):
            with tempfile.TemporaryDirectory() as empty:
                caches = {"PYTHONPYCACHEPREFIX": f"{empty}/bytecode", "NUMBA_CACHE_DIR": f"{empty}/numba"}
                first.append(fresh_process([*command, solver], caches))
        later = [fresh_process([*command, solver]) for _ in range(repeats)]
        rows += [
            Row(f"`cbs-solve --solver {solver}`, first run", first_demand, first),
            Row(f"`cbs-solve --solver {solver}`, later runs", demand, later),
        ]
    run = fresh_process(["-c", _LS, str(ls_instance), str(ls_budget), str(ls_epsilon), str(repeats)])
    told = json.loads(run.out)
    what = (
        f"`ls` on {ls_instance.name}, budget {told['budget']}, ε = {ls_epsilon:g}: solving after warm-up "
        f"({told['objective']:.5e} after {told['swaps']} swaps)"
    )
    return [*rows, Row(what, 0.5, [Run(*pair) for pair in told["runs"]])]


_LS = """
import json, sys, time
import cbs_opt
path, budget, epsilon, repeats = sys.argv[1:]
instance = cbs_opt.read_instance(path)
if budget != "None":
    instance = instance.with_budget(int(budget))
run = lambda: cbs_opt.solve(instance, "ls", parameters={"epsilon": float(epsilon)})
run()
runs = []
for _ in range(int(repeats)):
    before = time.process_time()
    result = run()
    runs.append((result.solve_seconds, time.process_time() - before))
sys.stdout.write(json.dumps({
    "runs": runs,
    "objective": result.objective,
    "swaps": result.extras["swaps"],
    "budget": instance.budget.total,
}))
"""


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| what | demand | median | slowest | processor, median | runs |", "|---|---|---|---|---|---|"]
    for row in rows:
        demand = "" if row.demand is None else f"≤ {row.demand:g} s"
        seconds = [run.seconds for run in row.runs]
        cpu = statistics.median(run.cpu for run in row.runs)
        lines.append(
            f"| {row.what} | {demand} | {statistics.median(seconds):.3f} s | {max(seconds):.3f} s | {cpu:.3f} s "
            f"| {len(seconds)} |"
        )
    return "\n".join(lines)


def machine() -> str:
    """One line about where the figures come from."""
    from cbs_opt.solve import environment

    found = environment()
    return (
        f"cbs-opt {found['cbs_opt']}, Python {found['python']}, numpy {found['numpy']}, {found['platform']}, "
        f"{found['cores']} cores"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_main("cbs_opt.bench.startup", _main, arguments)


def _main(arguments: list[str]) -> int:
    from cbs_opt.instances import __file__ as room

    shipped = Path(room).parent / "library" / "digits-mlp.npz"
    parser = Parser("python -m cbs_opt.bench.startup", "Measure what a user waits for, in fresh processes.")
    add = parser.add_argument
    add("--instance", type=Path, default=shipped, metavar="FILE.npz", help="default: the shipped digits-mlp")
    add("--ls-instance", type=Path, metavar="FILE.npz", help="instance for ls; default: the same")
    add("--ls-budget", type=int, metavar="N", help="default: the file's")
    add("--ls-epsilon", type=float, default=1e-8, metavar="E", help="default: 1e-8")
    add("--repeats", type=whole_option(1), default=5, metavar="N", help="default: 5")
    options = parser.parse_args(arguments)
    rows = measure(
        options.instance,
        options.ls_instance or options.instance,
        options.ls_budget,
        options.ls_epsilon,
        options.repeats,
    )
    sys.stdout.write(f"{machine()}\n\n{table(rows)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
