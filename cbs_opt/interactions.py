"""The strongest couplings Q_ij = w_i H_ij w_j of an instance.

Pruning i and j together costs Q_ij more than pruning each alone. A pair with Q_ij < 0 cancels: removing
both costs less than the sum of the single costs. Without such pairs a ranking of the weights would be optimal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cbs_opt.errors import UsageError
from cbs_opt.optional import require
from cbs_opt.scalars import is_finite, is_integer
from cbs_opt.selection import SelectionObjective
from cbs_opt.tensor_table import TensorEntry, tensor_table
from cbs_opt.typing import FloatArray, IntArray

if TYPE_CHECKING:
    from networkx import Graph

    from cbs_opt.instance import Instance

_PANEL_ENTRIES = 1 << 22  # of H that are examined at a time
_ROUNDING = 1e-12  # relative; a bound on |Q_ij| counts as reached a little earlier


@dataclass(frozen=True, eq=False)
class Couplings:
    """Pairs of weights by decreasing |Q_ij|.

    Attributes
    ----------
    first, second : int64 (E,)
        The weights of each pair, first < second.
    values : float64 (E,)
        Q_ij.
    complete : bool
        Whether these are all requested pairs; False if a limit omitted weaker ones.
    """

    first: IntArray
    second: IntArray
    values: FloatArray
    complete: bool


def strongest_couplings(
    instance: Instance,
    threshold: float = 0.0,
    *,
    max_pairs: int = 10_000,
    max_weights: int = 10_000,
    cancelling: bool = False,
) -> Couplings:
    """The pairs with the largest |Q_ij|, block by block, without forming large blocks.

    Parameters
    ----------
    instance : Instance
    threshold : float
        Pairs with |Q_ij| below it, or equal to zero, are omitted.
    max_pairs : int
        At most this many pairs are returned, the strongest.
    max_weights : int
        In a block with more weights than this, only those with the largest Q_ii are examined.
    cancelling : bool
        Only pairs with Q_ij < 0.

    Returns
    -------
    Couplings

    Raises
    ------
    UsageError
        For a negative threshold or a limit below 1.

    Notes
    -----
    H is positive semidefinite, so that Q_ij² ≤ Q_ii Q_jj: weights are examined by decreasing Q_ii, and the search
    in a block ends when no pair can reach the threshold, or the weakest of `max_pairs` pairs found so far.
    O(Σ b²) entries of H at worst, b the smaller of b_k and `max_weights`; panels of 4 million entries in memory.
    """
    if not is_finite(threshold) or threshold < 0:
        raise UsageError(f"`threshold` must be a finite number ≥ 0, got {threshold!r}")
    for name, limit in (("max_pairs", max_pairs), ("max_weights", max_weights)):
        if not is_integer(limit) or limit < 1:
            raise UsageError(f"`{name}` must be a whole number ≥ 1, got {limit!r}")
    problem = SelectionObjective(instance)
    found = _Strongest(float(threshold), int(max_pairs))
    diagonal = np.sqrt(np.maximum(problem.diagonal, 0.0))
    offsets = instance.curvature.offsets
    # Blocks with large entries first: they raise the threshold for all others.
    largest = np.maximum.reduceat(diagonal, offsets[:-1])
    for k in np.argsort(-largest, kind="stable").tolist():
        part = instance.curvature.block_slice(k)
        order = np.argsort(-diagonal[part], kind="stable")
        scale = diagonal[part][order]
        if order.size > max_weights:
            found.leave_out(float(scale[0] * scale[max_weights]))
            order, scale = order[:max_weights], scale[:max_weights]
        start, width = 0, max(1, _PANEL_ENTRIES // order.size)
        while start < order.size - 1:
            # Partners of order[start] come after it; each has a root of at least least / scale[start].
            if scale[start] * scale[start + 1] * (1 + _ROUNDING) < found.least or scale[start] == 0.0:
                break
            panel = order[start : start + width]
            reach = _count_at_least(scale, found.least / (scale[start] * (1 + _ROUNDING)))
            partners = order[start : max(reach, start + 1)]
            entries = instance.curvature.submatrix(k, panel, partners)
            w = instance.weights[part]
            entries = entries * w[panel][:, None] * w[partners]
            rows, columns = np.nonzero(np.arange(partners.size) > np.arange(panel.size)[:, None])
            values = entries[rows, columns]
            wanted = (-values if cancelling else np.abs(values)) >= found.least
            wanted &= values != 0.0
            i, j = panel[rows[wanted]] + part.start, partners[columns[wanted]] + part.start
            found.add(np.minimum(i, j), np.maximum(i, j), values[wanted])
            start += width
    return found.couplings()


def _count_at_least(descending: FloatArray, value: float) -> int:
    """How many entries of a decreasing array are at least `value`."""
    return int(np.searchsorted(-descending, -value, side="right"))


class _Strongest:
    """Keeps the strongest `limit` pairs of those that were added, and the value that a new one must reach."""

    def __init__(self, threshold: float, limit: int) -> None:
        self.least = threshold
        self.complete = True
        self._limit = limit
        self._parts: list[tuple[IntArray, IntArray, FloatArray]] = []
        self._count = 0
        self._unseen = 0.0

    def leave_out(self, most: float) -> None:
        """Record that pairs with |Q_ij| up to `most` will not be examined."""
        self._unseen = max(self._unseen, most)

    def add(self, first: IntArray, second: IntArray, values: FloatArray) -> None:
        self._parts.append((first, second, values))
        self._count += values.size
        if self._count > 2 * self._limit:
            self._shrink()

    def _shrink(self) -> None:
        first, second, values = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        # By strength, ties by index, so that the answer does not depend on the order of the search.
        order = np.lexsort((second, first, -np.abs(values)))
        if order.size > self._limit:
            self.complete = False
            order = order[: self._limit]
            self.least = max(self.least, float(np.abs(values[order[-1]])))
        self._parts = [(first[order], second[order], values[order])]
        self._count = order.size

    def couplings(self) -> Couplings:
        self.complete = self.complete and (self._unseen == 0.0 or self._unseen < self.least)
        if not self._parts:
            none = np.zeros(0, dtype=np.int64)
            return Couplings(none, none, np.zeros(0), self.complete)
        self._shrink()
        return Couplings(*self._parts[0], complete=self.complete)


def interaction_graph(
    instance: Instance,
    threshold: float = 0.0,
    *,
    max_pairs: int = 10_000,
    max_weights: int = 10_000,
    cancelling: bool = False,
    isolated: bool = False,
) -> Graph:
    """The pairs of weights with |Q_ij| ≥ threshold, as a networkx graph.

    Parameters
    ----------
    instance : Instance
    threshold : float
        In units of the loss.
    max_pairs, max_weights : int
        The graph has at most `max_pairs` edges, the strongest, among the `max_weights` weights with the largest
        Q_ii of each block.
    cancelling : bool
        Only pairs with Q_ij < 0, which cost less together than separately.
    isolated : bool
        Also include the weights that are in no pair.

    Returns
    -------
    networkx.Graph
        A node for each weight, by its index, with `weight` (w_i), `cost` (selection loss of pruning it alone),
        `block`, `tensor` (its name, None if not in the metadata) and `index` (its position in the tensor).
        An edge for each pair, with `coupling` (Q_ij), and `weight` (|Q_ij|) for the algorithms of networkx. The
        graph's own attributes are `threshold` and `complete`: whether no pair is missing.

    Raises
    ------
    UsageError
        For a negative threshold or a limit below 1.
    RequirementError
        When networkx is not installed.

    Examples
    --------
    >>> import cbs_opt, networkx
    >>> graph = cbs_opt.library("mlp-output-12").interaction_graph(1e-3)
    >>> networkx.number_connected_components(graph)
    1
    """
    networkx = require("networkx", "an interaction graph")
    pairs = strongest_couplings(
        instance, threshold, max_pairs=max_pairs, max_weights=max_weights, cancelling=cancelling
    )
    graph = networkx.Graph(threshold=threshold, complete=pairs.complete)
    in_pairs = np.unique(np.concatenate([pairs.first, pairs.second]))
    nodes = np.arange(instance.n) if isolated else in_pairs
    tensors = tensor_table(instance)
    problem = SelectionObjective(instance)
    cost = 0.5 * problem.diagonal[nodes] + problem.c[nodes]
    block = np.searchsorted(instance.curvature.offsets, nodes, side="right") - 1
    for i, price, k in zip(nodes.tolist(), cost.tolist(), block.tolist(), strict=True):
        graph.add_node(i, weight=float(instance.weights[i]), cost=price, block=k, **_place(tensors, i))
    for i, j, value in zip(pairs.first.tolist(), pairs.second.tolist(), pairs.values.tolist(), strict=True):
        graph.add_edge(i, j, coupling=value, weight=abs(value))
    return graph


def _place(tables: list[TensorEntry], i: int) -> dict[str, Any]:
    for tensor in tables:
        if tensor.start <= i < tensor.stop:
            return {"tensor": tensor.name, "index": tensor.index(i)}
    return {"tensor": None, "index": None}
