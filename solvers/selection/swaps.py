"""All swaps of a pruned and a kept weight: a search says that it has converged only where none of them gains."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cbs_opt.solvers.selection.incumbent import GAIN, Incumbent, candidate_swaps
from cbs_opt.typing import FloatArray, IntArray

PAIRS = 1 << 21
"""Pairs that are looked at together."""

_LONGER = 1 + 1e-9  # for rounding in the bounds of products


def improve_by_all_swaps(point: Incumbent, should_stop: Callable[[], bool], pairs: int = PAIRS) -> int:
    """Make swaps until no pair of a pruned and a kept weight of one group gains; returns the swaps made.

    Parameters
    ----------
    point : Incumbent
        Changed in place.
    should_stop : callable
        Asked between chunks of `pairs` pairs; when stopped a swap that gains may be left.
    pairs : int

    Notes
    -----
    Dropping i and adding j changes the objective by a_i + b_j − Q_ij, where |Q_ij| ≤ √(Q_ii Q_jj): only pairs that
    this bound does not exclude need their entry of Q. One pass over the pairs of a block of b variables takes
    O(b²) for the bounds, and O(m) more for each of the pairs that are left of a gradient factor; weights of
    different blocks have Q_ij = 0, and the best such swap is found in O(n log n).
    """
    made = 0
    while not should_stop():
        point.refresh()
        before = made
        made += _across_blocks(point, should_stop)
        for b in range(len(point.problem.columns.blocks)):
            made += _within_block(point, b, should_stop, pairs)
        if made == before:
            break
    return made


def _costs(point: Incumbent, index: IntArray) -> FloatArray:
    """What changing each of these variables alone adds to the objective."""
    half = 0.5 * point.problem.columns.diagonal[index]
    h = point.g[index] + point.problem.linear[index]
    return half + np.where(point.y[index] == 1, -h, h)


def _gains(point: Incumbent, change: float) -> bool:
    return change < -GAIN * abs(point.f)


def _swap(point: Incumbent, i: int, j: int, should_stop: Callable[[], bool]) -> int:
    """Drop i, add j, and follow the swaps that this makes cheap."""
    pair = np.array([i, j])
    order = np.argsort(pair)
    point.move(pair[order], np.array([0.0, 1.0])[order])
    return 1 + candidate_swaps(point, should_stop)


def _within_block(point: Incumbent, b: int, should_stop: Callable[[], bool], pairs: int) -> int:
    columns = point.problem.columns
    start, stop = int(columns.starts[b]), int(columns.starts[b + 1])
    made = first = 0
    while not should_stop():
        index = np.arange(start, stop)
        inside, outside = index[point.y[start:stop] == 1], index[point.y[start:stop] == 0]
        if not inside.size or not outside.size:
            break
        drop, add = _costs(point, inside), _costs(point, outside)
        r, s = (_LONGER * np.sqrt(np.maximum(columns.diagonal[part], 0.0)) for part in (inside, outside))
        rows = drop + add.min() - r * s.max()
        needed = add + drop.min() - s * r.max()
        limit = -GAIN * abs(point.f)
        inside, drop, r = (values[rows < limit] for values in (inside, drop, r))
        outside, add, s = (values[needed < limit] for values in (outside, add, s))
        height = max(1, pairs // max(outside.size, 1))
        if first >= inside.size or not outside.size:
            break
        part = slice(first, first + height)
        found = _best_pair(point, b, (inside[part], drop[part], r[part]), (outside, add, s))
        if found is None:
            first += height
        else:  # the sets have changed: what was passed is looked at again
            made += _swap(point, *found, should_stop)
            first = 0
    return made


Side = tuple[IntArray, FloatArray, FloatArray]
"""Variables, their costs, and the roots of their diagonal entries."""


def _best_pair(point: Incumbent, b: int, inside: Side, outside: Side) -> tuple[int, int] | None:
    (i, drop, r), (j, add, s) = inside, outside
    problem, start = point.problem, int(point.problem.columns.starts[b])
    limit = -GAIN * abs(point.f)
    open_ = drop[:, None] + add[None, :] - r[:, None] * s[None, :] < limit
    open_ &= problem.group[i][:, None] == problem.group[j][None, :]
    rows, cols = np.flatnonzero(open_.any(axis=1)), np.flatnonzero(open_.any(axis=0))
    if not rows.size:
        return None
    change = drop[rows][:, None] + add[cols][None, :]
    change -= problem.columns.blocks[b].cross(i[rows] - start, j[cols] - start)
    change[problem.group[i[rows]][:, None] != problem.group[j[cols]][None, :]] = np.inf
    best = int(np.argmin(change))
    if not _gains(point, float(change.flat[best])):
        return None
    row, col = divmod(best, cols.size)
    return int(i[rows[row]]), int(j[cols[col]])


def _across_blocks(point: Incumbent, should_stop: Callable[[], bool]) -> int:
    """Swaps of weights in different blocks, of which Q couples none."""
    made = 0
    while not should_stop():
        found = _best_across(point)
        if found is None:
            break
        made += _swap(point, *found, should_stop)
    return made


def _best_across(point: Incumbent) -> tuple[int, int] | None:
    """Of each group the two cheapest drops, from two blocks, with the two cheapest additions, likewise."""
    sides = []
    for value in (1, 0):
        index = np.flatnonzero(point.y == value)
        sides.append(_two_cheapest(point, index, _costs(point, index)))
    best, pair = 0.0, None
    block = point.problem.columns.block_of
    for drops in sides[0]:
        for adds in sides[1]:
            groups = np.flatnonzero((drops[0] >= 0) & (adds[0] >= 0))
            groups = groups[block[drops[0][groups]] != block[adds[0][groups]]]
            if groups.size:
                change = drops[1][groups] + adds[1][groups]
                k = int(np.argmin(change))
                if change[k] < best:
                    best, pair = float(change[k]), (int(drops[0][groups[k]]), int(adds[0][groups[k]]))
    return pair if _gains(point, best) else None


def _two_cheapest(point: Incumbent, index: IntArray, cost: FloatArray) -> list[tuple[IntArray, FloatArray]]:
    """The cheapest variable of each group (−1 for none) and its cost; and the same outside of its block."""
    group = point.problem.group[index]
    block = point.problem.columns.block_of[index]
    order = np.lexsort((cost, group))
    number = point.problem.budget.size
    out = []
    for _ in range(2):
        at, first = np.unique(group[order], return_index=True)
        chosen = np.full(number, -1, dtype=np.int64)
        value = np.full(number, np.inf)
        chosen[at], value[at] = index[order[first]], cost[order[first]]
        out.append((chosen, value))
        taken = np.full(number, -1, dtype=np.int64)
        taken[at] = block[order[first]]
        order = order[block[order] != taken[group[order]]]
    return out
