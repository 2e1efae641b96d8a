"""Figures of the mask of every layer."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbs_opt.errors import UsageError
from cbs_opt.files.atomic import atomic_write
from cbs_opt.instances.masks import LayerMask

FORMATS = (".png", ".svg", ".pdf")

_ROWS, _COLUMNS = 128, 256  # cells of a panel at most
_ACROSS = 4
_MOST = 48
_INK, _FAINT, _BAR = "#1f2933", "#7b8794", "#2a6f97"


def kept_density(pruned: NDArray[np.bool_], rows: int = _ROWS, columns: int = _COLUMNS) -> NDArray[np.float64]:
    """The fraction of kept weights in each cell of a grid over a tensor.

    Parameters
    ----------
    pruned : bool array (out, …)
        Drawn as a matrix: outputs downwards, everything else across.
    rows, columns : int
        Size of the grid at most; a smaller tensor has one cell per weight.

    Returns
    -------
    float64 (r, c) in [0, 1], r ≤ rows, c ≤ columns
    """
    kept = (~pruned.reshape(1 if pruned.ndim < 2 else pruned.shape[0], -1)).astype(np.float64)
    for axis, most in ((0, rows), (1, columns)):
        length = kept.shape[axis]
        if length > most:
            edges = np.arange(most) * length // most
            sizes = np.diff(np.append(edges, length))
            sums = np.add.reduceat(kept, edges, axis)
            kept = (sums / (sizes[:, None] if axis == 0 else sizes)).astype(np.float64)
    return kept


def check_picture(path: Path) -> None:
    """Raise `UsageError` unless the name of the file ends in a format that can be drawn."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path}: a picture must end in {', '.join(FORMATS)}, got '{path.suffix}'")


def draw_masks(path: Path | str, layers: Sequence[LayerMask], title: str = "") -> None:
    """Draw sparsity and mask of all layers: dark where weights are kept, white where they are pruned.

    Of more than 48 layers the masks of the 48 largest are drawn.

    Parameters
    ----------
    path : Path or str
        `.png`, `.svg` or `.pdf`.
    layers : sequence of LayerMask
    title : str

    Raises
    ------
    UsageError
        For another kind of file.
    OutputError
        When the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    path = Path(path)
    check_picture(path)
    drawn = sorted(sorted(range(len(layers)), key=lambda i: -layers[i].pruned.size)[:_MOST])
    down = math.ceil(len(drawn) / _ACROSS)
    across = math.ceil(len(drawn) / down)
    bars = 0.24 * len(layers) + 0.5
    width = max(2.9 * across, 8.0)
    figure = Figure(figsize=(width, 1.0 + bars + 2.0 * down), facecolor="white")
    figure.set_layout_engine(ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08, hspace=0.04, wspace=0.04))
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(2, 1, height_ratios=[bars + 0.6, 2.0 * down])
    top, bottom = halves
    pruned, size = sum(layer.count for layer in layers), sum(layer.pruned.size for layer in layers)
    heading = f"{title}: " if title else ""
    figure.suptitle(
        f"{heading}{pruned:,} of {size:,} weights pruned ({pruned / size:.2%})",
        fontsize=12,
        color=_INK,
        fontweight="bold",
    )
    axes = top.subplots()
    draw_bars(axes, layers, pruned / size)
    axes.tick_params(axis="x", labelsize=8, colors=_FAINT)
    axes.set_xlabel("pruned", fontsize=8, color=_FAINT)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=8, frameon=False, borderaxespad=0.2)
    panels = bottom.subplots(down, across, squeeze=False).ravel()
    scale = max(float(kept_density(layer.pruned).max(initial=0)) for layer in layers) or 1.0
    image = None
    for panel, index in zip(panels, drawn, strict=False):
        image = _draw_mask(panel, layers[index], scale)
    for panel in panels[len(drawn) :]:
        panel.set_visible(False)
    if image is not None:
        bar = bottom.colorbar(image, ax=panels.tolist(), location="bottom", fraction=0.04, aspect=40, shrink=0.5)
        bar.set_label("kept fraction of the weights under a cell", fontsize=8, color=_FAINT)
        bar.ax.tick_params(labelsize=7, colors=_FAINT)
        bar.outline.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lower()[1:], dpi=min(130, 12000 / figure.get_figheight()))
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


def draw_bars(axes: Any, layers: Sequence[LayerMask], overall: float, size: float = 8) -> None:
    """Draw the sparsity of each layer, compared with that of the network; `size` of the letters in points."""
    places = np.arange(len(layers))
    axes.barh(places, [layer.sparsity for layer in layers], color=_BAR, height=0.68)
    axes.axvline(overall, color="#d1495b", linewidth=1.2, label=f"whole network {overall:.1%}")
    for place, layer in zip(places, layers, strict=True):
        axes.text(
            1.01,
            place,
            f"{layer.sparsity:.1%} of {layer.pruned.size:,}",
            va="center",
            fontsize=size,
            color=_INK,
            transform=axes.get_yaxis_transform(),
        )
    axes.set_yticks(places, [layer.title for layer in layers], fontsize=size, color=_INK)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("pruned")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_mask(axes: Any, layer: LayerMask, scale: float) -> Any:
    shape = layer.pruned.shape
    image = axes.imshow(
        kept_density(layer.pruned), cmap="Blues", vmin=0, vmax=scale, aspect="auto", interpolation="nearest"
    )
    axes.set_title(f"{layer.name}  {' × '.join(map(str, shape))}", fontsize=8, color=_INK)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#cbd2d9")
    return image
