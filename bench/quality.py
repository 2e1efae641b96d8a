"""Losses over time: `python -m cbs_opt.bench.quality INSTANCE.npz ...` prints Markdown tables.

For each instance and budget a row for each solver: median, least and largest loss of all seeds at each time, and
the bound where the solver proves one. With `--objective joint` selections of the selection problem are updated,
beside the joint solvers and a peer (`cbs_opt.bench.chita`). Reading, building and compilation are not counted.

This is no view of `cbs-bench`: the losses of every snapshot are recomputed here, after an update too, and a store
keeps over time only what the solver itself says.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cbs_opt import Instance, Monitor, Stop, read_instance, solver_names
from cbs_opt.bench.anytime import CLOCKS, Anytime, load, losses_at, run_for, spread, table
from cbs_opt.bench.chita import Chita
from cbs_opt.bench.peers import PEERS, MissingPeerError, Samplers, run_sampler
from cbs_opt.bench.startup import machine
from cbs_opt.cli.common import Parser, check_outputs, run_main
from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.files.atomic import write_text
from cbs_opt.solver import OBJECTIVES
from cbs_opt.threads import thread_limit

CHITA = "chita"
SPLIT = ("magnitude", "search")
"""Solvers of the selection problem, whose selections are updated afterwards where the joint loss is asked for."""

DETERMINISTIC = ("magnitude", "backward", CHITA)
"""One seed is enough."""

SOLVERS = {
    "selection": ("search", "magnitude", "ls", "cbs", *PEERS),
    "joint": (*SPLIT, CHITA, "backward", "joint"),
}
TIMES = {"selection": (0.3, 1.0, 3.0, 10.0, 60.0), "joint": (1.0, 4.0, 10.0)}
SEEDS = {"selection": tuple(range(10)), "joint": (0, 1, 2)}

Case = tuple[float | None, float | None]
"""Damping of a gradient factor, and sparsity; None for what the file has."""

CASES: dict[str, tuple[Case, ...]] = {
    "selection": ((None, None),),
    "joint": ((1e-5, 0.9), (1e-7, 0.98), (1e-5, 0.5)),
}


def run_chita(instance: Instance, seconds: float, threads: int = 1, clock: str = "wall") -> Anytime:
    """Thresholding and coordinate descent for so many seconds; it is deterministic."""
    with thread_limit(threads):
        method, taken = Chita(instance), Anytime()
        monitor = Monitor(Stop(time_limit=seconds), taken, CLOCKS[clock])
        monitor.start()
        method.run(monitor)
    return taken


def quality(
    instance: Instance,
    solvers: Sequence[str],
    times: Sequence[float],
    seeds: Sequence[int],
    *,
    objective: str = "selection",
    threads: int = 1,
    clock: str = "wall",
) -> tuple[dict[str, list[str]], list[str]]:
    """Rows of the table of one instance, and sentences about what was skipped.

    Parameters
    ----------
    instance : Instance
    solvers : sequence of str
        Names of solvers, of `PEERS` for the selection loss, or `CHITA` for the joint loss.
    times : sequence of float
        Seconds of solving.
    seeds : sequence of int
    objective : {"selection", "joint"}
    threads : int
    clock : {"wall", "processor"}
        The samplers count by the wall.

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
        own = "selection" if name in SPLIT else objective
        of = seeds[:1] if name in DETERMINISTIC else seeds
        try:
            if name == CHITA:
                runs = [run_chita(instance, max(times), threads, clock)]
            elif name in PEERS:
                samplers = samplers or Samplers(instance)
                with thread_limit(threads):
                    runs = [run_sampler(samplers, PEERS[name], times, seed) for seed in of]
            else:
                given = {"objective": own, "threads": threads, "clock": clock}
                runs = [run_for(instance, name, max(times), seed=seed, **given) for seed in of]  # type: ignore[arg-type]
        except (MissingPeerError, InstanceError) as error:
            notes += [] if str(error) in notes else [str(error)]
            continue
        label = name if own == objective else f"{name}, then update"
        losses = [losses_at(instance, run, times, objective) for run in runs]
        rows[label] = [spread(column) for column in zip(*losses, strict=True)]
        if own == objective and any(run.bounds and run.bounds[-1] is not None for run in runs):
            rows[f"{label}, bound"] = [spread([run.bound_at(time) for run in runs]) for time in times]
    return rows, notes


def report(
    paths: Sequence[Path],
    cases: Sequence[Case],
    solvers: Sequence[str],
    times: Sequence[float],
    seeds: Sequence[int],
    *,
    objective: str,
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
            instance = whole if sparsity is None else whole.with_sparsity(sparsity)
            if damping is not None and whole.curvature.damping is not None:
                instance = instance.with_damping(damping)
            rows, notes = quality(
                instance, solvers, times, seeds, objective=objective, threads=threads, clock=clock
            )
            yield f"\n## {path.name}: {instance.describe()}\n\n{table(times, rows)}\n"
            yield from (f"\n{note}\n" for note in notes)


def _case(text: str) -> Case:
    """Damping and sparsity of "1e-5:.9"."""
    damping, _, sparsity = text.partition(":")
    return float(damping), float(sparsity)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_main("cbs_opt.bench.quality", _main, arguments)


def _main(arguments: list[str]) -> int:
    parser = Parser("python -m cbs_opt.bench.quality", "Print the best losses of solvers at given times.")
    add = parser.add_argument
    add("instances", type=Path, nargs="+", metavar="INSTANCE.npz")
    add("--objective", choices=OBJECTIVES, default="selection", help="default: selection")
    budgets = parser.add_mutually_exclusive_group()
    budgets.add_argument(
        "--sparsities", type=float, nargs="+", metavar="F", help="default: the budget of the file"
    )
    budgets.add_argument(
        "--cases",
        type=_case,
        nargs="+",
        metavar="DAMPING:SPARSITY",
        help="dampings of gradient factors and sparsities; default for the joint loss: 1e-5:.9 1e-7:.98 1e-5:.5",
    )
    add("--times", type=float, nargs="+", metavar="S", help="default: .3 1 3 10 60; for the joint loss 1 4 10")
    add("--seeds", type=int, nargs="+", metavar="N", help="default: 0 to 9; for the joint loss 0 to 2")
    add("--solvers", nargs="+", metavar="NAME", help=f"solvers, and peers: {', '.join((*PEERS, CHITA))}")
    add("--threads", type=int, default=1, metavar="N", help="default: 1")
    add("--clock", choices=tuple(CLOCKS), default="wall", help="default: wall; samplers always by the wall")
    add("-o", "--output", type=Path, metavar="FILE.md", help="also write the tables to a file")
    options = parser.parse_args(arguments)
    check_outputs((), (options.output,))
    objective = options.objective
    solvers = options.solvers or SOLVERS[objective]
    times = sorted(options.times or TIMES[objective])
    cases = options.cases or [(None, s) for s in options.sparsities or ()] or CASES[objective]
    known = {*solver_names(), *(PEERS if objective == "selection" else [CHITA])}
    if set(solvers) - known:
        raise UsageError(
            f"there is no solver '{min(set(solvers) - known)}' of the {objective} loss; known: "
            f"{', '.join(sorted(known))}"
        )
    if times[0] <= 0:
        raise UsageError(f"`--times` must be positive, got {times[0]:g}")
    pieces = []
    for piece in report(
        options.instances,
        cases,
        solvers,
        times,
        options.seeds or SEEDS[objective],
        objective=objective,
        threads=options.threads,
        clock=options.clock,
    ):
        sys.stdout.write(piece)
        sys.stdout.flush()
        pieces.append(piece)
    if options.output is not None:
        write_text(options.output, "".join(pieces))
    return 0


if __name__ == "__main__":
    sys.exit(main())
