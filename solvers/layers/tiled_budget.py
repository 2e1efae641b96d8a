"""Budgets of layers with two partitions of the weights, as in transposable N:M patterns.

Room: layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cbs_opt.budget import Budget
from cbs_opt.solvers.layers.problem import Layer, LayerBudget
from cbs_opt.typing import BoolArray, FloatArray, Int8Array, IntArray


@dataclass(frozen=True, eq=False)
class Band:
    """Rows that have tiles in common, directly or through other rows: a problem of its own.

    Attributes
    ----------
    rows : int64 (R,)
        Rows among those of all layers.
    tile_rows : int64 (N, a)
        Rows of each tile, as places in `rows`; −1 beyond the last one.
    cells : int64 (N, a, b)
        Columns of its weights within their rows; −1 beyond the last one.
    """

    rows: IntArray
    tile_rows: IntArray
    cells: IntArray


@dataclass(frozen=True)
class TiledBudget(LayerBudget):
    """Groups of the rows, and cross groups that tie rows together.

    The fields of `LayerBudget` state a budget without the cross groups: a relaxation, for which bounds hold, too.

    Parameters
    ----------
    total, per_row, pattern
        See `LayerBudget`.
    crossed : Budget
        Over the weights of all layers, one layer after the other, each row by row.
    """

    crossed: Budget = None  # type: ignore[assignment]  # required, after fields with defaults

    def check(self, layers: list[Layer]) -> None:
        """Raise `InstanceError` where the budget does not fit the layers."""
        super().check(layers)
        self.crossed.check_fits(sum(layer.weights.size for layer in layers), _locked(layers))

    def satisfied(self, pruned: list[BoolArray]) -> bool:
        """Whether masks of the layers, bool (rows, K), meet the budget."""
        return self.crossed.is_met_by(np.concatenate([mask.ravel() for mask in pruned]))

    def cheapest(self, layers: list[Layer], costs: list[FloatArray]) -> list[BoolArray]:
        """The feasible masks with the least sum of costs; fixed weights are respected."""
        found = self.crossed.cheapest(np.concatenate([cost.ravel() for cost in costs]), _locked(layers))
        parts = np.split(found, np.cumsum([cost.size for cost in costs])[:-1])
        return [part.reshape(cost.shape) for part, cost in zip(parts, costs, strict=True)]

    def bands(self, layers: list[Layer]) -> list[Band]:
        """The bands, in the order of their first rows; O(n)."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        row_of, column_of = _rows_and_columns([layer.weights.shape for layer in layers])
        number = sum(layer.rows for layer in layers)
        tiles = self.crossed.tiles
        height, width = (max((part.index.shape[axis] for part in tiles), default=1) for axis in (1, 2))
        rows_of_tiles, columns_of_tiles = (
            [np.zeros((0, height), np.int64)],
            [np.zeros((0, height, width), np.int64)],
        )
        for part in tiles:
            missing = height - part.index.shape[1], width - part.index.shape[2]
            rows_of_tiles.append(
                np.pad(row_of[part.index[:, :, 0]], ((0, 0), (0, missing[0])), constant_values=-1)
            )
            columns_of_tiles.append(
                np.pad(column_of[part.index], ((0, 0), (0, missing[0]), (0, missing[1])), constant_values=-1)
            )
        rows, columns = np.concatenate(rows_of_tiles), np.concatenate(columns_of_tiles)
        first = np.broadcast_to(rows[:, :1], rows.shape)
        there = rows >= 0
        edges = coo_array((np.ones(int(there.sum())), (first[there], rows[there])), shape=(number, number))
        labels = connected_components(edges, directed=False)[1]
        order = np.argsort(labels, kind="stable").astype(np.int64)
        members = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
        label_of_tile = labels[rows[:, 0]] if rows.size else np.zeros(0, np.int64)
        by_label = np.argsort(label_of_tile, kind="stable")
        starts = np.searchsorted(label_of_tile[by_label], np.arange(len(members) + 1))
        place = np.full(number + 1, -1, dtype=np.int64)  # the last entry is that of no row, −1
        out = []
        for label, own in enumerate(members):
            place[own] = np.arange(own.size)
            at = by_label[starts[label] : starts[label + 1]]
            out.append(Band(own, place[rows[at]], columns[at]))
        return out


def tiled_budget(budget: Budget, relaxed: LayerBudget | None, index: list[IntArray]) -> TiledBudget | None:
    """The budget of an instance for layers with these weights.

    Parameters
    ----------
    budget : Budget
        With cross groups.
    relaxed : LayerBudget or None
        Its groups alone, where they are N:M or one for each row.
    index : list of int64 (rows, K)

    Returns
    -------
    TiledBudget or None
        None where a group has weights of several rows, or a tile several groups in one row.
    """
    row_of, _ = _rows_and_columns([at.shape for at in index])
    order = np.concatenate([at.ravel() for at in index])
    groups, crosses = (np.asarray(group)[order] for group in (budget.groups, budget.cross_groups))
    crossed = Budget(budget.total, groups, budget.group_budgets, crosses, budget.cross_group_budgets)
    for part in crossed.tiles:
        rows = row_of[part.index]
        heads = np.sort(rows[:, :, 0], axis=1)
        if (rows != rows[:, :, :1]).any() or (heads[:, 1:] == heads[:, :-1]).any():
            return None
    if relaxed is None:
        row_of_group = np.zeros(crossed.number_of_groups, dtype=np.int64)
        row_of_group[groups] = row_of
        counts = np.bincount(row_of_group, weights=crossed.per_group, minlength=int(row_of[-1]) + 1)
        ends = np.cumsum([at.shape[0] for at in index])[:-1]
        relaxed = LayerBudget(per_row=tuple(np.split(counts.astype(np.int64), ends)))
    return TiledBudget(relaxed.total, relaxed.per_row, relaxed.pattern, crossed)


def _locked(layers: list[Layer]) -> Int8Array | None:
    """The fixed weights of all layers, int8 (n,); None without any."""
    if all(layer.locked is None for layer in layers):
        return None
    return np.concatenate(
        [np.zeros(la.weights.size, np.int8) if la.locked is None else la.locked.ravel() for la in layers]
    )


def _rows_and_columns(shapes: list[tuple[int, ...]]) -> tuple[IntArray, IntArray]:
    """The row among those of all layers, and the column, of each weight; int64 (n,) each."""
    rows, columns, first = [], [], 0
    for height, width in shapes:
        rows.append(np.repeat(np.arange(first, first + height), width))
        columns.append(np.tile(np.arange(width), height))
        first += height
    return np.concatenate(rows).astype(np.int64), np.concatenate(columns).astype(np.int64)
