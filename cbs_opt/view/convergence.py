"""A picture of a run: incumbent and bound over time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cbs_opt.optional import require
from cbs_opt.view.text import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cbs_opt.result import Result

INCUMBENT, BOUND = "#0072b2", "#d55e00"
_DECADES = 30.0  # ratio of largest to smallest loss above which the axis is logarithmic


def draw_convergence(result: Result, axes: Axes | None = None) -> Axes:
    """Draw the history of a result as two step lines with the gap between them shaded; see `Result.plot`."""
    if axes is None:
        axes = require("matplotlib.pyplot", "a picture").subplots(figsize=(6.4, 3.6), layout="constrained")[1]
    last = max([result.solve_seconds, *(row.seconds for row in result.history)], default=0.0)
    seconds = np.array([*(row.seconds for row in result.history), last])
    objective = _column([row.objective for row in result.history], result.objective)
    bound = _column([row.bound for row in result.history], result.bound)
    axes.step(seconds, objective, where="post", color=INCUMBENT, label="incumbent")
    if np.isfinite(bound).any():
        axes.step(seconds, bound, where="post", color=BOUND, linestyle=(0, (5, 2)), label="lower bound")
        both = np.isfinite(objective) & np.isfinite(bound)
        axes.fill_between(
            seconds, bound, objective, where=both.tolist(), step="post", color=INCUMBENT, alpha=0.08, linewidth=0
        )
    values = np.concatenate([objective, bound])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() > _DECADES * values.min():
        axes.set_yscale("log")
    axes.set_xlim(0.0, last if last > 0 else 1.0)
    axes.set_xlabel("seconds")
    axes.set_ylabel(f"{result.objective_kind} loss")
    gap = "" if result.gap is None else f", gap {percent(result.gap)}"
    axes.set_title(f"{result.solver}: {str(result.status).replace('_', ' ')}{gap}", loc="left", fontsize="medium")
    axes.grid(True, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return axes


def _column(values: list[float | None], final: float | None) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The values over time with the final one at the end; NaN before the first one."""
    return np.array([np.nan if value is None else value for value in [*values, final]], dtype=np.float64)
