"""Exchanges that keep groups and cross groups, on blocks of any form: which there are, and a search by them.

Room: problem, for `selection` and `joint`, which price the exchanges.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable

import numpy as np

from cbs_opt.instance import Instance
from cbs_opt.monitor import Monitor
from cbs_opt.solver import Context
from cbs_opt.typing import BoolArray, FloatArray, IntArray

logger = logging.getLogger("cbs_opt")

_MOST_ENTRIES = 1 << 26  # of the matrices of all blocks
_LARGEST_BLOCK = 2048  # every exchange may factorise it anew
_MOST_EXCHANGES = 1 << 22
_MOST_TOGETHER = 4096  # exchanges that are tried in one pass
_GAIN = 1e-9  # smallest improvement that counts, relative to the loss
_KICKS = 30  # perturbations of the incumbent in a run without a limit
_BOUND_SHARE, _BOUND_SECONDS = 0.3, 10.0  # of what remains after the first descent, for a bound
_KICK = 3  # random exchanges of each


class TileMoves(abc.ABC):
    """A selection, and the prices of all exchanges.

    An exchange takes two rows and two columns of a tile in which the weights on one diagonal are kept and those on
    the other are pruned; all four change sides. Such exchanges connect all selections of a tile.

    Parameters
    ----------
    instance : Instance
        With cross groups.
    """

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        curvature = instance.curvature
        self.sizes, self.starts = curvature.block_sizes, curvature.offsets[:-1]
        self.block_of = np.repeat(np.arange(self.sizes.size), self.sizes)
        self._flat_starts = np.concatenate([[0], np.cumsum(self.sizes**2)])
        self._flat = np.zeros(int(self._flat_starts[-1]))
        self._exchanges = _exchanges(instance)
        self.pruned = np.zeros(instance.n, dtype=bool)

    def matrix(self, k: int) -> FloatArray:
        """The matrix of block k that `entries` reads, float64 (b, b), to write to."""
        return self._flat[self._flat_starts[k] : self._flat_starts[k + 1]].reshape(self.sizes[k], self.sizes[k])

    def entries(self, i: IntArray, j: IntArray) -> FloatArray:
        """Entries of these matrices, 0 between blocks."""
        k = self.block_of[i]
        at = self._flat_starts[k] + (i - self.starts[k]) * self.sizes[k] + j - self.starts[k]
        same = k == self.block_of[j]
        return np.where(same, self._flat[np.where(same, at, 0)], 0.0)

    def possible(self) -> IntArray:
        """The exchanges of the present selection: the kept pair, then the pruned pair; int64 (e, 4)."""
        out = self.pruned[self._exchanges]  # the upper row, then the lower one
        fits = (out[:, 0] == out[:, 3]) & (out[:, 1] == out[:, 2]) & (out[:, 0] != out[:, 1])
        four, first_pruned = self._exchanges[fits], out[fits, 0]
        return np.asarray(np.where(first_pruned[:, None], four[:, [1, 2, 0, 3]], four[:, [0, 3, 1, 2]]))

    @abc.abstractmethod
    def loss(self, pruned: BoolArray) -> float:
        """The loss of a selection, by the evaluator."""

    @abc.abstractmethod
    def start_from(self, pruned: BoolArray) -> None:
        """Take a selection."""

    @abc.abstractmethod
    def prices(self, four: IntArray) -> FloatArray:
        """The change of the doubled loss by each of some exchanges, float64 (e,); O(e)."""

    @abc.abstractmethod
    def make(self, four: IntArray) -> None:
        """Let four weights change sides."""


def is_searchable(instance: Instance) -> bool:
    """Whether the matrices of all blocks and the list of exchanges fit into memory; the log says if not."""
    entries = float((instance.curvature.block_sizes.astype(np.float64) ** 2).sum())
    shapes = [part.index.shape for part in instance.budget.tiles]
    exchanges = float(sum(T * a * (a - 1) // 2 * b * (b - 1) // 2 for T, a, b in shapes))
    largest = int(instance.curvature.block_sizes.max())
    if entries <= _MOST_ENTRIES and exchanges <= _MOST_EXCHANGES and largest <= _LARGEST_BLOCK:
        return True
    logger.warning(
        "the instance is too large for exchanges with cross groups: the best of several scores is the answer"
    )
    return False


def report_starts(
    instance: Instance,
    context: Context,
    loss: Callable[[Instance, BoolArray], float],
    score: Callable[[], FloatArray],
) -> bool:
    """Report magnitude, a warm start, and the cheapest selection by a score, float64 (n,); False if stopped."""
    monitor, budget = context.monitor, instance.budget

    def report(pruned: BoolArray) -> None:
        monitor.report(loss(instance, pruned), pruned)

    report(budget.cheapest(np.abs(instance.weights), instance.fixed))
    if context.warm_start is not None:
        report(context.warm_start)
    if instance.linear is None and instance.curvature.is_convex:
        monitor.report_bound(0.0)
    if not monitor.should_stop():
        report(budget.cheapest(score(), instance.fixed))
    return not monitor.should_stop()


def search(moves: TileMoves, context: Context, bound: Callable[[], object]) -> None:
    """Descent from the incumbent, `bound`, then descents from perturbations of the incumbent.

    An iteration is an exchange. Exchanges in different blocks do not interact, and are made together.
    """
    monitor, rng = context.monitor, context.rng()
    assert monitor.pruned is not None
    moves.start_from(monitor.pruned)
    _descend(moves, monitor)
    if not monitor.should_stop():
        bound()
    kicks = _KICKS
    while kicks and not monitor.closed and not monitor.should_stop() and moves.possible().size:
        kicks -= not monitor.stop.limits_work
        moves.start_from(monitor.pruned)
        for _ in range(_KICK):
            if monitor.should_stop():
                break
            moves.make(rng.choice(moves.possible()))
            monitor.advance()
        _descend(moves, monitor)


def seconds_for_bound(monitor: Monitor) -> float:
    """How long a bound may take after the first descent."""
    return min(_BOUND_SECONDS, _BOUND_SHARE * monitor.remaining)


def _descend(moves: TileMoves, monitor: Monitor) -> None:
    """Make the best exchanges as long as they gain."""
    while not monitor.should_stop():
        loss = moves.loss(moves.pruned)
        monitor.report(loss, moves.pruned.copy())
        four = moves.possible()
        prices = moves.prices(four)
        gaining = np.flatnonzero(prices < -2 * _GAIN * abs(loss))
        if not gaining.size:
            return
        taken = np.zeros(moves.sizes.size, dtype=bool)
        for e in gaining[np.argsort(prices[gaining], kind="stable")[:_MOST_TOGETHER]].tolist():
            blocks = moves.block_of[four[e]]
            if taken[blocks].any():
                continue
            if monitor.should_stop():
                break
            taken[blocks] = True
            moves.make(four[e])
            monitor.advance()
    monitor.report(moves.loss(moves.pruned), moves.pruned.copy())


def _exchanges(instance: Instance) -> IntArray:
    """Two rows and two columns of every tile without fixed weights: (upper left, right, lower left, right)."""
    found = [np.zeros((0, 4), dtype=np.int64)]
    for part in instance.budget.tiles:
        _, a, b = part.index.shape
        pairs = np.triu_indices(a, 1), np.triu_indices(b, 1)
        rows = [np.repeat(row, pairs[1][0].size) for row in pairs[0]]
        columns = [np.tile(column, pairs[0][0].size) for column in pairs[1]]
        corners = [part.index[:, row, column] for row in rows for column in columns]
        found.append(np.stack(corners, axis=2).reshape(-1, 4))
    out = np.concatenate(found)
    if instance.fixed is not None:
        out = out[(instance.fixed[out] == 0).all(axis=1)]
    return out
