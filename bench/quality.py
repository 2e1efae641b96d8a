"""Quality of selections over time: `python -m cbs_opt.bench.quality INSTANCE.npz ...` prints Markdown tables.

For each instance and sparsity a row for each solver: median, least and largest objective of all seeds at each
time, and the bound where the solver proves one. One thread; reading, building and compilation are not counted;
every objective is recomputed by `cbs_opt.selection_loss`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from threadpoolctl import threadpool_limits

from cbs_opt import Instance, read_instance, solver_names
from cbs_opt.bench.anytime import CLOCKS, load, losses_at, run_for, spread, table
from cbs_opt.bench.peers import PEERS, MissingPeerError, Samplers, run_sampler
from cbs_opt.bench.startup import machine
from cbs_opt.cli.common import Parser, run_main
from cbs_opt.errors import UsageError
from cbs_opt.files.atomic import atomic_write

DEFAULT_SOLVERS = ("search", "magnitude", "ls", "cbs", *PEERS)


def quality(
    instance: Instance,
    solvers: Sequence[str],
    times: Sequence[float],
    seeds: Sequence[int],
    clock: str = "wall",
) -> tuple[dict[str, list[str]], list[str]]:
    """Rows of the table of one instance, and sentences about what was skipped.

    Parameters
    ----------
    instance : Instance
    solvers : sequence of str
        Names of solvers, or of `PEERS`.
    times : sequence of float
        Seconds of solving.
    seeds : sequence of int
    clock : {"wall", "processor"}
        Of the package's solvers; the samplers count by the wall.

    Returns
    -------
    rows : dict of str to list of str
        A cell for each time.
    notes : list of str
    """
    rows: dict[str, list[str]] = {}
    notes: list[str] = []
    samplers: Samplers | None = None
    for name in solvers:
        runs = []
        if name in PEERS:
            try:
                samplers = samplers or Samplers(instance)
            except MissingPeerError as error:
                notes += [] if str(error) in notes else [str(error)]
                continue
            with threadpool_limits(1):
                runs = [run_sampler(samplers, PEERS[name], times, seed) for seed in seeds]
        else:
            runs = [
                run_for(instance, name, max(times), objective="selection", seed=seed, clock=clock)
                for seed in seeds
            ]
        losses = [losses_at(instance, run, times, "selection") for run in runs]
        rows[name] = [spread(column) for column in zip(*losses, strict=True)]
        if any(run.bounds and run.bounds[-1] is not None for run in runs):
            rows[f"{name}, bound"] = [spread([run.bound_at(time) for run in runs]) for time in times]
    return rows, notes


def report(
    paths: Sequence[Path],
    sparsities: Sequence[float] | None,
    solvers: Sequence[str],
    times: Sequence[float],
    seeds: Sequence[int],
    clock: str,
) -> Iterator[str]:
    """The tables as Markdown, one piece after the other as they are made."""
    named = ", ".join(map(str, seeds))
    yield f"{machine()}, one thread. Median [least, largest] over the seeds {named}; {clock} seconds. {load()}\n"
    for path in paths:
        whole = read_instance(path)
        for sparsity in list(sparsities or []) or [None]:  # type: ignore[list-item]
            instance = whole if sparsity is None else whole.with_sparsity(sparsity)
            rows, notes = quality(instance, solvers, times, seeds, clock)
            yield f"\n## {path.name}: {instance.describe()}\n\n{table(times, rows)}\n"
            yield from (f"\n{note}\n" for note in notes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_main("cbs_opt.bench.quality", _main, arguments)


def _main(arguments: list[str]) -> int:
    parser = Parser("python -m cbs_opt.bench.quality", "Print the best objective of solvers at given times.")
    add = parser.add_argument
    add("instances", type=Path, nargs="+", metavar="INSTANCE.npz")
    add("--sparsities", type=float, nargs="+", metavar="F", help="default: the budget of the file")
    add("--times", type=float, nargs="+", default=[0.3, 1.0, 3.0, 10.0, 60.0], metavar="S")
    add("--seeds", type=int, nargs="+", default=list(range(10)), metavar="N", help="default: 0 to 9")
    add("--solvers", nargs="+", default=list(DEFAULT_SOLVERS), metavar="NAME")
    add("--clock", choices=tuple(CLOCKS), default="wall", help="default: wall; samplers always by the wall")
    add("-o", "--output", type=Path, metavar="FILE.md", help="also write the tables to a file")
    options = parser.parse_args(arguments)
    unknown = set(options.solvers) - set(PEERS) - set(solver_names())
    if unknown:
        raise UsageError(f"there is no solver '{min(unknown)}'; peers are {', '.join(PEERS)}")
    if min(options.times) <= 0:
        raise UsageError(f"`--times` must be positive, got {min(options.times):g}")
    times = sorted(options.times)
    pieces = []
    for piece in report(
        options.instances, options.sparsities, options.solvers, times, options.seeds, options.clock
    ):
        sys.stdout.write(piece)
        sys.stdout.flush()
        pieces.append(piece)
    if options.output is not None:
        with atomic_write(options.output) as file:
            file.write("".join(pieces).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
