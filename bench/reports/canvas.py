"""Common elements of the figures of a report: figures, axes, and one line style for each solver.

Text and axes are drawn in one ink, which the page replaces by the colour of its own text.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cbs_opt.bench.reports.document import INK
from cbs_opt.bench.reports.metrics import TOLERANCE, Steps, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 400
"""Approximate maximum number of points of a line."""

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.4)), (0, (6, 1.6, 1.2, 1.6)), (0, (2.5, 1.2)))
_MARKERS = ("o", "s", "^", "D", "v")
_WIDTH = 9.9  # inches
_LETTER, _HANDLE = 5.3, 45.0  # points of a letter in the legend, and of the handle of each name


class Style(NamedTuple):
    """The line style of a solver.

    Thin lines are drawn over thick ones, so that equal lines show as nested ones.
    """

    colour: str
    dashes: Any
    marker: str
    width: float

    @property
    def order(self) -> float:
        """Of drawing: the thinner the later."""
        return 3.0 - 0.1 * self.width


def styles(solvers: Sequence[str]) -> dict[str, Style]:
    """A style for each solver, by its place: all colours come before a second kind of line."""
    colours = len(_COLOURS)
    return {
        name: Style(
            _COLOURS[k % colours],
            _DASHES[k // colours % len(_DASHES)],
            _MARKERS[k % len(_MARKERS)],
            2.5 - 1.2 * k / max(len(solvers) - 1, 4),
        )
        for k, name in enumerate(solvers)
    }


def shown(name: str) -> str:
    """A name that matplotlib shows literally: no formula, and not hidden in legends because of a leading "_"."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def percent(gap: float) -> str:
    """A relative gap as a tick: 1 %, 0.01 %, 1e-6."""
    if 0.99e-4 <= abs(gap) < 11:
        return f"{100 * gap:g} %".replace("-", "−")
    return short(gap, 0).replace("e+", "e").replace("-1e", "−1e") if gap else "0"


def clock_text(value: float) -> str:
    """Seconds as a tick."""
    return f"{value:g}" if 1e-4 < value < 1e5 else short(value, 0)


@contextmanager
def new_figure(panels: int, looks: Mapping[str, Style], across: int = 3) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of panels, two in a row, or all in one row of up to `across`; ends with one legend below them."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    sizes = {"font.size": 9.0, "axes.titlesize": 9.0, "legend.fontsize": 8.5, "axes.linewidth": 0.7}
    with matplotlib.rc_context(settings | sizes):  # type: ignore[arg-type, unused-ignore]
        columns = panels if panels <= across else 2
        rows = -(-panels // columns)
        width, height = 0.68 * _WIDTH if columns == 1 else _WIDTH, (3.0 if columns == 3 else 3.3) * rows
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        grid = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
        for spare in grid[panels:]:
            spare.set_visible(False)
        yield figure, grid[:panels]
        handles: dict[str, Any] = {}
        for axes in grid[:panels]:
            axes.grid(True, which="major", color=INK, alpha=0.13, lw=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        names = [name for name in map(shown, looks) if name in handles]
        longest = max(map(len, names), default=1)
        in_a_row = max(1, min(len(names), int(72 * width / (_LETTER * longest + _HANDLE))))
        lines = -(-len(names) // in_a_row)
        figure.set_size_inches(width, height + 0.2 * lines)
        figure.legend(
            [handles[name] for name in names],
            names,
            loc="outside lower center",
            ncols=-(-len(names) // lines),
            frameon=False,
            handlelength=2.6,
        )


def draw_steps(axes: Axes, steps: Steps, look: Style, name: str, first: float, last: float) -> None:
    """A step line from `first` to `last`; a flat one at 0 where there is no step."""
    line = thinned(steps, POINTS)
    inside = line.x > first
    x = [first, *line.x[inside], last]
    y = [line.at(first), *line.y[inside], float(line.y[-1]) if line.y.size else 0.0]
    axes.step(
        x,
        y,
        where="post",
        color=look.colour,
        linestyle=look.dashes,
        label=shown(name),
        lw=look.width,
        zorder=look.order,
    )


def draw_points(
    axes: Axes, points: Sequence[tuple[float, float]], look: Style, name: str, unreached: float
) -> None:
    """A line with markers; an infinite value is a cross at the height `unreached`, apart from the line."""
    reached = [(x, y if math.isfinite(y) else math.nan) for x, y in points]
    x, y = zip(*reached, strict=True)
    line = {"color": look.colour, "linestyle": look.dashes, "marker": look.marker}
    axes.plot(x, y, label=shown(name), markersize=4.5, linewidth=look.width, zorder=look.order, **line)
    missing = [x for x, y in points if math.isinf(y)]
    if missing:
        axes.plot(missing, [unreached] * len(missing), "x", color=look.colour, markersize=6)


def share_axis(axes: Axes, label: str) -> None:
    """A vertical axis of shares from 0 to 100 %."""
    axes.set_ylim(-0.02, 1.02)
    ticks(axes.yaxis, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0], lambda share: f"{100 * share:.0f} %")
    axes.set_ylabel(label)


def seconds_axis(
    axes: Axes,
    first: float,
    last: float,
    label: str = "seconds of building and solving",
    text: Callable[[float], str] = clock_text,
) -> None:
    """A logarithmic horizontal axis of seconds, or of what `label` says."""
    axes.set_xscale("log")
    axes.set_xlim(first, last)
    log_ticks(axes.xaxis, text, (first, last))
    axes.set_xlabel(label)


def gap_axis(axes: Axes, which: str, high: float, most: int = 8) -> None:
    """A logarithmic axis of gaps that begins at the tolerance, below which all gaps are 0."""
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(TOLERANCE * (1.0 if which == "x" else 0.6), high)
    decades = [10.0**k for k in range(-6, 7) if 10.0**k <= high]
    if len(decades) > most:
        decades = decades[::2]
    axis = axes.xaxis if which == "x" else axes.yaxis
    ticks(axis, decades, lambda gap: "≤ 1e-6" if gap <= 1.01 * TOLERANCE else percent(gap))


def log_ticks(axis: Any, text: Callable[[float], str], limits: tuple[float, float]) -> None:
    """Few ticks of a logarithmic axis: 1, 2, 5 over one or two decades, else powers of ten."""
    low, high = limits
    wide = low <= 0 or high / max(low, 1e-300) > 150
    few_ticks(axis, lambda value, _: text(value), (1.0,) if wide else (1.0, 2.0, 5.0))


def short(value: float, digits: int) -> str:
    """A loss without the zeros of its exponent: 4.2e-3."""
    return f"{value:.{digits}e}".replace("e-0", "e-").replace("e+0", "e+")


def few_ticks(
    axis: Any, text: Callable[[float, int | None], str], subs: Sequence[float] = (1.0, 2.0, 5.0)
) -> None:
    """Major ticks at `subs` times powers of ten, with the given text, and no other labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(text))
    axis.set_minor_formatter(NullFormatter())


def label_at_the_right(axes: Axes, labels: list[tuple[float, str, str]]) -> None:
    """Write each label beside the end of its line, moved apart where two would overlap."""
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


def ticks(axis: Any, places: Sequence[float], text: Callable[[float], str]) -> None:
    """Ticks at the given places only."""
    from matplotlib.ticker import NullLocator

    axis.set_ticks(list(places), [text(place) for place in places])
    axis.set_minor_locator(NullLocator())


def as_svg(figure: Figure, name: str) -> str:
    """The figure as SVG, without a background; the same figure and name give the same text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
