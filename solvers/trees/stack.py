"""The stack of a depth-first tree: what workers of both problems share, and what others may read of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cbs_opt.solvers.kernels import stack_layout as at
from cbs_opt.typing import FloatArray, Int8Array, IntArray


class StackEntry(NamedTuple):
    """A node on the stack, in the order of `kernels.stack_layout`.

    Attributes
    ----------
    level : int
        Compressed level that holds its columns.
    branch : int
        Branching column of that level.
    pending : int
        Children still open; `ROOT` where the node itself is still to be solved.
    value : int
        What the kernel gives the branching column in the next child.
    """

    level: int
    branch: int
    pending: int
    value: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Views of a worker's arrays, not to be written to: they cost nothing, and `run` changes what they show.

    Attributes
    ----------
    state : int64 (5,)
    entries : int64 (N, 4)
        Rows of `StackEntry`.
    bounds : float64 (N,)
        Lower bound of each entry.
    level_starts : int64 (L, G+1)
        Ranges of the groups among the columns of each level.
    index : int64 (L, n)
        What each column of each level stands for; see `variables`.
    best, shared : float64 (1,)
        Values of the tree's best selection and of the incumbent.
    """

    state: IntArray
    entries: IntArray
    bounds: FloatArray
    level_starts: IntArray
    index: IntArray
    best: FloatArray
    shared: FloatArray

    @property
    def top(self) -> int:
        """The entry to work on next, −1 when the stack is empty."""
        return int(self.state[at.LEVEL])

    @property
    def nodes(self) -> int:
        """Nodes since the last `take_nodes`."""
        return int(self.state[at.NODES])

    @property
    def limit(self) -> float:
        """Value below which a selection would be the new incumbent."""
        return min(float(self.best[0]), float(self.shared[0]))

    def entry(self, i: int) -> StackEntry:
        """An entry of the stack."""
        return StackEntry(*self.entries[i].tolist())

    def open_entry(self) -> int:
        """The entry that a worker without tolerances works on next, −1 where there is none."""
        i, limit = self.top, self.limit
        while i >= 0 and (self.entries[i, at.PENDING] == 0 or self.bounds[i] >= limit):
            i -= 1
        return i

    def width(self, level: int) -> int:
        """Columns of a level."""
        return int(self.level_starts[level, -1])

    def variables(self, level: int) -> IntArray:
        """Variable of the worker's problem that each column of a level stands for."""
        return self.index[level, : self.width(level)]


@dataclass(frozen=True, slots=True)
class SelectionSnapshot(Snapshot):
    """Of a tree of the selection problem.

    Attributes
    ----------
    fixed : int8 (L, n)
        Values of the variables that are not among the columns of a level.
    free : float64 (N, n)
        1 for the free columns of an entry, 0 for those that it decides.
    x : float64 (N, n)
        Relaxed point on the free columns.
    value : int8 (N, n)
        Values of the decided columns.
    """

    fixed: Int8Array
    free: FloatArray
    x: FloatArray
    value: Int8Array

    def decisions(self, i: int, level: int) -> Int8Array:
        """Values of all variables at entry i, int8 (n,), −1 where they are open; `level` holds its columns."""
        y: Int8Array = self.fixed[level].copy()
        m = self.width(level)
        y[self.variables(level)] = np.where(self.free[i, :m] > 0, -1, self.value[i, :m])
        return y

    def point(self, i: int, level: int) -> FloatArray:
        """Relaxed point over all variables at entry i, float64 (n,); `level` holds its columns."""
        x: FloatArray = self.fixed[level].astype(np.float64)
        m = self.width(level)
        x[self.variables(level)] = np.where(self.free[i, :m] > 0, self.x[i, :m], self.value[i, :m])
        return x


@dataclass(frozen=True, slots=True)
class JointSnapshot(Snapshot):
    """Of a tree of the joint problem.

    Attributes
    ----------
    open : int64 (m,)
        Variables of the root, which has one column for each.
    diagonal : float64 (m,)
        Diagonal of the root's relaxation.
    kept : int8 (N, n)
        1 for the columns that an entry keeps, 0 for the open ones; pruned columns leave the levels.
    u : float64 (n + 2,)
        Relaxed point of the last node; see `relaxed_point`.
    """

    open: IntArray
    diagonal: FloatArray
    kept: Int8Array
    u: FloatArray

    def variables(self, level: int) -> IntArray:
        """Variable of the worker's problem that each column of a level stands for."""
        return self.open[self.index[level, : self.width(level)]]

    def relaxed_point(self) -> tuple[IntArray, FloatArray] | None:
        """Variables that the last node did not prune, int64 (c,), and their relaxed weights; None without one."""
        level = int(self.state[at.POINT])
        if level < 0:
            return None
        variables = self.variables(level)
        return variables, self.u[: variables.size]


class TreeWorker:
    """The bookkeeping of a worker; see `best_first.Worker`."""

    def __init__(self, n: int, shared: FloatArray) -> None:
        self.best, self.selection = np.array([np.inf]), np.zeros(n, np.int8)
        self.size = n
        self._shared = shared
        self._state = np.zeros(5, np.int64)
        self._entries, self._bounds = np.zeros((n + 2, 4), np.int64), np.zeros(n + 2)
        self._clear()

    def _clear(self) -> None:
        self._state[at.LEVEL] = -1

    def _push_root(self, bound: float) -> None:
        self._bounds[0] = bound
        self._entries[0] = StackEntry(level=0, branch=0, pending=at.ROOT, value=0)
        self._state[at.LEVEL] = 0

    def _open_entries(self) -> list[tuple[int, StackEntry]]:
        """The entries with open children, from the root on."""
        count = int(self._state[at.LEVEL]) + 1
        entries = [StackEntry(*row) for row in self._entries[:count].tolist()]
        return [(i, entry) for i, entry in enumerate(entries) if entry.pending]

    def take_nodes(self) -> int:
        """Nodes since the last call."""
        count = int(self._state[at.NODES])
        self._state[at.NODES] = 0
        return count

    def bound(self) -> float:
        """Least bound of the open nodes, infinity when there are none."""
        count = int(self._state[at.LEVEL]) + 1
        is_open = self._entries[:count, at.PENDING] > 0
        return float(self._bounds[:count][is_open].min()) if is_open.any() else np.inf
