"""One picture of a run: loss over the stages, and what is left of every layer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbs_opt.files.atomic import atomic_write
from cbs_opt.instances.mask_pictures import check_picture, draw_bars

if TYPE_CHECKING:
    from cbs_opt.pruning.outcome import Pruned

_INK, _FAINT, _BLUE, _RED = "#1f2933", "#7b8794", "#2a6f97", "#d1495b"


def draw(path: Path | str, pruned: Pruned) -> None:
    """Draw predicted and measured loss over sparsity, and the sparsity of every layer.

    Parameters
    ----------
    path : Path or str
        `.png`, `.svg` or `.pdf`.
    pruned : Pruned

    Raises
    ------
    UsageError
        For another kind of file.
    OutputError
        When the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    check_picture(path)
    height = max(3.4, 1.4 + 0.22 * len(pruned.layers))
    figure = Figure(figsize=(10.5, height), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
    _losses(left, pruned)
    draw_bars(right, pruned.layers, pruned.sparsity, size=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lower()[1:])
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


def _losses(axes: Any, pruned: Pruned) -> None:
    stages = [stage for stage in pruned.stages if stage.loss is not None]
    start = pruned.before
    sparsities = [stage.sparsity for stage in stages]
    losses = [stage.loss for stage in stages]
    if start is not None:
        sparsities, losses = [0.0, *sparsities], [start.loss, *losses]
        axes.axhline(start.loss, color=_FAINT, linewidth=0.8, linestyle=":")
        axes.annotate("dense", (0, start.loss), (3, 3), textcoords="offset points", fontsize=8, color=_FAINT)
    axes.plot(sparsities, losses, marker="o", markersize=3.5, color=_BLUE, label="measured")
    predicted = [(stage.sparsity, stage.predicted_loss) for stage in stages if stage.predicted_loss is not None]
    if predicted:
        axes.plot(*zip(*predicted, strict=True), "x", markersize=4, color=_RED, label="predicted before the stage")
    axes.set_xlabel("sparsity")
    axes.set_ylabel("loss on held-out training samples")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4)
    if losses:
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    last = "" if pruned.after is None else f", loss {pruned.after.loss:.4f}"
    axes.set_title(f"{pruned.sparsity:.2%} pruned{last}", fontsize=10, color=_INK, loc="left")
