"""The arithmetic of a benchmark report: gaps, means, profiles, times to a target. Arrays in, arrays out.

A run that failed has an infinite gap or time; it counts in medians and shares, and is never left out silently.

References
----------
.. [1] Dolan, Moré, "Benchmarking optimization software with performance profiles", Mathematical Programming 91
   (2002).
.. [2] Aiex, Resende, Ribeiro, "TTT plots: a perl program to create time-to-target plots", Optimization Letters 1
   (2007).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from cbs_opt.typing import FloatArray

TOLERANCE = 1e-6
"""Relative difference up to which two losses count as equal."""

ROUNDING = 1e-12
"""The same, relative to the largest loss of the problem: objectives may cancel where there is a linear term."""


class Steps(NamedTuple):
    """A nondecreasing step function: from `x[k]` on its value is `y[k]`; before `x[0]` it is 0.

    Attributes
    ----------
    x, y : float64 (k,)
        `x` increases strictly.
    """

    x: FloatArray
    y: FloatArray

    def at(self, x: float) -> float:
        """The value at `x`."""
        k = int(np.searchsorted(self.x, x, side="right"))
        return float(self.y[k - 1]) if k else 0.0


def slack(value: float, other: float, scale: float) -> float:
    """How far two losses of one problem may differ and count as equal.

    Parameters
    ----------
    value, other : float
    scale : float
        The largest absolute loss of the problem.
    """
    return TOLERANCE * max(abs(value), abs(other)) + ROUNDING * scale


def relative_gap(value: float | None, reference: float, scale: float) -> float:
    """(value − reference) / |reference|: 0 up to rounding, infinite without a value.

    Parameters
    ----------
    value : float or None
        A loss; at least `reference` up to rounding.
    reference : float
        The best known loss, or the optimum; may be negative. Where it is 0, `scale` takes the place of its
        absolute value.
    scale : float
        The largest absolute loss of the problem.
    """
    if value is None:
        return math.inf
    difference = value - reference
    if difference <= ROUNDING * scale:
        return 0.0
    return difference / max(abs(reference), ROUNDING * scale, 1e-300)


def certified_gap(value: float, bound: float, scale: float) -> float:
    """(value − bound) / |value|, the gap that a run proves of itself; `scale` as in `relative_gap`."""
    return max(value - bound, 0.0) / max(abs(value), ROUNDING * scale, 1e-300)


def is_closed(value: float, bound: float | None, scale: float) -> bool:
    """Whether a bound proves a loss optimal to `TOLERANCE`."""
    return bound is not None and value - bound <= slack(value, bound, scale)


def shifted_geometric_mean(seconds: ArrayLike, shift: float = 1.0) -> float:
    """exp(mean(log(t + s))) − s, as in Mittelmann's benchmarks; NaN of nothing.

    Parameters
    ----------
    seconds : float (k,)
        Not negative; infinities must have been replaced by a limit.
    shift : float
        Seconds that keep very short runs from deciding.
    """
    values = np.asarray(seconds, dtype=np.float64)
    if not values.size:
        return math.nan
    return float(np.exp(np.mean(np.log(values + shift))) - shift)


def mean_ratio_gap(gaps: ArrayLike) -> float:
    """exp(mean(log(1 + gap))) − 1 over the finite gaps: the geometric mean of loss / reference, less 1.

    NaN where no gap is finite.
    """
    values = np.asarray(gaps, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return math.nan
    return float(np.expm1(np.mean(np.log1p(values))))


def median(values: ArrayLike) -> float:
    """The median, where infinities count: of an even number the mean of the two in the middle; NaN of nothing."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if not ordered.size:
        return math.nan
    low, high = float(ordered[(ordered.size - 1) // 2]), float(ordered[ordered.size // 2])
    return low if low == high else 0.5 * (low + high)


def first_times(
    events: Iterable[tuple[float, float | None, float | None]], targets: Sequence[float]
) -> list[float]:
    """Seconds of the first event whose objective is at most each target; infinite where none is.

    Parameters
    ----------
    events : iterable of (seconds, objective or None, bound or None)
        In order of time.
    targets : sequence of float
        In any order.
    """
    found = [math.inf] * len(targets)
    missing = len(targets)
    for seconds, objective, _ in events:
        if objective is None:
            continue
        for k, target in enumerate(targets):
            if objective <= target and math.isinf(found[k]):
                found[k] = seconds
                missing -= 1
        if not missing:
            break
    return found


def first_closed(events: Iterable[tuple[float, float | None, float | None]], scale: float) -> float:
    """Seconds of the first event whose bound proves its objective optimal; infinite where none does."""
    for seconds, objective, bound in events:
        if objective is not None and is_closed(objective, bound, scale):
            return seconds
    return math.inf


def shares(values: ArrayLike, weights: ArrayLike | None = None) -> Steps:
    """The empirical distribution: the share of all values, infinite ones included, that is at most x.

    The plot of time to target [2]_ is this, of the times.

    Parameters
    ----------
    values : float (k,)
    weights : float (k,), optional
        One each without them.

    Returns
    -------
    Steps
        Ends at the share of finite values; empty where there is none. O(k log k).
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones(x.size) if weights is None else np.asarray(weights, dtype=np.float64)
    finite = np.isfinite(x)
    total = float(w.sum())
    if not finite.any() or total <= 0:
        return Steps(np.zeros(0), np.zeros(0))
    points, inverse = np.unique(x[finite], return_inverse=True)
    risen = np.cumsum(np.bincount(inverse, weights=w[finite], minlength=points.size)) / total
    return Steps(points, np.minimum(risen, 1.0))


def performance_profiles(times: ArrayLike, least: float = 0.0) -> list[Steps]:
    """Performance profiles ρ_s(τ) = share of the problems with r_ps ≤ τ, r_ps = t_ps / min_s t_ps [1]_.

    Parameters
    ----------
    times : float (problems, solvers)
        Seconds; infinite where the solver did not solve the problem.
    least : float
        Shorter times count as this: below it the clock decides, not the solver.

    Returns
    -------
    list of Steps
        One for each solver. ρ_s(1) is the share of problems on which it is (one of) the fastest; the last value
        the share that it solves. A problem that no solver solves counts in the denominator.
    """
    clock = np.maximum(np.asarray(times, dtype=np.float64), least)
    fastest = clock.min(axis=1, keepdims=True) if clock.size else clock
    ratios = np.full(clock.shape, np.inf)
    np.divide(clock, fastest, out=ratios, where=np.isfinite(clock) & (fastest > 0))
    ratios[(clock == fastest) & np.isfinite(clock)] = 1.0
    return [shares(column) for column in ratios.T]


def thinned(steps: Steps, count: int, logarithmic: bool = True) -> Steps:
    """The same step function on at most about `count` points, for drawing; its first and last points stay."""
    if steps.x.size <= count:
        return steps
    low, high = float(steps.x[0]), float(steps.x[-1])
    grid = np.geomspace(low, high, count) if logarithmic and low > 0 else np.linspace(low, high, count)
    last = np.searchsorted(steps.x, grid[1:-1], side="right") - 1
    chosen = np.unique(np.concatenate(([0], last, [steps.x.size - 1])))
    return Steps(steps.x[chosen], steps.y[chosen])


def on_grid(
    events: Sequence[tuple[float, float | None, float | None]], grid: FloatArray, column: int = 1
) -> FloatArray:
    """What a run has at each time: its objective (column 1) or bound (column 2); NaN before the first.

    Parameters
    ----------
    events : sequence of (seconds, objective or None, bound or None)
        In order of time.
    grid : float64 (k,)
        Seconds, increasing.

    Returns
    -------
    float64 (k,)
    """
    known = [(event[0], event[column]) for event in events if event[column] is not None]
    if not known:
        return np.full(grid.shape, np.nan)
    times, values = (np.array(part, dtype=np.float64) for part in zip(*known, strict=True))
    last = np.searchsorted(times, grid, side="right") - 1
    return np.where(last >= 0, values[np.maximum(last, 0)], np.nan)
