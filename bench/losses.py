"""Both losses over sparsity: `python -m cbs_opt.bench.losses INSTANCE.npz -o picture.png`.

Three ways to a pruned network: by magnitude, by the best selection, and with selection and update chosen together;
each before and after the best update.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbs_opt import Instance, read_instance
from cbs_opt.bench.anytime import CLOCKS
from cbs_opt.bench.reports.canvas import few_ticks, label_at_the_right, short
from cbs_opt.bench.runs.store import Row
from cbs_opt.bench.runs.task import Task, run_on
from cbs_opt.cli.common import Parser, check_outputs, run_main
from cbs_opt.errors import CbsError
from cbs_opt.files.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS = {
    "magnitude": ("magnitude", "selection", "#7a7a7a"),
    "search": ("search", "selection", "#d55e00"),
    "joint": ("joint", "joint", "#0072b2"),
}
"""Label, then solver, objective and colour."""


def losses_over_sparsity(
    instance: Instance,
    sparsities: Sequence[float],
    seconds: float,
    *,
    seed: int = 0,
    threads: int = 1,
    clock: str = "wall",
) -> dict[str, list[Row]]:
    """Solve the instance at each sparsity in each of the `WAYS`, for so many seconds each.

    Parameters
    ----------
    instance : Instance
        H positive definite.
    sparsities : sequence of float
    seconds : float
    seed : int
    threads : int
    clock : {"wall", "processor"}

    Returns
    -------
    dict of str to list of Row
    """
    points: dict[str, list[Row]] = {label: [] for label in WAYS}
    for sparsity in sparsities:
        there = instance.with_sparsity(sparsity)
        for label, (solver, objective, _) in WAYS.items():
            settings: dict[str, Any] = {
                "objective": objective,
                "seed": seed,
                "time_limit": seconds,
                "threads": threads,
            }
            row = run_on(there, Task.of(there, solver, label, clock=clock, **settings))
            if row.selection_loss is None or row.joint_loss is None:
                raise CbsError(row.message or f"the joint loss at sparsity {sparsity:g} has no minimum")
            points[label].append(row)
    return points


def draw(points: Mapping[str, Sequence[Row]], title: str) -> Figure:
    """Draw the selection loss at the left and the joint loss at the right, over sparsity.

    Parameters
    ----------
    points : mapping of str to sequence of Row
        From `losses_over_sparsity`.
    title : str

    Returns
    -------
    matplotlib.figure.Figure
        The sparsity's axis is even in log(1 − sparsity), the losses' axes are logarithmic.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.9), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr,call-arg]
    panels = figure.subplots(1, 2)
    for axes, kind, words in zip(
        panels,
        ("selection_loss", "joint_loss"),
        ("before the update: selection loss", "after it: joint loss"),
        strict=True,
    ):
        labels = []
        for label, way in points.items():
            kept = [1.0 - point.sparsity for point in way]
            values = [float(getattr(point, kind)) for point in way]
            colour = WAYS[label][2]
            axes.plot(kept, values, "o-", color=colour, markersize=4, linewidth=1.6)
            labels.append((values[-1], f"{label}  {short(values[-1], 2)}", colour))
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = sorted({1.0 - point.sparsity for way in points.values() for point in way}, reverse=True)
        axes.set_xlim(ticks[0] * 1.05, ticks[-1] / 1.05)
        axes.set_xticks(ticks, [f"{1.0 - tick:.3g}" for tick in ticks])
        axes.minorticks_off()
        few_ticks(axes.yaxis, lambda value, _: short(value, 0), subs=(1.0,))
        axes.set_xlabel("sparsity")
        axes.set_title(words, fontsize=9, loc="left")
        axes.grid(True, which="major", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        label_at_the_right(axes, labels)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_main("cbs_opt.bench.losses", _main, arguments)


def _main(arguments: list[str]) -> int:
    parser = Parser("python -m cbs_opt.bench.losses", "Draw both losses over sparsity.")
    add = parser.add_argument
    add("instance", type=Path, metavar="INSTANCE.npz")
    add("--sparsities", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98], metavar="F")
    add("--damping", type=float, metavar="L", help="of a gradient factor; default: that of the file")
    add("--seconds", type=float, default=4.0, metavar="S", help="for each solver and sparsity; default: 4")
    add("--seed", type=int, default=0, metavar="N")
    add("--threads", type=int, default=1, metavar="N")
    add("--clock", choices=tuple(CLOCKS), default="wall", help="default: wall")
    add("-o", "--output", type=Path, required=True, metavar="FILE.png")
    options = parser.parse_args(arguments)
    check_outputs((options.instance,), (options.output,))
    instance = read_instance(options.instance)
    if options.damping is not None:
        instance = instance.with_damping(options.damping)
    points = losses_over_sparsity(
        instance,
        sorted(options.sparsities),
        options.seconds,
        seed=options.seed,
        threads=options.threads,
        clock=options.clock,
    )
    of = "" if options.damping is None else f", damping {options.damping:g}"
    figure = draw(points, f"{options.instance.name}, {instance.n} weights{of}")
    with atomic_write(options.output) as file:
        figure.savefig(file, format=options.output.suffix.lstrip(".") or "png")
    for label, way in points.items():
        for point in way:
            sys.stdout.write(
                f"{label:<12} {point.sparsity:<6g} {point.selection_loss:.6e}  {point.joint_loss:.6e}\n"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
