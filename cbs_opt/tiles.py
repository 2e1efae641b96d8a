"""Tiles: two partitions of the weights into groups that cross each other, as in transposable N:M patterns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cbs_opt.errors import InstanceError
from cbs_opt.typing import BoolArray, FloatArray, Int8Array, IntArray

_LARGE = 1e100
_BEYOND = 1e6  # of the largest finite score, for those that are not finite


@dataclass(frozen=True, eq=False)
class Tiles:
    """All tiles of one shape: matrices of weights whose rows are groups and whose columns are cross groups.

    Attributes
    ----------
    index : int64 (T, a, b)
        The weights of each tile.
    rows, columns : int64 (T, a), (T, b)
        Numbers to prune in each row and column.
    groups, cross_groups : int64 (T, a), (T, b)
        The groups that the rows and columns are.
    """

    index: IntArray
    rows: IntArray
    columns: IntArray
    groups: IntArray
    cross_groups: IntArray


def find_tiles(
    groups: IntArray, group_budgets: IntArray, cross_groups: IntArray, cross_group_budgets: IntArray
) -> tuple[Tiles, ...]:
    """The tiles of two partitions.

    Parameters
    ----------
    groups, cross_groups : int64 (n,)
    group_budgets, cross_group_budgets : int64 (G,), (G',)

    Returns
    -------
    tuple of Tiles
        By shape. O(n) time, and O(G log G) for the order of the groups.

    Raises
    ------
    InstanceError
        Where the partitions form no tiles, or some tile has no selection.
    """
    n, G, H = groups.size, group_budgets.size, cross_group_budgets.size
    if not n:
        return ()
    tile_of_group = np.full(G, H, dtype=np.int64)  # its first cross group names a tile
    np.minimum.at(tile_of_group, groups, cross_groups)
    tile = tile_of_group[groups]
    tile_of_cross = np.full(H, H, dtype=np.int64)
    np.minimum.at(tile_of_cross, cross_groups, tile)
    torn = tile_of_cross[cross_groups] != tile
    if torn.any():
        _refuse(int(np.argmax(torn)), groups, cross_groups)
    a, b = (np.bincount(of, minlength=H + 1)[:H] for of in (tile_of_group, tile_of_cross))
    uneven = (np.bincount(tile, minlength=H) != a * b)[tile]
    if uneven.any():
        _refuse(int(np.argmax(uneven)), groups, cross_groups)
    used = np.flatnonzero(a)
    order = used[np.lexsort((used, b[used], a[used]))]  # the tiles, by shape
    number = np.full(H + 1, order.size, dtype=np.int64)
    number[order] = np.arange(order.size)
    starts = np.concatenate([[0], np.cumsum((a * b)[order])])
    row, group_order = _places(number[tile_of_group], a[order])
    column, cross_order = _places(number[tile_of_cross], b[order])
    place = starts[number[tile]] + row[groups] * b[tile] + column[cross_groups]
    flat = np.full(n, -1, dtype=np.int64)
    flat[place] = np.arange(n)
    if (flat < 0).any():
        lost = np.ones(n, dtype=bool)
        lost[flat[flat >= 0]] = False
        _refuse(int(np.argmax(lost)), groups, cross_groups)
    shapes, first = np.unique(np.stack([a[order], b[order]], axis=1), axis=0, return_index=True)
    ends = [*first[1:].tolist(), order.size]
    row_starts, column_starts = (np.concatenate([[0], np.cumsum(size[order])]) for size in (a, b))
    out = []
    for (height, width), begin, end in zip(shapes.tolist(), first.tolist(), ends, strict=True):
        of_rows = group_order[row_starts[begin] : row_starts[end]].reshape(-1, height)
        of_columns = cross_order[column_starts[begin] : column_starts[end]].reshape(-1, width)
        index = flat[starts[begin] : starts[end]].reshape(-1, height, width)
        out.append(Tiles(index, group_budgets[of_rows], cross_group_budgets[of_columns], of_rows, of_columns))
    _check_sums(out)
    return tuple(out)


def _places(tile: IntArray, sizes: IntArray) -> tuple[IntArray, IntArray]:
    """The place of each group within its tile, and the groups in the order of the tiles, empty ones last."""
    order = np.argsort(tile, kind="stable").astype(np.int64)
    count = int(sizes.sum())
    place = np.zeros(tile.size, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    place[order[:count]] = np.arange(count) - np.repeat(starts, sizes)
    return place, order[:count]


def _refuse(weight: int, groups: IntArray, cross_groups: IntArray) -> None:
    raise InstanceError(
        "`groups` and `cross_groups` must form tiles, in which each group has exactly one weight in common with "
        f"each cross group; weight {weight}, of group {groups[weight]} and cross group {cross_groups[weight]}, is "
        "in none"
    )


def _check_sums(tiles: Sequence[Tiles]) -> None:
    """Raise `InstanceError` for tiles without a selection."""
    for part in tiles:
        of_rows, of_columns = part.rows.sum(axis=1), part.columns.sum(axis=1)
        if (wrong := of_rows != of_columns).any():
            t = int(np.argmax(wrong))
            raise InstanceError(
                "`group_budgets` and `cross_group_budgets` must have the same sum in every tile, got "
                f"{of_rows[t]} and {of_columns[t]} in the tile of group {part.groups[t, 0]}"
            )
        # Numbers that differ by at most one always have a selection (Gale, Ryser).
        level = [np.ptp(counts, axis=1) <= 1 for counts in (part.rows, part.columns)]
        others = np.flatnonzero(~(level[0] & level[1]))
        t = _without_selection(part, others, np.zeros(part.index.shape[1:], dtype=np.int8)[None])
        if t >= 0:
            raise InstanceError(
                "`group_budgets` and `cross_group_budgets` exclude each other: no selection meets all of those of "
                f"the tile of group {part.groups[t, 0]}"
            )


def check_fixed(tiles: Sequence[Tiles], fixed: ArrayLike) -> None:
    """Raise `InstanceError` for tiles in which `fixed`, int8 (n,), leaves no selection."""
    signs = np.sign(fixed).astype(np.int8)
    for part in tiles:
        locked = signs[part.index]
        concerned = np.flatnonzero(locked.any(axis=(1, 2)))
        t = _without_selection(part, concerned, locked[concerned])
        if t >= 0:
            raise _contradiction(part, t)


def _contradiction(part: Tiles, tile: int) -> InstanceError:
    return InstanceError(
        "`fixed` contradicts the budget: no selection meets the budgets of all groups and cross groups of the "
        f"tile of group {part.groups[tile, 0]}"
    )


def _without_selection(part: Tiles, which: IntArray, locked: Int8Array) -> int:
    """The first of these tiles that has no selection, or −1."""
    if not which.size:
        return -1
    shape = (which.size, *part.index.shape[1:])
    found = _match(np.zeros(shape), part.rows[which], part.columns[which], np.broadcast_to(locked, shape))[1]
    return int(which[found]) if found >= 0 else -1


def cheapest_in_tiles(tiles: Sequence[Tiles], scores: FloatArray, fixed: ArrayLike | None = None) -> BoolArray:
    """Prune the weights of the lowest sum of scores that the budgets of groups and cross groups allow.

    Parameters
    ----------
    tiles : sequence of Tiles
    scores : float (n,)
        +∞, and what is no number, counts as larger than all others, −∞ as smaller.
    fixed : int8 (n,), optional

    Returns
    -------
    bool (n,)
        The minimum, up to rounding of the sums. O(p (a + b)²) time for a tile (a, b), with p ≤ a b / 2 the number
        by which the cheapest weights of the rows miss the budgets of the columns.

    Raises
    ------
    InstanceError
        Where `fixed` leaves no selection.
    """
    values = np.asarray(scores, dtype=np.float64)
    finite = np.isfinite(values)
    largest = float(np.abs(values, where=finite, out=np.zeros(values.size)).max(initial=0.0))
    if largest > _LARGE:  # sums of a few of them would overflow
        values, largest = values / largest, 1.0
    if not finite.all():
        beyond = _BEYOND * (largest or 1.0)
        values = np.where(finite, values, np.where(values == -np.inf, -beyond, beyond))
    out = np.zeros(values.size, dtype=bool)
    signs = np.zeros(values.size, dtype=np.int8) if fixed is None else np.sign(fixed).astype(np.int8)
    for part in tiles:
        chosen, found = _match(values[part.index], part.rows, part.columns, signs[part.index])
        if found >= 0:
            raise _contradiction(part, found)
        out[part.index] = chosen
    return out


def _match(costs: FloatArray, rows: IntArray, columns: IntArray, locked: Int8Array) -> tuple[BoolArray, int]:
    """The cheapest entries, bool (T, a, b), and the first tile without any, or −1."""
    from cbs_opt.solvers.kernels.tiles import cheapest_entries

    chosen = np.empty(costs.shape, dtype=np.uint8)
    arrays = (np.ascontiguousarray(array) for array in (costs, rows, columns, locked))
    found = int(cheapest_entries(*arrays, chosen))
    return chosen.view(np.bool_), found
