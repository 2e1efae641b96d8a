"""Traverses a tree of a certificate: the least bound over its leaves and over its decisions by bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cbs_opt.certificate_bounds import Frame, Part, Products, States
from cbs_opt.certificate_counting import MOST_OF_CERTIFICATE, selections
from cbs_opt.errors import SolutionError
from cbs_opt.files.certificate_file import (
    COUNT,
    FRAME,
    INHERIT,
    LEAF,
    NOTHING,
    POINT,
    SINGLE,
    VALUE,
    Certificate,
)
from cbs_opt.typing import BoolArray, FloatArray, IntArray

_LARGEST = 1e200  # of constants and prices: no sum of them overflows
_CHUNK = 1 << 19  # entries of the points that are evaluated at a time


def least(
    base: FloatArray, price: FloatArray, states: States, group: IntArray, left: IntArray
) -> tuple[FloatArray, list[FloatArray]]:
    """The least of base + Σ price over the pruned weights, float64 (B,), and the sorted prices of each group.

    Parameters
    ----------
    base, price : float64 (B,), (B, m)
    states : int8 (B, m)
    group, left : int64 (m,), (G,)
        Weights to prune in each group, those that the states prune included.

    Notes
    -----
    Infinite where the budgets cannot be met. O(B m log m).
    """
    total = base + np.where(states == 1, price, 0.0).sum(1)
    ordered = []
    rows = np.arange(len(base))
    for a in range(left.size):
        at = np.flatnonzero(group == a)
        part = states[:, at]
        keys = np.sort(np.where(part < 0, price[:, at], np.inf), axis=1)
        ordered.append(keys)
        need = left[a] - (part == 1).sum(1)
        possible = (need >= 0) & (need <= (part < 0).sum(1))
        sums = np.concatenate(
            [np.zeros((len(base), 1)), np.cumsum(np.where(np.isinf(keys), 0.0, keys), axis=1)], 1
        )
        total = np.where(possible, total + sums[rows, np.where(possible, need, 0)], np.inf)
    return total, ordered


def forced(
    total: float, price: FloatArray, state: States, keys: FloatArray, need: int, i: int, pruned: bool
) -> float:
    """`least` of one state where weight i must be pruned, or kept; keys: the sorted prices of its group."""
    count = int(np.isfinite(keys).sum())
    if pruned:
        return np.inf if need <= 0 else total + max(float(price[i] - keys[need - 1]), 0.0)
    return np.inf if need >= count else total + max(float(keys[need] - price[i]), 0.0)


def counts(state: States, is_open: BoolArray, group: IntArray, left: IntArray) -> tuple[IntArray, IntArray]:
    """Open weights of each group, and how many of them are to be pruned, int64 (G,) each."""
    free = np.bincount(group[is_open & (state < 0)], minlength=left.size)
    return free, left - np.bincount(group[is_open & (state == 1)], minlength=left.size)


def settled(state: States, is_open: BoolArray, group: IntArray, left: IntArray) -> States:
    """The state with the groups decided that leave no choice."""
    free, need = counts(state, is_open, group, left)
    out = state.copy()
    undecided = is_open & (state < 0)
    out[undecided & (need == 0)[group]] = 0
    out[undecided & ((need == free) & (need > 0))[group]] = 1
    return out


_SOURCES = {
    "fixing": "fixings",
    "diagonal": "diagonals",
    "frame": "product_counts",
    "product": "products",
    "product_price": "product_prices",
    "number": "numbers",
}


@dataclass
class Streams:
    """What the nodes read from a certificate, in their order."""

    certificate: Certificate
    bits: NDArray[np.uint8] = field(init=False)
    node: int = 0
    fixing: int = 0
    diagonal: int = 0
    frame: int = 0
    product: int = 0
    product_price: int = 0
    code: int = 0
    number: int = 0
    counted: int = 0  # selections of counted leaves

    def __post_init__(self) -> None:
        self.bits = np.unpackbits(self.certificate.codes)

    def take(self, what: str, count: int) -> NDArray[np.generic]:
        """The next entries of a stream; raises `SolutionError` where it is too short."""
        source = _SOURCES.get(what)
        array = self.bits if source is None else getattr(self.certificate, source)
        start = getattr(self, what)
        if count < 0 or start + count > array.size:
            raise SolutionError(f"`{source or 'codes'}` ends too early")
        setattr(self, what, start + count)
        taken: NDArray[np.generic] = array[start : start + count]
        return taken

    def finished(self) -> bool:
        """Whether everything was read, but for the last bits of a byte."""
        c = self.certificate
        read = self.node == c.branch.size and 0 <= self.bits.size - self.code < 8
        return read and all(getattr(self, what) == getattr(c, source).size for what, source in _SOURCES.items())


@dataclass
class _Context:
    """The last point above a node."""

    frame: Frame | None
    frame_state: States
    point: FloatArray | None


class TreeCheck:
    """The bound of one tree; `least` is valid once `run` has returned.

    Parameters
    ----------
    part : Part
    left : int64 (G,)
        Weights to prune in each group, over the open weights of the part.
    streams : Streams
    progress : callable, optional
        Called from time to time with the number of nodes checked.
    """

    def __init__(self, part: Part, left: IntArray, streams: Streams, progress: Callable[[int], None]) -> None:
        self.part, self.left, self.streams, self._progress = part, left, streams, progress
        self.bound, self.leaves = np.inf, 0
        self.root: tuple[Frame, FloatArray] | None = None
        self._local = {int(i): k for k, i in enumerate(part.index)}
        self._open = part.state < 0
        # Weights that the part has decided before are not counted.
        self._group = part.group
        self._waiting: list[tuple[Frame, FloatArray, States, list[tuple[int, int]], bool]] = []
        self._size = self._first = 0

    def run(self, nodes: int) -> float:
        """Check the next `nodes` nodes of the streams; the least bound."""
        streams, certificate = self.streams, self.streams.certificate
        if nodes < 1 or streams.node + nodes > certificate.branch.size:
            raise SolutionError("`tree_nodes` does not fit the number of nodes")
        self._first = streams.node
        last = streams.node + nodes
        stack = [(self.part.state.copy(), _Context(None, self.part.state, None))]
        while stack:
            if streams.node >= last:
                raise SolutionError("a tree ends before all its branches do")
            state, context = stack.pop()
            if self.part.needs_diagonal:
                state = settled(state, self._open, self._group, self.left)
            self._node(streams.node, state, context, stack)
            streams.node += 1
            if streams.node % 1000 == 0:
                self._progress(streams.node)
        if streams.node != last:
            raise SolutionError("a tree has nodes that are not connected")
        self._evaluate()
        return float(self.bound)

    def _node(self, k: int, state: States, context: _Context, stack: list[tuple[States, _Context]]) -> None:
        certificate, part = self.streams.certificate, self.part
        how, branch = int(certificate.how[k]), int(certificate.branch[k])
        if how & FRAME:
            diagonal = np.asarray(self.streams.take("diagonal", int((state < 0).sum())), np.float64)
            if not np.isfinite(diagonal).all():
                raise SolutionError("`diagonals` has NaN or infinite entries")
            context = _Context(part.frame(state, diagonal, self.left, self._products(state)), state.copy(), None)
        how &= ~FRAME
        if how not in (NOTHING, POINT, INHERIT, VALUE, COUNT):
            raise SolutionError(f"`how` must be one of 0 … 4 and {FRAME} … {FRAME + 4}, got {how}")
        if how == POINT:
            if context.frame is None:
                context = _Context(part.frame(part.state, None, self.left), part.state, None)
            point = self._point(state, context.frame_state)
            context = _Context(context.frame, context.frame_state, point)
            # The root also bounds other numbers of pruned weights, unless its diagonal holds for one number only
            # or it has weights that are decided by one number.
            plain = part.needs_diagonal or not int(certificate.how[k]) & FRAME
            same = np.array_equal(context.frame_state, part.state)
            if k == self._first and plain and same and context.frame is not None:
                self.root = context.frame, point
        fixings = self._fixings(state, int(certificate.fixed_counts[k]))
        closed = branch == LEAF
        if fixings or closed:
            self._bound(how, state, context, fixings, closed)
        for i, value in fixings:
            state[i] = value
        if closed:
            self.leaves += 1
        elif branch == SINGLE:
            stack.append((state, context))
        else:
            i = self._weight(branch, state)
            pruned = state.copy()
            state[i], pruned[i] = 0, 1
            stack += [(pruned, context), (state, context)]

    def _products(self, state: States) -> Products | None:
        """The pairs of a new frame, as weights of the part, with their multipliers; None where there are none."""
        count = int(self.streams.take("frame", 1)[0])
        pairs = self.streams.take("product", 2 * count).reshape(-1, 2).tolist()
        price = np.asarray(self.streams.take("product_price", count), np.float64)
        if not count:
            return None
        first, second = (np.array([self._weight(pair[k], state) for pair in pairs]) for k in (0, 1))
        if len({frozenset(pair) for pair in pairs}) != count or (first == second).any():
            raise SolutionError("`products` must be pairs of two weights, each pair once")
        if not (np.isfinite(price) & (price > 0)).all():
            raise SolutionError("`product_prices` must be positive and finite")
        return first, second, price

    def _weight(self, index: int, state: States) -> int:
        i = self._local.get(index)
        if i is None or state[i] >= 0:
            raise SolutionError(f"weight {index} is decided but not open at this node")
        return i

    def _fixings(self, state: States, count: int) -> list[tuple[int, int]]:
        found = [(self._weight(int(c) // 2, state), int(c) % 2) for c in self.streams.take("fixing", count)]
        if len({i for i, _ in found}) != len(found):
            raise SolutionError("a node decides one weight twice")
        return found

    def _point(self, state: States, frame_state: States) -> FloatArray:
        """The point over all weights of the part."""
        streams, part = self.streams, self.part
        at = np.flatnonzero(part.undecided(state, frame_state))
        point = np.maximum(state, 0).astype(np.float64)
        number = np.asarray(streams.take("code", at.size)) > 0
        if part.needs_diagonal:
            point[:] = 0.0
        else:
            point[at] = np.asarray(streams.take("code", at.size), np.float64)
        point[at[number]] = streams.take("number", int(number.sum()))
        if not np.isfinite(point).all():
            raise SolutionError("`numbers` has NaN or infinite entries")
        return point

    def _bound(
        self, how: int, state: States, context: _Context, fixings: list[tuple[int, int]], closed: bool
    ) -> None:
        """Queue the bound of a leaf, and the bounds of the selections that a node excludes by deciding weights."""
        if closed and not self._possible(state):
            if fixings:
                raise SolutionError("a node without a selection decides weights")
            return
        if how in (POINT, INHERIT) and context.frame is not None and context.point is not None:
            self._waiting.append((context.frame, context.point, state.copy(), fixings, closed))
            self._size += state.size
            if self._size > _CHUNK:
                self._evaluate()
            return
        forced_state = settled(state, self._open, self._group, self.left)
        if how == COUNT:
            if fixings or not closed:
                raise SolutionError("only a leaf that decides nothing can be counted")
            self.bound = min(self.bound, self._count(forced_state))
            return
        if how != VALUE:
            self.bound = -np.inf
            return
        if fixings:
            if any(value == 1 for _, value in fixings):
                raise SolutionError("a node prunes a weight without a point that justifies it")
            leaps = self.part.leaps(forced_state)
            self.bound = min(self.bound, *(float(leaps[i]) for i, _ in fixings if forced_state[i] < 0), np.inf)
            if any(forced_state[i] == 1 for i, _ in fixings):  # the budget prunes what the node keeps
                self.bound = min(self.bound, self.part.value(forced_state))
        if closed:
            self.bound = min(self.bound, self.part.value(forced_state))

    def _count(self, state: States) -> float:
        """The least loss of the selections that a leaf leaves, in one group."""
        free, need = counts(state, self._open, self._group, self.left)
        undecided = np.flatnonzero(free)
        if undecided.size != 1:
            raise SolutionError("a counted leaf must leave a choice in exactly one group")
        count, left = int(free[undecided[0]]), int(need[undecided[0]])
        self.streams.counted += selections(count, left)
        if self.streams.counted > MOST_OF_CERTIFICATE:
            raise SolutionError(f"more than {MOST_OF_CERTIFICATE} selections are to be counted")
        return self.part.counted(state, count - left)

    def _possible(self, state: States) -> bool:
        free, need = counts(state, self._open, self._group, self.left)
        return bool(((need >= 0) & (need <= free)).all())

    def _evaluate(self) -> None:
        """Evaluate the queued bounds, frame by frame."""
        by_frame: dict[int, list[int]] = {}
        for k, entry in enumerate(self._waiting):
            by_frame.setdefault(id(entry[0]), []).append(k)
        for rows in by_frame.values():
            points = np.array([self._waiting[k][1] for k in rows])
            states = np.array([self._waiting[k][2] for k in rows])
            self.bound = min(self.bound, self._least_of(rows, points, states))
        self._waiting.clear()
        self._size = 0

    def _least_of(self, rows: list[int], points: FloatArray, states: States) -> float:
        frame = self._waiting[rows[0]][0]
        base, price = frame.prices(points, states)
        if not (np.abs(base).max() < _LARGEST and np.abs(price).max() < _LARGEST):
            return -np.inf  # NaN included
        at = np.flatnonzero(self._open)
        inner, price = states[:, at], price[:, at]
        place = {int(i): k for k, i in enumerate(at)}
        total, ordered = least(base, price, inner, self.part.group[at], self.left)
        out = np.inf
        for r, k in enumerate(rows):
            _, _, state, fixings, closed = self._waiting[k]
            if fixings:
                _, need = counts(state, self._open, self._group, self.left)
            for i, value in fixings:
                a, j = int(self._group[i]), place[i]
                keys = ordered[a][r]
                other = forced(float(total[r]), price[r], inner[r], keys, int(need[a]), j, value == 0)
                out = min(out, other)
            if closed:
                out = min(out, float(total[r]))
        return out


def table_of(base: float, price: FloatArray, part: Part) -> FloatArray:
    """Lower bounds for every number pruned by one set of prices, float64 (k+1,), for one group."""
    sums = np.cumsum(np.sort(price[part.state < 0]))
    return np.concatenate([[0.0], sums]) + base


def floor_of(part: Part, left: IntArray) -> float:
    """The cheap bound of a part for given budgets of its groups."""
    base, price = part.floor()
    is_open: BoolArray = part.state < 0
    total, _ = least(np.array([base]), price[None, is_open], part.state[None, is_open], part.group[is_open], left)
    return float(total[0])


def root_table(root: tuple[Frame, FloatArray] | None, part: Part) -> FloatArray:
    """Bounds for every number pruned, from the cheap bound and the point of a root, float64 (k+1,)."""
    table = table_of(*part.floor(), part)
    if root is not None:
        base, price = root[0].prices(root[1][None], part.state[None])
        if not (np.abs(base).max() < _LARGEST and np.abs(price).max() < _LARGEST):
            return table
        table = np.maximum(table, table_of(float(base[0]), price[0], part))
    return table
