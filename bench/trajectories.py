"""Objective over time, one line per solver: `python -m cbs_opt.bench.trajectories INSTANCE.npz -o picture.png`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cbs_opt import Instance, Result, Stop, read_instance, selection_loss, solve
from cbs_opt.bench.peers import PEERS, Samplers, run_sampler
from cbs_opt.cli.common import Parser, run_main
from cbs_opt.errors import CbsError
from cbs_opt.files.atomic import atomic_write
from cbs_opt.result import HistoryRow, Status
from cbs_opt.solver import OBJECTIVES
from cbs_opt.typing import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_COLOURS = ("#7a7a7a", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_EARLIEST = 1e-5  # seconds; the axis is logarithmic and has no zero


def trajectories(
    instance: Instance,
    solvers: Sequence[str],
    *,
    objective: str = "selection",
    stop: Stop | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, Result]:
    """Run the solvers one after the other, each after an untimed warm-up of one iteration.

    A name of `cbs_opt.bench.peers.PEERS` stands for a sampler, which needs a time limit.
    """
    results = {}
    for name in solvers:
        if name in PEERS:
            if stop is None or stop.time_limit is None or objective != "selection":
                raise CbsError(f"'{name}' minimises the selection loss within a time limit")
            results[name] = _sampled(instance, name, stop.time_limit, seed)
            continue
        for limit in (Stop(max_iterations=1), stop or Stop()):
            results[name] = solve(instance, name, objective=objective, stop=limit, seed=seed, threads=threads)
    return results


def _sampled(instance: Instance, name: str, seconds: float, seed: int) -> Result:
    """The anytime curve of a sampler as a result."""
    times = [seconds / 2**k for k in range(6, -1, -1)]
    run = run_sampler(Samplers(instance), PEERS[name], times, seed)
    losses = [selection_loss(instance, pruned) for pruned in run.selections]
    history = tuple(HistoryRow(t, k, f, None) for k, (t, f) in enumerate(zip(run.seconds, losses, strict=True)))
    return Result(
        status=Status.TIME_LIMIT,
        solver=name,
        objective_kind="selection",
        pruned=run.selections[-1],
        weights=None,
        objective=losses[-1],
        selection_loss=losses[-1],
        joint_loss=None,
        bound=None,
        iterations=len(losses),
        build_seconds=0.0,
        solve_seconds=run.seconds[-1],
        history=history,
        seed=seed,
        parameters={},
        environment={},
    )


def draw(results: Mapping[str, Result], title: str) -> Figure:
    """Draw the incumbent of each run over time, and the bound over time where there is one.

    Parameters
    ----------
    results : mapping of str to Result
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
    ends = {name: max(results[name].solve_seconds, float(times[-1])) for name, (times, _) in lines.items()}
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
            rows = [(max(row.seconds, _EARLIEST), row.bound) for row in result.history if row.bound is not None]
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


def _steps(result: Result) -> tuple[FloatArray, FloatArray]:
    """Times and objectives of the improvements, float64 (k,) each."""
    rows = [(row.seconds, row.objective) for row in result.history if row.objective is not None]
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


def short(value: float, digits: int) -> str:
    """A loss without the zeros of its exponent: 4.2e-3."""
    return f"{value:.{digits}e}".replace("e-0", "e-").replace("e+0", "e+")


def few_ticks(
    axis: Axis, text: Callable[[float, int | None], str], subs: Sequence[float] = (1.0, 2.0, 5.0)
) -> None:
    """Major ticks at `subs` times powers of ten, with the given text, and no other labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(text))
    axis.set_minor_formatter(NullFormatter())


def label_at_the_right(axes: Axes, labels: list[tuple[float, str, str]]) -> None:
    """Write each label next to the end of its line, moved apart where two would overlap."""
    axes.get_ylim()  # settles the limits that the transformation depends on
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform((1.0, value))[1]) for value, _, _ in labels]
    order = sorted(range(len(labels)), key=lambda k: heights[k])
    gap, below = 0.065, -np.inf
    for k in order:
        heights[k] = below = max(heights[k], below + gap)
    for (_, text, colour), height in zip(labels, heights, strict=True):
        axes.annotate(
            text,
            (1.0, height),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
        )


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
    instance = read_instance(options.instance)
    if options.sparsity is not None:
        instance = instance.with_sparsity(options.sparsity)
    results = trajectories(
        instance,
        options.solvers,
        objective=options.objective,
        stop=Stop(time_limit=options.time_limit),
        seed=options.seed,
        threads=options.threads,
    )
    figure = draw(results, f"{options.instance.name}\n{instance.describe()}")
    with atomic_write(options.output) as file:
        figure.savefig(file, format=options.output.suffix.lstrip(".") or "png")
    for name, result in results.items():
        sys.stdout.write(f"{name:<12} {result.objective:.6e}  {result.solve_seconds:.3f} s  {result.status}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
