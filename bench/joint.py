"""The joint problem over time: `python -m cbs_opt.bench.joint INSTANCE.npz ...` prints Markdown tables.

`backward` and `joint` against thresholding and coordinate descent (`cbs_opt.bench.chita`) at equal time, and the
joint loss of the best selection after its update. Every objective is recomputed by `cbs_opt.joint_loss`; reading,
building and compilation are not counted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from threadpoolctl import threadpool_limits

from cbs_opt import Instance, Monitor, Stop, read_instance
from cbs_opt.bench.anytime import CLOCKS, Anytime, load, losses_at, run_for, spread, table
from cbs_opt.bench.chita import Chita
from cbs_opt.bench.startup import machine
from cbs_opt.cli.common import Parser, run_main
from cbs_opt.errors import CbsError, UsageError
from cbs_opt.files.atomic import atomic_write

SPLIT = ("magnitude", "search")
"""Solvers of the selection problem, whose selections are updated afterwards."""


def run_chita(instance: Instance, seconds: float, threads: int = 1, clock: str = "wall") -> Anytime:
    """Thresholding and coordinate descent for so many seconds; it is deterministic."""
    with threadpool_limits(threads):
        method, taken = Chita(instance), Anytime()
        monitor = Monitor(Stop(time_limit=seconds), taken, CLOCKS[clock])
        monitor.start()
        method.run(monitor)
    return taken


def joint_quality(
    instance: Instance, times: Sequence[float], seeds: Sequence[int], threads: int = 1, clock: str = "wall"
) -> tuple[dict[str, list[str]], list[str]]:
    """Rows of the table of one instance, and sentences about what was skipped.

    Parameters
    ----------
    instance : Instance
    times : sequence of float
        Seconds of solving.
    seeds : sequence of int
    threads : int
    clock : {"wall", "processor"}

    Returns
    -------
    rows : dict of str to list of str
        A cell for each time.
    notes : list of str
    """
    rows: dict[str, list[str]] = {}
    notes: list[str] = []

    def add(name: str, runs: Sequence[Anytime]) -> None:
        losses = [losses_at(instance, run, times, "joint") for run in runs]
        rows[name] = [spread(column) for column in zip(*losses, strict=True)]
        if any(run.bounds and run.bounds[-1] is not None for run in runs) and "joint" in name:
            rows[f"{name}, bound"] = [spread([run.bound_at(time) for run in runs]) for time in times]

    def runs(name: str, objective: str, of: Sequence[int]) -> list[Anytime]:
        most = max(times)
        return [
            run_for(instance, name, most, objective=objective, seed=seed, threads=threads, clock=clock)
            for seed in of
        ]

    for name in SPLIT:
        add(f"{name}, then update", runs(name, "selection", seeds[:1] if name == "magnitude" else seeds))
    try:
        add("chita", [run_chita(instance, max(times), threads, clock)])
    except CbsError as error:
        notes.append(f"chita is left out: {error}.")
    for name in ("backward", "joint"):
        add(name, runs(name, "joint", seeds[:1] if name == "backward" else seeds))
    return rows, notes


def report(
    paths: Sequence[Path],
    cases: Sequence[tuple[float, float]],
    times: Sequence[float],
    seeds: Sequence[int],
    threads: int,
    clock: str,
) -> Iterator[str]:
    """The tables as Markdown, one piece after the other as they are made."""
    yield (
        f"{machine()}, {threads} thread{'s' if threads > 1 else ''}. Median [least, largest] over the seeds "
        f"{', '.join(map(str, seeds))}; {clock} seconds. {load()}\n"
    )
    for path in paths:
        whole = read_instance(path)
        for damping, sparsity in cases:
            instance = whole.with_sparsity(sparsity)
            if whole.curvature.damping is not None:
                instance = instance.with_damping(damping)
            rows, notes = joint_quality(instance, times, seeds, threads, clock)
            yield f"\n## {path.name}: {instance.describe()}\n\n{table(times, rows)}\n"
            yield from (f"\n{note}\n" for note in notes)


def _case(text: str) -> tuple[float, float]:
    """Damping and sparsity of "1e-5:.9"."""
    damping, _, sparsity = text.partition(":")
    return float(damping), float(sparsity)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_main("cbs_opt.bench.joint", _main, arguments)


def _main(arguments: list[str]) -> int:
    parser = Parser("python -m cbs_opt.bench.joint", "Print the best joint loss of solvers at given times.")
    add = parser.add_argument
    add("instances", type=Path, nargs="+", metavar="INSTANCE.npz")
    add(
        "--cases",
        type=_case,
        nargs="+",
        default=[(1e-5, 0.9), (1e-7, 0.98), (1e-5, 0.5)],
        metavar="DAMPING:SPARSITY",
        help="dampings of gradient factors and sparsities; default: 1e-5:.9 1e-7:.98 1e-5:.5",
    )
    add("--times", type=float, nargs="+", default=[1.0, 4.0, 10.0], metavar="S")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    add("--threads", type=int, default=1, metavar="N")
    add("--clock", choices=tuple(CLOCKS), default="wall", help="default: wall")
    add("-o", "--output", type=Path, metavar="FILE.md", help="also write the tables to a file")
    options = parser.parse_args(arguments)
    if min(options.times) <= 0:
        raise UsageError(f"`--times` must be positive, got {min(options.times):g}")
    times = sorted(options.times)
    pieces = []
    for piece in report(options.instances, options.cases, times, options.seeds, options.threads, options.clock):
        sys.stdout.write(piece)
        sys.stdout.flush()
        pieces.append(piece)
    if options.output is not None:
        with atomic_write(options.output) as file:
            file.write("".join(pieces).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
