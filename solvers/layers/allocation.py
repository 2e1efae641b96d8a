"""One budget over many rows: which number of weights each row prunes."""

from __future__ import annotations

import numpy as np

from cbs_opt.typing import FloatArray, IntArray


def merge_paths(
    costs: list[FloatArray], scales: FloatArray, first: IntArray, total: int
) -> tuple[IntArray, float]:
    """How far to follow each elimination path so that `total` weights go, and the price of the last one.

    A path's costs are replaced by their running maximum, so that a dear removal brings the cheaper ones behind it
    along; the `total` smallest are taken. costs : rises of the doubled loss along each path; the first `first`
    steps of each path are forced. Returns (rows,) counts and the price in units of scale × cost.
    """
    rows = np.repeat(np.arange(len(costs)), [c.size for c in costs])
    level = np.concatenate(
        [scale * np.maximum.accumulate(c) if c.size else c for c, scale in zip(costs, scales, strict=True)]
    )
    step = np.concatenate([np.arange(c.size) for c in costs])
    level = np.where(step < first[rows], -np.inf, level)
    chosen = np.lexsort((step, level))[:total]
    price = float(level[chosen].max(initial=0.0)) if total else 0.0
    return np.bincount(rows[chosen], minlength=len(costs)), max(price, 0.0)


def choose_counts(values: FloatArray, lowest: IntArray, total: int) -> tuple[IntArray, float] | None:
    """The entry of each row's table so that `total` weights go at the least sum of values, and the price.

    values : (rows, c), infinite where there is no mask; entry e of row r prunes lowest_r + e. The Lagrangian price
    is bisected; rows are then moved from their cheaper to their dearer choice one by one, and what is missing is
    made up by the cheapest exchange of one row. O(rows · c · 60). None where no such choice was found;
    near-optimal, not always optimal.
    """
    counts = lowest[:, None] + np.arange(values.shape[1])
    if not np.isfinite(values).any(axis=1).all():
        return None
    at = np.arange(values.shape[0])

    def choice(price: float) -> tuple[IntArray, int]:
        entry = np.argmin(values - price * counts, axis=1)
        return entry, int(counts[at, entry].sum())

    finite = values[np.isfinite(values)]
    high = float(finite.max() - finite.min()) + 1e-300
    low = -high
    below, reached = choice(low)
    if reached > total:
        return None
    above, reached_above = choice(high)
    if reached_above < total:
        return None
    for _ in range(80):
        middle = 0.5 * (low + high)
        entry, number = choice(middle)
        if number <= total:
            low, below, reached = middle, entry, number
        else:
            high, above = middle, entry
        if reached == total:
            return below, middle
    entry = below.copy()
    for row in np.flatnonzero(above != below):
        gain = int(counts[row, above[row]] - counts[row, entry[row]])
        if 0 < gain <= total - reached:
            entry[row] = above[row]
            reached += gain
    missing = total - reached
    while missing:
        shift = np.full(values.shape, np.inf)
        change = counts - counts[at, entry][:, None]
        useful = (np.abs(missing - change) < abs(missing)) & np.isfinite(values)
        shift[useful] = ((values - values[at, entry][:, None]) / np.maximum(np.abs(change), 1))[useful]
        row, best = np.unravel_index(int(np.argmin(shift)), shift.shape)
        if not np.isfinite(shift[row, best]):
            return None
        missing -= int(change[row, best])
        entry[row] = best
    return entry, high
