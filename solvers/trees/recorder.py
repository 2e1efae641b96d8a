"""Runs a tree once more with a fixed threshold and notes what closes every node, for a certificate.

The kernels work node by node here, and what they leave behind in their arrays is read after each: the normal run
knows nothing of it. The notes only direct the check; whether they prove anything is recomputed there.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from cbs_opt.certificate_bounds import Frame, Part, States
from cbs_opt.certificate_tree import counts, forced, least, settled
from cbs_opt.files.certificate_file import NOTHING, POINT, VALUE
from cbs_opt.solvers.trees import joint_tree
from cbs_opt.solvers.trees import selection_tree as tree
from cbs_opt.solvers.trees.best_first import _DIVE_NODES, _SHIFT_NODES, _WORTH, Subproblem, Worker
from cbs_opt.solvers.trees.joint_worker import JointWorker, condition
from cbs_opt.solvers.trees.recorded_nodes import Node
from cbs_opt.solvers.trees.selection_worker import SelectionWorker
from cbs_opt.typing import FloatArray, IntArray


class Recorder:
    """Builds the tree of one component.

    Parameters
    ----------
    part : Part
        The component as the check sees it.
    left : int64 (G,)
        Weights to prune in each group of the part.
    worker : SelectionWorker or JointWorker
        With the threshold as its incumbent's value and no tolerance.
    threshold : float
        The same in units of the part.
    place : int64 (n,)
        Position in the part of each variable of the worker's task.
    unit, stiffness : float64 (n,)
        Factors that bring points and diagonals to the units of the part.
    """

    pruned_value = 1  # what the kernel calls a pruned weight

    def __init__(
        self,
        part: Part,
        left: IntArray,
        worker: Any,
        threshold: float,
        place: IntArray,
        unit: FloatArray,
        stiffness: FloatArray,
    ) -> None:
        self.part, self.left, self.worker, self.threshold = part, left, worker, threshold
        self.place, self.unit, self.stiffness = place, unit, stiffness
        self.nodes = 0
        self.cut = False
        self.root_point: tuple[Frame, FloatArray] | None = None
        self.root = Node()
        self._levels: list[tuple[Node, States] | None] = [None] * (place.size + 3)
        self._open = part.state < 0
        self._top: tuple[Node, States] = (self.root, part.state.copy())

    def run(self, most: int, should_stop: Callable[[], bool]) -> Node:
        """Record up to about `most` nodes; what is open then stays with the bound of the last point above it."""
        tick = itertools.count()
        whole = Subproblem(-np.inf, np.full(self.place.size, -1, np.int8), None, None)
        heap = [(-np.inf, next(tick), whole, self.root, self.part.state.copy())]
        while heap:
            if self.nodes and (self.nodes >= most or should_stop()):
                self.cut = True
                break
            _, _, sub, node, state = heapq.heappop(heap)
            for bound, left, child, at in self._dive(sub, node, state, most, should_stop):
                heapq.heappush(heap, (bound, next(tick), left, child, at))
        return self.root

    def _dive(
        self, sub: Subproblem, node: Node, state: States, most: int, should_stop: Callable[[], bool]
    ) -> list[tuple[float, Subproblem, Node, States]]:
        """Work on a subproblem for a while; its open nodes."""
        worker: Worker = self.worker
        if not self._load(sub, node, state):
            return []
        size, done, out = worker.size, 0, []
        tried = size < 12
        while self._step():
            done += 1
            if not tried and done >= _SHIFT_NODES * size:
                tried, done = True, 0
                out += self._try_diagonal(sub, node, state)
            elif worker.crowded() or done >= _DIVE_NODES * size or self.nodes >= most or should_stop():
                break
        return out + self._export()

    def _try_diagonal(
        self, sub: Subproblem, node: Node, state: States
    ) -> list[tuple[float, Subproblem, Node, States]]:
        """Start again with another diagonal where it closes enough of the gap; else the open nodes, but one."""
        worker: Worker = self.worker
        diagonal = worker.better_diagonal()
        if diagonal is None:
            return []
        before, left = worker.bound(), self._export()
        trial = Node()
        if self._load(sub._replace(diagonal=diagonal), trial, state):
            more = self._step()
            if more and worker.bound() - before <= _WORTH * (self._limit() - before):
                worker.export()
                left.sort(key=lambda old: old[0])
                self._load(*left[0][1:])
                return left[1:]
        node.become(trial)
        if node is self.root:
            self.root_point = None
        if self._levels[0] is not None and self._levels[0][0] is trial:
            self._levels[0] = (node, self._levels[0][1])
        if self._top[0] is trial:
            self._top = (node, self._top[1])
        return []

    def _limit(self) -> float:
        return min(float(self.worker.best[0]), float(self.worker._shared[0]))

    def _step(self) -> bool:
        """Let the kernel work on one node and note it; whether something is left."""
        worker = self.worker
        level = int(worker._state[tree.LEVEL])
        limit = self._limit()
        while level >= 0 and (worker._frames[level, tree.PENDING] == 0 or worker._bounds[level] >= limit):
            level -= 1
        if level < 0:
            return bool(worker.run(1))
        _, q, branch, pending, value = (level, *worker._frames[level].tolist())
        before = int(worker._state[tree.NODES])
        is_root = pending == tree.ROOT
        at = level if is_root else level + 1
        if is_root:
            node, state = self._top
        else:
            found = self._levels[level]
            assert found is not None
            y = value if self.pruned_value == 1 else 1 - value
            node, state = found[0].children[y], found[1].copy()
            state[self.place[self._variable(q, branch)]] = y
        more = bool(worker.run(1))
        if int(worker._state[tree.NODES]) == before:
            return more
        self.nodes += 1
        pushed = int(worker._state[tree.LEVEL]) == at
        state = self._note(node, state, at, q, pushed)
        if pushed:
            q, branch = worker._frames[at, tree.QLEVEL], worker._frames[at, tree.BRANCH]
            node.branch = int(self.place[self._variable(int(q), int(branch))])
            node.children = [Node(), Node()]
            self._levels[at] = (node, state)
        return more

    def _export(self) -> list[tuple[float, Subproblem, Node, States]]:
        """The open nodes of the worker with their places in the tree."""
        worker, places = self.worker, []
        for level in range(int(worker._state[tree.LEVEL]) + 1):
            pending, q, branch, value = (
                int(worker._frames[level, k]) for k in (tree.PENDING, tree.QLEVEL, tree.BRANCH, tree.VALUE)
            )
            if not pending:
                continue
            if pending == tree.ROOT:
                places.append(self._top)
                continue
            found = self._levels[level]
            assert found is not None
            node, state = found[0], found[1].copy()
            if pending == 1:
                y = value if self.pruned_value == 1 else 1 - value
                state[self.place[self._variable(q, branch)]] = y
                places.append((node.children[y], state))
            else:
                places.append((node.only_child(), state))
        subs = worker.export()
        return [(sub.bound, sub, *place) for sub, place in zip(subs, places, strict=True)]

    def _counts(self, state: States) -> tuple[IntArray, IntArray]:
        return counts(state, self._open, self.part.group, self.left)

    def _settled(self, state: States) -> States:
        return settled(state, self._open, self.part.group, self.left)

    # What the two problems do differently ------------------------------------------------------------------

    def _variable(self, q: int, branch: int) -> int:
        """A branching column as a variable of the task."""
        raise NotImplementedError

    def _load(self, sub: Subproblem, node: Node, state: States) -> bool:
        """Load a subproblem; whether there is a root to work on."""
        raise NotImplementedError

    def _note(self, node: Node, state: States, at: int, q: int, pushed: bool) -> States:
        """Note how the kernel has dealt with a node; the state of what hangs below."""
        raise NotImplementedError


class SelectionRecorder(Recorder):
    """Of the selection problem."""

    worker: SelectionWorker

    def _variable(self, q: int, branch: int) -> int:
        return int(self.worker._levels[2][q, branch])

    def _load(self, sub: Subproblem, node: Node, state: States) -> bool:
        self.worker.load(sub)
        # Below a diagonal its part of the tree goes on with it; only a new one is noted.
        if sub.diagonal is not None and self._known is not sub.diagonal:
            full = np.zeros(self.part.index.size)
            full[self.place] = sub.diagonal * self.stiffness
            node.diagonal = full[state < 0]
        self._top = (node, state)
        return True

    _known: FloatArray | None = None

    def _dive(
        self, sub: Subproblem, node: Node, state: States, most: int, should_stop: Callable[[], bool]
    ) -> list[tuple[float, Subproblem, Node, States]]:
        self._known = sub.diagonal
        return super()._dive(sub, node, state, most, should_stop)

    def _note(self, node: Node, state: States, at: int, q: int, pushed: bool) -> States:
        worker = self.worker
        if pushed:
            q = int(worker._frames[at, tree.QLEVEL])
        _, starts, index = worker._levels
        m = int(starts[q, -1])
        columns, free = index[q, :m], worker._U[at, :m] > 0
        y = worker._level_data[3][q].copy()
        x = y.astype(np.float64)
        y[columns] = np.where(free, -1, worker._V[at, :m])
        x[columns] = np.where(free, worker._X[at, :m], worker._V[at, :m])
        after, point = state.copy(), np.zeros(state.size)
        after[self.place], point[self.place] = y, x
        decided = np.flatnonzero((state < 0) & (after >= 0))
        free_count, need = self._counts(state)
        if ((need < 0) | (need > free_count)).any():
            node.how = NOTHING
        elif not pushed and not decided.size and ((need == 0) | (need == free_count)).all():
            self._put_unique(node, state)
        else:
            self._put(node, state, point)
            if node is self.root and node.diagonal is None:
                self.root_point = self.part.frame(self.part.state, None, self.left), point
            node.fixings = [(int(i), int(after[i])) for i in decided]
            if not pushed and decided.size:
                free_count, need = self._counts(after)
                child = node.only_child()
                if ((need < 0) | (need > free_count)).any():
                    child.how = NOTHING
                else:
                    self._put_unique(child, after)
        return after

    def _put_unique(self, node: Node, state: States) -> None:
        """The only selection that is left, as a point."""
        free, need = self._counts(state)
        all_of = (need == free) & (free > 0)
        self._put(node, state, np.where(state < 0, all_of[self.part.group], state).astype(np.float64))

    def _put(self, node: Node, state: States, point: FloatArray) -> None:
        values = point[state < 0]
        number = (values != 0) & (values != 1)
        node.how = POINT
        node.codes, node.numbers = np.concatenate([number, values == 1]), values[number]


class JointRecorder(Recorder):
    """Of the joint problem; its kernel calls a kept weight 1."""

    pruned_value = 0
    worker: JointWorker

    def _variable(self, q: int, branch: int) -> int:
        return int(self.worker._root[0][self.worker._levels[2][q, branch]])

    def _load(self, sub: Subproblem, node: Node, state: States) -> bool:
        worker, task = self.worker, self.worker.task
        open_, A, v, extra = condition(task.A, task.w, sub.fixings)
        limit = float(worker._shared[0])
        worker.load(sub)
        state = self._settled(state)
        if extra < limit:
            leaps = self.place[open_[extra + 0.5 * v**2 / np.diag(A) >= limit]]
            leaps = leaps[state[leaps] < 0]
            if leaps.size:
                node.how, node.fixings = VALUE, [(int(i), 0) for i in leaps]
                state[leaps] = 0
                state = self._settled(state)
                node = node.only_child()
        if worker._state[tree.LEVEL] < 0:
            node.how = VALUE
            return False
        open_ = worker._root[0]
        full = np.zeros(state.size)
        full[self.place[open_]] = worker._level_data[1][0, : open_.size] * self.stiffness[open_]
        node.diagonal = full[state < 0]
        self._frame: Frame = self.part.frame(state, node.diagonal, self.left)
        self._frame_state = state.copy()
        self._top = (node, state)
        return True

    def _note(self, node: Node, state: States, at: int, q: int, pushed: bool) -> States:
        worker = self.worker
        level = int(worker._state[joint_tree.POINT])
        state = self._settled(state)
        after = state.copy()
        if level < 0:
            node.how = VALUE
            return after
        open_ = worker._root[0]
        _, starts, index = worker._levels
        m = int(starts[level, -1])
        columns = open_[index[level, :m]]
        point = np.zeros(state.size)
        point[self.place[columns]] = worker._work[6][:m] * self.unit[columns]
        values = point[(self._frame_state < 0) & (state != 1)]
        node.how, node.codes, node.numbers = POINT, values != 0, values[values != 0]
        if node is self.root and np.array_equal(self._frame_state, self.part.state):
            self.root_point = self._frame, point
        candidates = np.flatnonzero(self._open & (state < 0))
        wanted = np.zeros(state.size, np.int8)
        if pushed:
            q = int(worker._frames[at, tree.QLEVEL])
            m = int(starts[q, -1])
            wanted[self.place[open_]] = 1
            wanted[self.place[open_[index[q, :m]]]] = np.where(worker._kept[at, :m] == 1, 0, -1)
            candidates = candidates[wanted[candidates] >= 0]
            if not candidates.size:
                return after
        total, justified = self._justified(state, point, candidates, wanted if pushed else None)
        if pushed or total < self.threshold * (1 - 1e-10 * np.sign(self.threshold)):
            node.fixings = justified
            for i, y in justified:
                after[i] = y
            after = self._settled(after)
            if not pushed:
                node.only_child().how = VALUE
        return after

    def _justified(
        self, state: States, point: FloatArray, candidates: IntArray, wanted: States | None
    ) -> tuple[float, list[tuple[int, int]]]:
        """The bound at a point, and those of the candidates that it decides (to what is wanted)."""
        base, price = self._frame.prices(point[None], state[None])
        at = np.flatnonzero(self._open)
        inner, prices = state[at], price[0, at]
        total, ordered = least(base, prices[None], inner[None], self.part.group[at], self.left)
        _, need = self._counts(state)
        limit = self.threshold - 1e-10 * abs(self.threshold)
        place = np.searchsorted(at, candidates)
        out = []
        for i, j in zip(candidates.tolist(), place.tolist(), strict=True):
            a = int(self.part.group[i])
            for y in (0, 1) if wanted is None else (int(wanted[i]),):
                other = forced(float(total[0]), prices, inner, ordered[a][0], int(need[a]), j, y == 0)
                if other >= limit:
                    out.append((i, y))
                    break
        return float(total[0]), out
