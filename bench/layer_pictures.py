"""Errors of layers over time, with the certified bound: the picture of `bench.layers`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cbs_opt.bench.reports.canvas import few_ticks, label_at_the_right, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {"cbs-opt": "#0072b2", "bound": "black"}
_PEER_COLOURS = ("#7a7a7a", "#d55e00", "#009e73", "#cc79a7")
_EARLIEST = 0.02  # seconds at the left edge


@dataclass(frozen=True)
class Course:
    """One layer at one sparsity.

    Parameters
    ----------
    title : str
    peers : dict of str to (seconds, relative error)
    history : sequence of (seconds, relative error or None, relative bound or None)
        Of our own run.
    seconds : float
        Length of the run.
    """

    title: str
    peers: dict[str, tuple[float, float]]
    history: Sequence[tuple[float, float | None, float | None]]
    seconds: float


def draw(courses: Sequence[Course]) -> Figure:
    """A panel for each course: our error and bound as step lines over time, the other methods as points.

    Both axes are logarithmic. A bound that is less than a tenth of the last error is not drawn.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.1 * len(courses), 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, course in zip(figure.subplots(1, len(courses), squeeze=False)[0], courses, strict=True):
        errors = [(max(t, _EARLIEST), error) for t, error, _ in course.history if error is not None]
        last = errors[-1][1]
        bounds = [(max(t, _EARLIEST), b) for t, _, b in course.history if b is not None and b > 0.1 * last]
        labels = [(last, f"cbs-opt  {short(last, 2)}", _COLOURS["cbs-opt"])]
        axes.step(
            [t for t, _ in errors] + [course.seconds],
            [error for _, error in errors] + [last],
            where="post", color=_COLOURS["cbs-opt"], linewidth=1.8,
        )  # fmt: skip
        if bounds:
            axes.step(
                [t for t, _ in bounds] + [course.seconds],
                [bound for _, bound in bounds] + [bounds[-1][1]],
                where="post", color=_COLOURS["bound"], linewidth=1, linestyle="--",
            )  # fmt: skip
            labels.append((bounds[-1][1], f"bound  {short(bounds[-1][1], 2)}", _COLOURS["bound"]))
        for (name, (seconds, error)), colour in zip(course.peers.items(), _PEER_COLOURS, strict=False):
            axes.plot(max(seconds, _EARLIEST), error, "o", color=colour, markersize=5)
            labels.append((error, f"{name}  {short(error, 2)}", colour))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(_EARLIEST * 0.9, course.seconds)
        worst = max([error for _, error in course.peers.values()] + [last])
        axes.set_ylim(0.8 * min([last, *(bound for _, bound in bounds)]), 2 * worst)
        few_ticks(axes.xaxis, lambda value, _: f"{value:g}", (1.0,))
        few_ticks(axes.yaxis, lambda value, _: short(value, 0))
        axes.set_title(course.title, fontsize=9, loc="left")
        axes.set_xlabel("seconds")
        axes.grid(True, which="major", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        label_at_the_right(axes, labels)
    figure.axes[0].set_ylabel("relative error of the layer")
    return figure
