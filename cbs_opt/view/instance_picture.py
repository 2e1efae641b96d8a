"""A picture of an instance: spectra of its blocks, couplings of its weights, pairs that cancel each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cbs_opt.interactions import interaction_graph
from cbs_opt.optional import require
from cbs_opt.selection import SelectionObjective
from cbs_opt.tensor_table import TensorEntry, tensor_table
from cbs_opt.typing import BoolArray, FloatArray, IntArray
from cbs_opt.view.spectra import block_spectrum
from cbs_opt.view.text import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cbs_opt.instance import Instance

_INK = "#333333"
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7a7a7a")
_PAIR, _BOTH, _ONE, _NEITHER = "#7f8c99", "#0072b2", "#d55e00", "#b5b5b5"
_SPECTRA = 12  # blocks whose spectra are drawn
_MAP = 96  # weights in the heat map
_PAIRS = 30  # pairs in the graph
_DECADES = 3.0  # of couplings in the heat map
_LETTERS = 50  # of a label that fit along the heat map
_CURVES = 6  # names of tensors in the legend of the spectra


def draw_instance(instance: Instance, pruned: BoolArray | None = None) -> Figure:
    """Draw an instance in three panels.

    Parameters
    ----------
    instance : Instance
    pruned : bool (n,), optional
        A selection: the graph then shows which cancelling pairs it prunes, cuts or keeps.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    RequirementError
        When matplotlib or networkx is not installed.
    """
    matplotlib = require("matplotlib", "a picture")
    require("networkx", "a picture of an instance")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {
        "font.size": 9.0,
        "axes.titlesize": 9.5,
        "axes.linewidth": 0.7,
        "legend.fontsize": 8.0,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(13.2, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        spectra, couplings, pairs = figure.subplots(1, 3, width_ratios=(1.0, 1.15, 1.25))
        tensors = tensor_table(instance)
        colours = _tensor_colours(instance, tensors)
        _draw_spectra(spectra, instance, tensors, colours)
        _draw_couplings(couplings, instance, tensors, pruned)
        _draw_pairs(pairs, instance, colours, pruned)
        figure.suptitle(_title(instance, pruned), x=0.01, ha="left", fontsize=10.5)
    return figure


def _title(instance: Instance, pruned: BoolArray | None) -> str:
    name = "" if instance.path is None else f"{_plain(instance.path.stem)}: "
    what = f"{name}{count(instance.n, 'weight')} in {count(instance.curvature.number_of_blocks, 'block')}, "
    share = f"({instance.budget.total / instance.n:.1%})"
    if pruned is None:
        return f"{what}{instance.budget.total:,} to prune {share}"
    return f"{what}{int(pruned.sum()):,} pruned ({pruned.mean():.1%})"


def _tensor_colours(instance: Instance, tensors: Sequence[TensorEntry]) -> dict[str | None, str]:
    names: list[str | None] = [tensor.name for tensor in tensors] or [None]
    return {name: _COLOURS[k % len(_COLOURS)] for k, name in enumerate(names)}


def _tensor_of(tensors: Sequence[TensorEntry], i: int) -> str | None:
    return next((tensor.name for tensor in tensors if tensor.start <= i < tensor.stop), None)


# Spectra -------------------------------------------------------------------------------------------------------


def _draw_spectra(
    axes: Axes, instance: Instance, tensors: Sequence[TensorEntry], colours: dict[str | None, str]
) -> None:
    curvature = instance.curvature
    count_blocks = curvature.number_of_blocks
    chosen = np.unique(np.linspace(0, count_blocks - 1, min(_SPECTRA, count_blocks)).round().astype(np.int64))
    seen: set[str | None] = set()
    partial = False
    least, most = np.inf, 0.0
    for k in chosen.tolist():
        values, complete = block_spectrum(curvature, k)
        partial |= not complete
        positive = values[values > 1e-14 * max(float(values[0]), 0.0)] if values.size else values
        if not positive.size:
            continue
        least, most = min(least, float(positive[-1])), max(most, float(positive[0]))
        tensor = _tensor_of(tensors, int(curvature.offsets[k]))
        if tensor != _tensor_of(tensors, int(curvature.offsets[k + 1]) - 1):
            tensor = None
        label = None if tensor in seen or tensor is None else _plain(tensor)
        seen.add(tensor)
        rank = (np.arange(positive.size) + 1) / int(curvature.block_sizes[k])
        (line,) = axes.plot(rank, positive, color=colours.get(tensor, _INK), lw=1.1, alpha=0.8, label=label)
        if positive.size < 40:
            line.set(marker="o", markersize=2.5)
    axes.set_yscale("log")
    if most > 0 and most < 10 * least:
        axes.set_ylim(least / 4, most * 4)
    axes.set_xlim(0, 1.02 if not partial else None)
    axes.set_xlabel("rank / size of the block")
    axes.set_ylabel("eigenvalue of H")
    which = "" if chosen.size == count_blocks else f", {chosen.size} of {count_blocks} blocks"
    largest = " (largest only)" if partial else ""
    axes.set_title(f"spectrum{which}{largest}", loc="left")
    axes.grid(True, alpha=0.2, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    if len(names) > 1:
        axes.legend(
            handles[:_CURVES],
            names[:_CURVES],
            frameon=False,
            ncols=2,
            loc="upper left",
            bbox_to_anchor=(-0.02, -0.14),
        )


# Heat map ------------------------------------------------------------------------------------------------------


def _draw_couplings(
    axes: Axes, instance: Instance, tensors: Sequence[TensorEntry], pruned: BoolArray | None
) -> None:
    from matplotlib.colors import SymLogNorm

    problem = SelectionObjective(instance)
    strongest = np.argsort(-problem.diagonal, kind="stable")[:_MAP]
    shown = np.sort(strongest)
    Q = _couplings(instance, shown)
    most = float(np.abs(Q).max(initial=0.0)) or 1.0
    norm = SymLogNorm(linthresh=most / 10**_DECADES, vmin=-most, vmax=most)
    image = axes.imshow(Q, cmap="RdBu_r", norm=norm, interpolation="nearest")
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02)
    exponent = int(np.floor(np.log10(most)))
    steps = [10.0**e for e in range(exponent - int(_DECADES) + 1, exponent + 1)]
    bar.set_ticks([-step for step in reversed(steps)] + [0.0, *steps])
    bar.ax.minorticks_off()
    bar.set_label("Q$_{ij}$ = w$_i$ H$_{ij}$ w$_j$   (blue: cancel, red: add up)")
    block = np.searchsorted(instance.curvature.offsets, shown, side="right")
    for border in np.flatnonzero(np.diff(block)).tolist():
        axes.axhline(border + 0.5, color=_INK, lw=0.25, alpha=0.35)
        axes.axvline(border + 0.5, color=_INK, lw=0.25, alpha=0.35)
    axes.set_xticks([])
    axes.set_yticks([])
    _label_tensors(axes, tensors, shown)
    which = "all weights" if shown.size == instance.n else f"the {shown.size} weights with the largest Q$_{{ii}}$"
    axes.set_title(f"couplings, {which}", loc="left")
    if instance.curvature.number_of_blocks > 1:
        axes.set_xlabel("thin lines: borders of blocks")
    if pruned is not None:
        kept = np.flatnonzero(~pruned[shown])
        axes.plot(kept, np.full(kept.size, 1.015 * shown.size), "|", color=_INK, ms=5, mew=1.1, clip_on=False)
        axes.set(xlim=(-0.5, shown.size - 0.5), ylim=(shown.size - 0.5, -0.5))
        axes.set_xlabel(f"ticks: the {kept.size} weights of these that are kept", labelpad=11)


def _couplings(instance: Instance, index: IntArray) -> FloatArray:
    """Q on some weights, zero between blocks."""
    out = np.zeros((index.size, index.size))
    offsets = instance.curvature.offsets
    block = np.searchsorted(offsets, index, side="right") - 1
    for k in np.unique(block).tolist():
        here = np.flatnonzero(block == k)
        inside = index[here] - offsets[k]
        out[np.ix_(here, here)] = instance.curvature.submatrix(k, inside, inside)
    w = instance.weights[index]
    return out * w[:, None] * w


def _label_tensors(axes: Axes, tensors: Sequence[TensorEntry], shown: IntArray) -> None:
    """The name of each tensor along the vertical axis, where there is room."""
    places = []
    for tensor in tensors:
        inside = np.flatnonzero((shown >= tensor.start) & (shown < tensor.stop))
        if inside.size * _LETTERS >= len(tensor.name) * shown.size:
            places.append((float(inside.mean()), _plain(tensor.name)))
        if inside.size and inside[-1] + 1 < shown.size:
            axes.axhline(float(inside[-1]) + 0.5, color=_INK, lw=0.9)
            axes.axvline(float(inside[-1]) + 0.5, color=_INK, lw=0.9)
    axes.set_yticks([place for place, _ in places], [name for _, name in places], rotation=90, va="center")
    axes.tick_params(length=0)


# Cancelling pairs ----------------------------------------------------------------------------------------------


def _draw_pairs(axes: Axes, instance: Instance, colours: dict[str | None, str], pruned: BoolArray | None) -> None:
    from matplotlib.patheffects import withStroke

    graph = interaction_graph(instance, max_pairs=_PAIRS, cancelling=True)
    axes.set_axis_off()
    total = graph.number_of_edges()
    axes.set_title(f"the {count(total, 'pair')} that cancel most" if total else "no pair cancels", loc="left")
    if not total:
        return
    places = _layout(graph)
    strongest = max(edge["weight"] for *_, edge in graph.edges(data=True))
    for i, j, edge in graph.edges(data=True):
        colour, dashes, _ = (_PAIR, "-", "") if pruned is None else _edge_style(pruned, i, j)
        (x, y), (u, v) = places[i], places[j]
        width = 0.8 + 4.2 * float(np.sqrt(edge["weight"] / strongest))
        axes.plot([x, u], [y, v], color=colour, linestyle=dashes, lw=width, alpha=0.75, zorder=1)
    weights = np.abs([node["weight"] for _, node in graph.nodes(data=True)])
    size = 40 + 260 * weights / max(float(weights.max()), 1e-300)
    tint = [colours.get(node["tensor"], _COLOURS[0]) for _, node in graph.nodes(data=True)]
    fill = tint if pruned is None else ["white" if pruned[i] else c for i, c in zip(graph, tint, strict=True)]
    points = np.array([places[i] for i in graph])
    axes.scatter(points[:, 0], points[:, 1], s=size, c=fill, edgecolors=tint, linewidths=1.3, zorder=2)
    halo = [withStroke(linewidth=2.0, foreground="white")]
    for i, radius in zip(graph, np.sqrt(size) / 2, strict=True):
        label = axes.annotate(
            str(i), tuple(places[i]), xytext=(0, float(radius) + 2.0), textcoords="offset points", zorder=3
        )
        label.set(ha="center", fontsize=6.5, color=_INK, path_effects=halo)
    axes.margins(0.08)
    caption = "numbers: index of the weight; area: |w$_i$|; width: |Q$_{ij}$|"
    axes.text(0.0, -0.02, caption, transform=axes.transAxes, va="top", fontsize=7.5, color=_INK)
    used = {node["tensor"] for _, node in graph.nodes(data=True)}
    handles = _tensor_handles(colours, used) if pruned is None else _pair_handles(graph, pruned)
    if handles:
        axes.legend(
            handles=handles,
            frameon=False,
            ncols=2,
            handlelength=2.2,
            loc="upper left",
            bbox_to_anchor=(-0.02, -0.06),
        )


def _tensor_handles(colours: dict[str | None, str], used: set[str | None]) -> list[Any]:
    """Entries of the legend: the colour of each tensor, where there are several."""
    from matplotlib.lines import Line2D

    if len(colours) < 2:
        return []
    return [
        Line2D([], [], ls="", marker="o", color=colour, label=_plain(name or "none"))
        for name, colour in colours.items()
        if name in used
    ]


def _pair_handles(graph: Any, pruned: BoolArray) -> list[Any]:
    """Entries of the legend: how many pairs are pruned together, cut, or kept."""
    from matplotlib.lines import Line2D

    kinds = [_edge_style(pruned, i, j)[2] for i, j in graph.edges]
    handles: list[Any] = []
    for name, colour, dashes in (
        ("both pruned: the pair cancels", _BOTH, "-"),
        ("cut: one pruned, one kept", _ONE, (0, (3, 1.5))),
        ("both kept", _NEITHER, "-"),
    ):
        label = f"{kinds.count(name)} {name}"
        handles.append(Line2D([], [], color=colour, linestyle=dashes, lw=2.2, label=label))
    handles.append(Line2D([], [], ls="", marker="o", mfc="white", mec=_INK, label="pruned weight"))
    handles.append(Line2D([], [], ls="", marker="o", color=_INK, label="kept weight"))
    return handles


def _plain(name: str) -> str:
    """A name that matplotlib shows literally: no formula, and not hidden in legends because of a leading "_"."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _edge_style(pruned: BoolArray, i: int, j: int) -> tuple[str, Any, str]:
    """Colour, dashes and meaning of a pair, given a selection."""
    if pruned[i] and pruned[j]:
        return _BOTH, "-", "both pruned: the pair cancels"
    if pruned[i] or pruned[j]:
        return _ONE, (0, (3, 1.5)), "cut: one pruned, one kept"
    return _NEITHER, "-", "both kept"


def _layout(graph: Any) -> dict[int, FloatArray]:
    """Positions of the nodes: each component by its distances, the components packed in rows, large ones first."""
    import networkx

    boxes = []
    for component in sorted(networkx.connected_components(graph), key=lambda part: (-len(part), min(part))):
        part = graph.subgraph(sorted(component))
        distance = {i: dict(lengths) for i, lengths in networkx.shortest_path_length(part)}
        spot = networkx.kamada_kawai_layout(part, dist=distance) if len(part) > 2 else _line(part)
        side = 1.0 + 0.85 * np.sqrt(len(part))
        points = np.array([spot[i] for i in part])
        points = points - points.min(axis=0)
        points = points / max(float(points.max()), 1e-12) * (side - 0.9)
        boxes.append((list(part), points, side))
    width = max(max(side for *_, side in boxes), 1.25 * float(np.sqrt(sum(side**2 for *_, side in boxes))))
    places: dict[int, FloatArray] = {}
    x = y = row = 0.0
    for nodes, points, side in boxes:
        if x > 0 and x + side > width:
            x, y, row = 0.0, y - row, 0.0
        top = np.array([x, y - float(points[:, 1].max())])
        places |= {i: top + point for i, point in zip(nodes, points, strict=True)}
        x, row = x + side, max(row, float(points[:, 1].max()) + 1.0)
    return places


def _line(part: Any) -> dict[int, FloatArray]:
    return {i: np.array([float(k), 0.0]) for k, i in enumerate(part)}
