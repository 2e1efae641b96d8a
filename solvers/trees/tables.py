"""Bounds of one component for every number of pruned weights: the columns of the dynamic programme."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Protocol

import numpy as np

from cbs_opt.solvers.kernels.stop_flag import NEVER
from cbs_opt.solvers.kernels.subsets import MAX_WEIGHTS, all_subsets
from cbs_opt.solvers.trees.best_first import BestFirst
from cbs_opt.solvers.trees.joint_worker import prepare_joint
from cbs_opt.solvers.trees.outlines import Outline, eliminated, joint_bounds, outline_diagonal, selection_outline
from cbs_opt.solvers.trees.selection_worker import prepare_selection
from cbs_opt.typing import FloatArray, Int8Array, IntArray

_OUTLINES = 8  # intervals between the numbers of pruned weights whose relaxation is solved beforehand


class PreparedTree(Protocol):
    """What `prepare_selection` and `prepare_joint` give."""

    queue: BestFirst

    def selection(self) -> Int8Array:
        """The incumbent."""

    def value(self) -> float:
        """Its value."""

    def bound(self) -> float:
        """Lower bound on every selection's."""


class Table(abc.ABC):
    """Lower and upper bounds of one component for 0 … n pruned, and the selections of the upper ones.

    Attributes
    ----------
    n : int
    lower, upper : float64 (n+1,)
    nodes : int
        Of all searches so far.
    """

    n: int
    lower: FloatArray
    upper: FloatArray
    nodes: int = 0

    @abc.abstractmethod
    def build(self, should_stop: Callable[[], bool]) -> None:
        """Give the first bounds for every number."""

    @abc.abstractmethod
    def pick(self, k: int) -> Int8Array:
        """The selection of `upper[k]`, int8 (n,)."""

    @abc.abstractmethod
    def work(self, k: int, tolerance: float, nodes: int, should_stop: Callable[[], bool]) -> bool:
        """Process nodes of the tree for k pruned, which improves its bounds; whether it is closed."""


class SeparableTable(Table):
    """Of weights that cost `price`, float64 (n,), each by itself: sums of the cheapest."""

    def __init__(self, price: FloatArray) -> None:
        self.price, self.n = price, price.size
        self.order = np.argsort(price, kind="stable")

    def build(self, should_stop: Callable[[], bool]) -> None:
        """Exact at once."""
        self.upper = np.concatenate([[0.0], np.cumsum(self.price[self.order])])
        self.lower = self.upper.copy()

    def pick(self, k: int) -> Int8Array:
        """The k cheapest."""
        out = np.zeros(self.n, np.int8)
        out[self.order[:k]] = 1
        return out

    def work(self, k: int, tolerance: float, nodes: int, should_stop: Callable[[], bool]) -> bool:
        """Nothing is left to do."""
        return True


class TreeTable(Table):
    """Of coupled weights: by enumeration where they are few, else from relaxations and by branch and bound.

    Attributes
    ----------
    picks : dict of int to int8 (n,)

    Parameters
    ----------
    stop : int8 (1,)
        Ends the work of kernels; see `kernels.stop_flag`.
    """

    def __init__(self, n: int, stop: Int8Array) -> None:
        self.n, self._stop = n, stop
        self.picks: dict[int, Int8Array] = {}
        self._searches: dict[int, tuple[float, PreparedTree]] = {}
        self._outlined: set[int] = set()

    @abc.abstractmethod
    def prepare(self, count: int, start: Int8Array | None, tolerance: float) -> PreparedTree:
        """A branch and bound over all selections of so many."""

    @abc.abstractmethod
    def subsets(self) -> tuple[FloatArray, IntArray]:
        """Best values and codes for every number, by enumeration."""

    @abc.abstractmethod
    def outline(self, count: int, upper: float) -> Outline:
        """Bounds for every number from the relaxation with `count` pruned, whose value may be `upper`."""

    @abc.abstractmethod
    def floor(self) -> FloatArray:
        """A cheap lower bound for every number, float64 (n+1,)."""

    @abc.abstractmethod
    def tighten(self, lower: FloatArray) -> FloatArray:
        """What bounds for some numbers tell of others, float64 (n+1,)."""

    def build(self, should_stop: Callable[[], bool]) -> None:
        """Enumerate, or solve the relaxations of a few numbers."""
        if self.n <= MAX_WEIGHTS:
            self.upper, code = self.subsets()
            self.lower = self.upper.copy()
            for k in range(self.n + 1):
                self.picks[k] = ((int(code[k]) >> np.arange(self.n)) & 1).astype(np.int8)
            return
        self.lower, self.upper = self.floor(), np.full(self.n + 1, np.inf)
        for k in dict.fromkeys(np.linspace(0, self.n, _OUTLINES + 1).round().astype(int)[1:-1].tolist()):
            self._outline(k)
            if should_stop():
                break
        for k in (0, self.n):  # a single selection
            self.lower[k] = self.upper[k]

    def _outline(self, k: int) -> None:
        """Bounds for all numbers from the relaxation of one of them."""
        self._outlined.add(k)
        found = self.outline(k, float(self.upper[k]))
        for j in np.flatnonzero(found.upper < self.upper).tolist():
            pick = np.zeros(self.n, np.int8)
            pick[found.order[:j]] = 1
            self.upper[j], self.picks[j] = found.upper[j], pick
        self.lower = np.minimum(self.tighten(np.maximum(self.lower, found.lower)), self.upper)

    def pick(self, k: int) -> Int8Array:
        """As `picks` has it."""
        return self.picks[k]

    def work(self, k: int, tolerance: float, nodes: int, should_stop: Callable[[], bool]) -> bool:
        """Go on with the tree of k pruned."""
        kept = self._searches.get(k)
        if kept is not None and kept[0] == tolerance:
            search = kept[1]
        else:
            if k not in self._outlined and not should_stop():
                self._outline(k)
            search = self.prepare(k, self.picks.get(k), tolerance)
        queue = search.queue
        until = queue.nodes + nodes
        before = queue.nodes
        queue.run(lambda: queue.nodes >= until or should_stop(), 1, min(nodes, 100))
        self.nodes += queue.nodes - before
        value = search.value()
        if value < self.upper[k]:
            self.upper[k], self.picks[k] = value, search.selection()
        self.lower[k] = min(max(self.lower[k], search.bound()), self.upper[k])
        self.lower = np.minimum(self.tighten(self.lower), self.upper)
        if queue.finished():
            self._searches.pop(k, None)
        else:
            self._searches[k] = (tolerance, search)
        return bool(queue.finished())


class SelectionTable(TreeTable):
    """Of ½ yᵀQy + cᵀy; Q float64 (n, n), c float64 (n,)."""

    def __init__(self, Q: FloatArray, c: FloatArray, stop: Int8Array = NEVER) -> None:
        super().__init__(c.size, stop)
        self.Q, self.c = np.ascontiguousarray(Q), np.ascontiguousarray(c)
        self._group = np.zeros(self.n, np.int64)

    def prepare(self, count: int, start: Int8Array | None, tolerance: float) -> PreparedTree:
        """Branch and bound."""
        starts = [] if start is None else [start]
        return prepare_selection(
            self.Q,
            self.c,
            self._group,
            np.array([count]),
            starts,
            tolerance,
            roundings=1,
            should_stop=lambda: bool(self._stop[0]),
            stop=self._stop,
        )

    def subsets(self) -> tuple[FloatArray, IntArray]:
        """By enumeration."""
        best, code = all_subsets(self.Q, self.c, False)
        return best, code

    def outline(self, count: int, upper: float) -> Outline:
        """From the box relaxation."""
        return selection_outline(self.Q, self.c, count, self._stop)

    def floor(self) -> FloatArray:
        """½ yᵀQy ≥ 0: the smallest entries of c."""
        return np.concatenate([[0.0], np.cumsum(np.sort(self.c))])

    def tighten(self, lower: FloatArray) -> FloatArray:
        """Nothing: to prune one more may lower the loss."""
        return lower


class JointTable(TreeTable):
    """Of ½ w_Pᵀ(A_PP)⁻¹w_P; A, H float64 (n, n), inverse to each other, w float64 (n,)."""

    def __init__(self, A: FloatArray, H: FloatArray, w: FloatArray, stop: Int8Array = NEVER) -> None:
        super().__init__(w.size, stop)
        self.A, self.H, self.w = np.ascontiguousarray(A), np.ascontiguousarray(H), np.ascontiguousarray(w)
        self._group = np.zeros(self.n, np.int64)
        self._shared: tuple[FloatArray, tuple[FloatArray, IntArray]] | None = None

    def prepare(self, count: int, start: Int8Array | None, tolerance: float) -> PreparedTree:
        """Branch and bound."""
        starts = [] if start is None else [start]
        return prepare_joint(
            self.A, self.H, self.w, self._group, np.array([self.n - count]), starts, None, tolerance, self._stop
        )

    def subsets(self) -> tuple[FloatArray, IntArray]:
        """By enumeration."""
        s = 1 / np.sqrt(np.diag(self.A))
        best, code = all_subsets(self.A * s[:, None] * s, self.w * s, True)
        return best, code

    def outline(self, count: int, upper: float) -> Outline:
        """From the perspective relaxation; the selections, which do not depend on it, from greedy elimination."""
        if self._shared is None:  # what all numbers share
            self._shared = outline_diagonal(self.A), eliminated(self.A, self.H, self.w)
        diagonal, greedy = self._shared
        return Outline(joint_bounds(self.A, self.H, self.w, diagonal, count, upper, self._stop), *greedy)

    def floor(self) -> FloatArray:
        """The loss is never negative."""
        return np.zeros(self.n + 1)

    def tighten(self, lower: FloatArray) -> FloatArray:
        """To prune one more never lowers the loss after the best update."""
        return np.maximum.accumulate(lower)
