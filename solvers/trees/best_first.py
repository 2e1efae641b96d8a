"""Best-first queue of subproblems, each worked on depth-first for a while by one of several threads."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cbs_opt.typing import FloatArray, Int8Array

_FIRST_SLICE = 40
_SHARE_NODES = 400  # nodes after which a worker shares when others wait

DIAGONAL_SIZE = 12
"""Open variables from which on another diagonal is tried."""


class Patience:
    """How long subproblems are worked on between two diagonals.

    The selection problem's diagonals cost many of its nodes: one is tried where a subproblem turns out large, and
    kept if it closes 15 % of the gap. Those of the joint problem are `cheap`: they come the sooner the more they
    have gained. All depends on bounds only, not on time, so that a tree of one thread is reproducible.
    """

    def __init__(self, cheap: bool) -> None:
        self._cheap = cheap
        self._before, self._dive = (2.0, 8.0) if cheap else (2.0, 50.0)  # nodes per variable
        self._factor = 1.0

    def before_diagonal(self, size: int) -> float:
        """Nodes after which another diagonal is tried."""
        return self._factor * self._before * size

    def of_dive(self, size: int) -> float:
        """Nodes after which a subproblem goes back to the queue."""
        return self._factor * self._dive * size

    def is_better(self, gain: float, gap: float) -> bool:
        """Whether a diagonal that closes `gain` of a gap is kept; learns from it."""
        if not self._cheap:
            return gain > 0.15 * gap
        self._factor = max(self._factor / 1.5, 0.25) if gain > 0.05 * gap else min(2.0 * self._factor, 6.25)
        return gain > 0.01 * gap


class Subproblem(NamedTuple):
    """A part of the search space.

    Attributes
    ----------
    bound : float
    fixings : int8 (n,)
        1 and 0 where the weight is decided, −1 where it is open.
    start : float (n,) or None
        Point to start its relaxation from.
    diagonal : float64 (n,) or None
        Diagonal that its relaxation uses.
    """

    bound: float
    fixings: Int8Array
    start: NDArray[Any] | None
    diagonal: FloatArray | None


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

    def better_relaxation(self) -> tuple[FloatArray, FloatArray | None] | None:
        """Another diagonal for the subproblem, float64 (n,), and a point to start its relaxation from."""


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
    cheap_diagonals : bool
        See `Patience`.
    """

    def __init__(
        self,
        make_worker: Callable[[float, float, FloatArray], Worker],
        root: Subproblem,
        selection: Int8Array,
        value: float,
        tolerance: float,
        rounding: float,
        cheap_diagonals: bool = False,
    ) -> None:
        self._make_worker = make_worker
        self.tolerance, self.rounding = tolerance, rounding
        self.selection, self._shared = selection, np.array([value])
        self._lock = threading.Lock()
        self._tick = itertools.count()
        self._heap: list[tuple[float, int, Subproblem]] = []
        self._busy: dict[int, float] = {}
        self._stopping = False
        self._threads = 1
        self.nodes = self.diagonals = 0
        self._patience = Patience(cheap_diagonals)
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

    def run(self, progress: Callable[[], bool], threads: int = 1, slice_nodes: int = 200) -> None:
        """Work until everything is done or `progress`, asked after every slice, says to stop."""
        self._threads, self._stopping, self._slice = threads, False, slice_nodes
        if threads == 1:
            self._work(progress)
            return
        errors: list[BaseException] = []

        def work() -> None:
            try:
                self._work(lambda: self._stopping)
            except BaseException as error:
                errors.append(error)
                self._stopping = True

        pool = [threading.Thread(target=work) for _ in range(threads)]
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
        size = worker.size
        tried, done, nodes = size < DIAGONAL_SIZE, 0, min(_FIRST_SLICE, self._slice)
        while worker.run(nodes):
            done += nodes
            self._merge(worker, me)
            if worker.crowded() or pause():
                return
            if not tried:
                if done >= self._patience.before_diagonal(size):
                    tried, done = True, 0
                    sub = self._try_diagonal(worker, sub, me)
                    size = worker.size
            elif done >= self._patience.of_dive(size) or (
                done >= _SHARE_NODES and not self._heap and len(self._busy) < self._threads
            ):
                return
            nodes = self._slice

    def _try_diagonal(self, worker: Worker, sub: Subproblem, me: int) -> Subproblem:
        """Another diagonal where it lifts the subproblem's bound enough; else the old open nodes go on."""
        better = worker.better_relaxation()
        if better is None:
            return sub
        diagonal, start = better
        before = worker.bound()
        left = worker.export()
        worker.load(sub._replace(diagonal=diagonal, start=sub.start if start is None else start))
        more = worker.run(1)
        self._merge(worker, me)
        if not more or self._patience.is_better(worker.bound() - before, self.threshold - before):
            self.diagonals += 1
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
