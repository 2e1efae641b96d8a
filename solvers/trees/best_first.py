"""Best-first queue of subproblems, each worked on depth-first for a while by one of several threads."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cbs_opt.typing import FloatArray, Int8Array

_FIRST_SLICE = 40
_DIVE = 2.0  # nodes before others have a turn, over those before a shift is tried
_LEAST, _MOST = 0.05, 8.0  # nodes before a shift is tried, over its cost
_SHARE_NODES = 400  # nodes after which a worker shares when others wait

HARD = 50
"""Nodes per variable of the problem after which shifts may be thorough."""

SHIFT_SIZE = 12
"""Open variables from which on another shift is tried."""


class Patience:
    """How long subproblems are worked on between two shifts, in units of what a shift costs.

    Where shifts lift the bound and subproblems stay open, they come soon; where they do not, or what follows them
    is short, late. It depends on bounds and nodes only, not on time, so that a tree of one thread is reproducible.
    """

    def __init__(self) -> None:
        self._factor = 1.0

    def before_shift(self, cost: float) -> int:
        """Nodes after which another shift, which costs as much as so many nodes, is tried."""
        return max(int(self._factor * cost), 1)

    def of_dive(self, cost: float) -> int:
        """Nodes after which a subproblem goes back to the queue."""
        return max(int(_DIVE * self._factor * cost), 1)

    def is_better(self, gain: float, gap: float) -> bool:
        """Whether a shift that closes `gain` of a gap is kept; learns from it."""
        self._factor *= 0.5 if gain > 0.02 * gap else 2.0
        self._factor = min(max(self._factor, _LEAST), _MOST)
        return gain > 0.01 * gap

    def closed(self) -> None:
        """A subproblem was closed soon after its shift, which may have been one too many."""
        self._factor = min(4.0 * self._factor, _MOST)


class Shift(NamedTuple):
    """What the relaxation of a subproblem takes from its quadratic form.

    Attributes
    ----------
    diagonal : float64 (n,)
        Of squares; y_i² = y_i is linear (selection), or the perspective of u_i² (joint).
    first, second : int32 (e,)
        Pairs of variables, each once; none in the joint problem.
    price : float64 (e,)
        The multipliers, > 0, of their products y_i y_j ≥ 0.
    """

    diagonal: FloatArray
    first: NDArray[np.int32] = np.zeros(0, np.int32)
    second: NDArray[np.int32] = np.zeros(0, np.int32)
    price: FloatArray = np.zeros(0)

    def products(self) -> FloatArray:
        """The multipliers of the pairs as a symmetric matrix, float64 (n, n)."""
        n = self.diagonal.size
        N = np.zeros((n, n))
        N[self.first, self.second] = N[self.second, self.first] = self.price
        return N


class Subproblem(NamedTuple):
    """A part of the search space.

    Attributes
    ----------
    bound : float
    fixings : int8 (n,)
        1 and 0 where the weight is decided, −1 where it is open.
    start : float (n,) or None
        Point to start its relaxation from.
    shift : Shift or None
        That its relaxation uses.
    """

    bound: float
    fixings: Int8Array
    start: NDArray[Any] | None
    shift: Shift | None


class Worker(Protocol):
    """A tree that takes a subproblem, works on it in slices, and gives back what is left of it."""

    size: int
    """Open variables of the subproblem."""
    best: FloatArray
    """Value of its best selection, (1,)."""
    selection: Int8Array

    def load(self, subproblem: Subproblem) -> None:
        """Start on a subproblem."""

    def run(self, nodes: int) -> bool:
        """Process a number of nodes; returns whether something is left."""

    def take_nodes(self) -> int:
        """Nodes since the last call."""

    def crowded(self) -> bool:
        """Whether the stack has no room left."""

    def bound(self) -> float:
        """Least bound of its open nodes, infinity when there are none."""

    def export(self) -> list[Subproblem]:
        """The open nodes; the tree is empty afterwards."""

    def shift_cost(self, thorough: bool) -> float:
        """Nodes that take about as long as another shift for the subproblem."""

    def better_relaxation(self, thorough: bool) -> tuple[Shift, FloatArray | None] | None:
        """Another shift for the subproblem, and a point to start its relaxation from."""


class BestFirst:
    """Branch and bound over all subproblems; every decision counts nodes, so that one thread is reproducible.

    Parameters
    ----------
    make_worker : callable
        Gives a worker, from (relative tolerance, absolute tolerance, float64 (1,) with the incumbent's value).
    root : Subproblem
    selection, value
        The incumbent, scaled so that its value is about 1.
    tolerance, rounding : float
        Only selections better by tolerance·|value| + rounding are looked for.
    """

    def __init__(
        self,
        make_worker: Callable[[float, float, FloatArray], Worker],
        root: Subproblem,
        selection: Int8Array,
        value: float,
        tolerance: float,
        rounding: float,
    ) -> None:
        self._make_worker = make_worker
        self.tolerance, self.rounding = tolerance, rounding
        self.selection, self._shared = selection, np.array([value])
        self._lock = threading.Lock()
        self._tick = itertools.count()
        self._heap: list[tuple[float, int, Subproblem]] = []
        self._busy: dict[int, float] = {}
        self._stopping = self._resting = False
        self._threads = 1
        self.nodes = self.shifts = 0
        self._patience = Patience()
        self._push(root)

    def new_worker(self, shared: FloatArray | None = None) -> Worker:
        """A worker that compares with the value in `shared`, float64 (1,); by default with the incumbent's."""
        return self._make_worker(self.tolerance, self.rounding, self._shared if shared is None else shared)

    def best_open(self) -> Subproblem | None:
        """The waiting subproblem of least bound."""
        return self._heap[0][2] if self._heap else None

    def _push(self, sub: Subproblem) -> None:
        heapq.heappush(self._heap, (sub.bound, next(self._tick), sub))

    @property
    def value(self) -> float:
        """The incumbent's value."""
        return float(self._shared[0])

    @property
    def threshold(self) -> float:
        """What no other selection falls below once everything is done."""
        return self.value - self.tolerance * abs(self.value) - self.rounding

    @property
    def open(self) -> int:
        """Subproblems in the queue or at work."""
        return len(self._heap) + len(self._busy)

    def bound(self) -> float:
        """Valid lower bound on every selection's value: the least over the open nodes."""
        with self._lock:
            waiting = [self._heap[0][0]] if self._heap else []
            return min([self.threshold, *self._busy.values(), *waiting])

    def finished(self) -> bool:
        """Whether no subproblem is open."""
        with self._lock:
            return not self._busy and not self._heap

    def incumbent(self) -> tuple[float, Int8Array]:
        """Its value and selection."""
        with self._lock:
            return float(self._shared[0]), self.selection

    def offer(self, selection: Int8Array, value: float) -> None:
        """Take a selection from elsewhere, int8 (n,), as the incumbent if it is better."""
        with self._lock:
            if value < self._shared[0]:
                self._shared[0], self.selection = value, selection.copy()

    @contextmanager
    def one_worker_rests(self) -> Iterator[None]:
        """Leave the core of one of several workers to others inside of this block."""
        self._resting = True
        try:
            yield
        finally:
            self._resting = False

    def run(self, progress: Callable[[], bool], threads: int = 1, slice_nodes: int = 200) -> None:
        """Work until everything is done or `progress`, asked after every slice, says to stop."""
        self._threads, self._stopping, self._slice = threads, False, slice_nodes
        if threads == 1:
            self._work(progress)
            return
        errors: list[BaseException] = []

        def work(may_rest: bool) -> None:
            try:
                while not (self._stopping or self.finished()):
                    if may_rest and self._resting:
                        time.sleep(0.002)
                    else:
                        self._work(lambda: self._stopping or (may_rest and self._resting))
            except BaseException as error:
                errors.append(error)
                self._stopping = True

        pool = [threading.Thread(target=work, args=(k == 0,)) for k in range(threads)]
        try:
            for thread in pool:
                thread.start()
            while any(thread.is_alive() for thread in pool):
                pool[0].join(0.02)
                time.sleep(0.001)
                self._stopping = progress() or self._stopping
        finally:
            self._stopping = True
            for thread in pool:
                thread.join()
        if errors:
            raise errors[0]
        progress()

    def _work(self, pause: Callable[[], bool]) -> None:
        worker = self.new_worker()
        me = id(worker)
        while not pause():
            with self._lock:
                while self._heap and self._heap[0][0] >= self.threshold:
                    heapq.heappop(self._heap)
                sub = heapq.heappop(self._heap)[2] if self._heap else None
                if sub is not None:
                    self._busy[me] = sub.bound
                elif not self._busy:
                    return
            if sub is None:
                time.sleep(0.002)
                continue
            try:
                self._process(worker, sub, me, pause)
            finally:
                with self._lock:
                    for left in worker.export():
                        self._push(left)
                    self.nodes += worker.take_nodes()
                    self._busy.pop(me, None)

    def _merge(self, worker: Worker, me: int) -> None:
        with self._lock:
            if worker.best[0] < self._shared[0]:
                self._shared[0], self.selection = worker.best[0], worker.selection.copy()
            self._busy[me] = max(self._busy[me], min(worker.bound(), self.threshold))
            self.nodes += worker.take_nodes()

    def _process(self, worker: Worker, sub: Subproblem, me: int, pause: Callable[[], bool]) -> None:
        try:
            worker.load(sub)
            self._dive(worker, sub, me, pause)
        except BaseException:
            worker.export()
            with self._lock:
                self._push(sub)  # nothing of it may be lost: the bound stays valid
            raise
        self._merge(worker, me)

    def _dive(self, worker: Worker, sub: Subproblem, me: int, pause: Callable[[], bool]) -> None:
        thorough = self.nodes >= HARD * sub.fixings.size
        cost = worker.shift_cost(thorough)
        tried, done = worker.size < SHIFT_SIZE, 0
        limit = self._patience.of_dive(cost) if tried else self._patience.before_shift(cost)
        while worker.run(nodes := min(limit, self._slice, _FIRST_SLICE if done == 0 else self._slice)):
            done += nodes
            self._merge(worker, me)
            if worker.crowded() or pause():
                return
            if not tried and done >= limit:
                tried, done = True, 0
                sub = self._try_shift(worker, sub, me, thorough)
            elif tried and (
                done >= limit or (done >= _SHARE_NODES and not self._heap and len(self._busy) < self._threads)
            ):
                return
            if tried:
                limit = self._patience.of_dive(cost)
        if tried:
            self._patience.closed()

    def _try_shift(self, worker: Worker, sub: Subproblem, me: int, thorough: bool) -> Subproblem:
        """Another shift where it lifts the subproblem's bound enough; else the old open nodes go on."""
        better = worker.better_relaxation(thorough)
        if better is None:
            return sub
        shift, start = better
        before = worker.bound()
        left = worker.export()
        worker.load(sub._replace(shift=shift, start=sub.start if start is None else start))
        more = worker.run(1)
        self._merge(worker, me)
        if not more or self._patience.is_better(worker.bound() - before, self.threshold - before):
            self.shifts += 1
            return sub
        worker.export()
        # The best of the old open nodes goes on here, the others wait.
        left.sort(key=lambda old: old.bound)
        with self._lock:
            for old in left[1:]:
                self._push(old)
            self._busy[me] = left[0].bound
        worker.load(left[0])
        return left[0]
