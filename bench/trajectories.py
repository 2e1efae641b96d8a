"""Objective over time, one line per solver: `python -m cbs_opt.bench.trajectories INSTANCE.npz -o picture.png`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cbs_opt import Instance, read_instance
from cbs_opt.bench.peers import PEERS
from cbs_opt.bench.reports.canvas import few_ticks, label_at_the_right, short
from cbs_opt.bench.runs.store import ERROR, OK, Row, Trace
from cbs_opt.bench.runs.task import Task, run_on
from cbs_opt.bench.runs.warm_up import SECONDS
from cbs_opt.cli.common import Parser, check_outputs, run_main
from cbs_opt.errors import CbsError, SolverError
from cbs_opt.files.atomic import atomic_write
from cbs_opt.solver import OBJECTIVES
from cbs_opt.typing import FloatArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#7a7a7a", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_EARLIEST = 1e-5  # seconds; the axis is logarithmic and has no zero


def trajectories(
    instance: Instance,
    solvers: Sequence[str],
    *,
    objective: str = "selection",
    time_limit: float | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, Row]:
    """Run the solvers one after the other as a benchmark does, each after a short run that does not count.

    A name of `cbs_opt.bench.peers.PEERS` stands for a sampler, which needs a time limit.

    Returns
    -------
    dict of str to Row
        With all events in the traces.

    Raises
    ------
    SolverError
        When one of them gives no selection.
    """
    rows = {}
    for name in solvers:
        settings: dict[str, Any] = {"objective": objective, "seed": seed, "threads": threads}
        if name not in PEERS:  # what the instance computes once, such as inverses, belongs to no solver
            run_on(instance, Task.of(instance, name, time_limit=SECONDS, **settings))
        row = run_on(instance, Task.of(instance, name, time_limit=time_limit, **settings))
        if row.objective is None or row.kind not in (OK, ERROR):
            raise SolverError(row.message or f"'{name}' gave no selection")
        if name == "dwave-tabu" and time_limit is not None:  # it has nothing before its end
            limits = [time_limit / 2**k for k in range(6, 0, -1)]
            shorter = [run_on(instance, Task.of(instance, name, time_limit=t, **settings)) for t in limits]
            row.trace = _falling([event for part in (*shorter, row) for event in part.trace or ()])
        rows[name] = row
    return rows


def _falling(events: Trace) -> Trace:
    """The events that are better than all before."""
    best, kept = np.inf, []
    for event in events:
        if event[1] is not None and event[1] < best:
            best = event[1]
            kept.append(event)
    return kept


def draw(results: Mapping[str, Row], title: str) -> Figure:
    """Draw the incumbent of each run over time, and the bound over time where there is one.

    Parameters
    ----------
    results : mapping of str to Row
        Runs by the labels of their lines.
    title : str

    Returns
    -------
    matplotlib.figure.Figure
        Step lines on a logarithmic time axis; the objective's axis is logarithmic where all of it is
        positive. A line is dotted after the end of its run.

    Raises
    ------
    CbsError
        When no run has a history.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = {name: steps for name, result in results.items() if (steps := _steps(result))[0].size}
    if not lines:
        raise CbsError("there is nothing to draw: no run has a history")
    ends = {name: max(results[name].solve_s or 0.0, float(times[-1])) for name, (times, _) in lines.items()}
    first = min(float(times[0]) for times, _ in lines.values())
    last = max(ends.values()) * 1.15
    bounds = [result.bound for result in results.values() if result.bound is not None]

    figure = Figure(figsize=(7.2, 3.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    labels = []
    for (name, (times, values)), colour in zip(lines.items(), _cycle(len(lines)), strict=True):
        end = float(values[-1])
        axes.step([*times, ends[name]], [*values, end], where="post", color=colour, linewidth=1.8)
        axes.plot([ends[name], last], [end, end], ":", color=colour, linewidth=1.2)
        axes.plot(times[0], values[0], "o", color=colour, markersize=4)
        labels.append((end, f"{name}  {short(end, 2)}", colour))
    if bounds:
        for result in results.values():
            # Where the objective's axis is logarithmic a bound that is not positive yet has no place.
            rows = [(max(time, _EARLIEST), bound) for time, _, bound in result.trace or () if bound is not None]
            if min(end for end, _, _ in labels) > 0 and max(bounds) > 0:
                rows = [(time, bound) for time, bound in rows if bound > 0]
            if rows:
                clock, levels = zip(*rows, strict=True)
                line = {"color": "black", "linestyle": "--", "linewidth": 1}
                axes.step([*clock, last], [*levels, levels[-1]], where="post", **line)
        labels.append((max(bounds), f"bound  {short(max(bounds), 2)}", "black"))
    axes.set_xscale("log")
    few_ticks(axes.xaxis, lambda value, _: f"{value:g}")
    if min(value for value, _, _ in labels) > 0:
        axes.set_yscale("log")
        few_ticks(axes.yaxis, lambda value, _: short(value, 0))
    axes.set_xlim(first * 0.8, last)
    axes.margins(y=0.08)
    kind = next(iter(results.values())).objective_kind
    axes.set_xlabel("seconds of solving")
    axes.set_ylabel(f"{kind} loss")
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(True, which="major", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    label_at_the_right(axes, labels)
    return figure


def _steps(result: Row) -> tuple[FloatArray, FloatArray]:
    """Times and objectives of the improvements, float64 (k,) each."""
    rows = [(time, objective) for time, objective, _ in result.trace or () if objective is not None]
    times, values = (
        (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
        if rows
        else (
            np.zeros(0),
            np.zeros(0),
        )
    )
    return np.maximum(times, _EARLIEST), values


def _cycle(count: int) -> list[str]:
    return [_COLOURS[k % len(_COLOURS)] for k in range(count)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_main("cbs_opt.bench.trajectories", _main, arguments)


def _main(arguments: list[str]) -> int:
    parser = Parser("python -m cbs_opt.bench.trajectories", "Draw the objective of solvers over time.")
    add = parser.add_argument
    add("instance", type=Path, metavar="INSTANCE.npz")
    add("--solvers", nargs="+", default=["magnitude", "ls", "cbs"], metavar="NAME")
    add("--objective", default="selection", choices=OBJECTIVES)
    add("--sparsity", type=float, metavar="F", help="default: the budget of the file")
    add("--time-limit", type=float, metavar="S", help="seconds for each solver")
    add("--seed", type=int, default=0, metavar="N")
    add("--threads", type=int, metavar="N")
    add("-o", "--output", type=Path, required=True, metavar="FILE.png")
    options = parser.parse_args(arguments)
    check_outputs((options.instance,), (options.output,))
    instance = read_instance(options.instance)
    if options.sparsity is not None:
        instance = instance.with_sparsity(options.sparsity)
    results = trajectories(
        instance,
        options.solvers,
        objective=options.objective,
        time_limit=options.time_limit,
        seed=options.seed,
        threads=options.threads,
    )
    figure = draw(results, f"{options.instance.name}\n{instance.describe()}")
    with atomic_write(options.output) as file:
        figure.savefig(file, format=options.output.suffix.lstrip(".") or "png")
    for name, result in results.items():
        sys.stdout.write(f"{name:<12} {result.objective:.6e}  {result.solve_s:.3f} s  {result.status}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
