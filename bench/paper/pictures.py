"""The pictures of a study: accuracy over sparsity, predicted against measured increases of the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cbs_opt.bench.paper.results import Results
from cbs_opt.bench.paper.study import FAMILIES, PUBLISHED
from cbs_opt.bench.reports.canvas import Style, log_ticks, new_figure, short, shown, styles, ticks
from cbs_opt.bench.reports.document import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FLOOR = 1e-5  # increases below it, and decreases, are drawn at it


def looks_of(results: Results) -> dict[str, Style]:
    """A line style for each method, the same in all pictures of a report."""
    return styles([method.name for method in results.methods])


def over_sparsity(results: Results, looks: Mapping[str, Style]) -> Figure:
    """Mean accuracy over sparsity, a panel for each family; bars are standard deviations over the seeds."""
    families = [family for family in FAMILIES if any(m.family == family for m in results.methods)]
    sparsities = results.study.sparsities
    highest = best_published(results)
    with new_figure(len(families), looks) as (figure, grid):
        for axes, family in zip(grid, families, strict=True):
            for method in (method for method in results.methods if method.family == family):
                points = [(s, results.accuracy(method.name, s)) for s in method.sparsities]
                found = [(place(s), mean) for s, mean in points if mean is not None]
                look = looks[method.name]
                axes.errorbar(
                    [x for x, _ in found],
                    [mean.mean for _, mean in found],
                    yerr=[mean.deviation or 0.0 for _, mean in found],
                    label=shown(method.name),
                    color=look.colour,
                    linestyle=look.dashes,
                    marker=look.marker,
                    markersize=4,
                    linewidth=look.width,
                    elinewidth=0.8,
                    zorder=look.order,
                )
            if highest:
                x = [place(s) for s in highest]
                axes.plot(x, list(highest.values()), "_", color=INK, markersize=13, markeredgewidth=1.6)
            names = {place(s): f"{s:g}".removeprefix("0") for s in sparsities}
            ticks(axes.xaxis, list(names), names.__getitem__)
            axes.set_xlabel("sparsity")
            axes.set_ylabel("accuracy on test images, per cent")
            axes.set_title(family, loc="left")
        limits = [axes.get_ylim() for axes in grid]
        for axes in grid:  # families compare at a glance
            axes.set_ylim(max(0.0, min(low for low, _ in limits)), max(high for _, high in limits))
    return figure


def place(sparsity: float) -> float:
    """Where a sparsity stands: even in the logarithm of the share that is kept."""
    return -math.log(max(1.0 - sparsity, 1e-3))


def best_published(results: Results) -> dict[float, float]:
    """The highest published accuracy at each sparsity of the study, in per cent."""
    found = {}
    for sparsity in results.study.sparsities:
        values = [column[sparsity] for column in results.study.published.values() if sparsity in column]
        if values:
            found[sparsity] = max(values)
    return found


def scatter(results: Results, looks: Mapping[str, Style]) -> Figure:
    """Predicted against measured increase of the training loss, a point for each row; equal on the diagonal."""
    families = [family for family in FAMILIES if any(m.family == family for m in results.methods)]
    with new_figure(len(families), looks) as (figure, grid):
        low, high = math.inf, 0.0
        for axes, family in zip(grid, families, strict=True):
            for method in (method for method in results.methods if method.family == family):
                pairs = [pair for s in method.sparsities for pair in results.increases(method, s)]
                pairs = [(max(x, _FLOOR), max(y, _FLOOR)) for x, y in pairs if math.isfinite(x + y)]
                if not pairs:
                    continue
                look = looks[method.name]
                x, y = zip(*pairs, strict=True)
                axes.plot(
                    x,
                    y,
                    linestyle="none",
                    marker=look.marker,
                    markersize=4.5,
                    markerfacecolor="none" if method.family == PUBLISHED else look.colour,
                    markeredgecolor=look.colour,
                    alpha=0.85,
                    label=shown(method.name),
                )
                low, high = min(low, *x, *y), max(high, *x, *y)
        for axes, family in zip(grid, families, strict=True):
            _diagonal(axes, 0.7 * low, 1.4 * high)
            axes.set_title(family, loc="left")
    return figure


def _diagonal(axes: Axes, low: float, high: float) -> None:
    axes.plot([low, high], [low, high], color=INK, lw=0.8)
    for axis in ("x", "y"):
        (axes.set_xscale if axis == "x" else axes.set_yscale)("log")
        (axes.set_xlim if axis == "x" else axes.set_ylim)(low, high)
        log_ticks(axes.xaxis if axis == "x" else axes.yaxis, lambda v: short(v, 0), (low, high))
    axes.set_xlabel("increase of the loss, predicted by the quadratic model")
    axes.set_ylabel("measured on training images")
