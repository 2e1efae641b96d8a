"""Runs a tree once more with a fixed threshold and notes what closes every node, for a certificate.

The kernels work node by node here, and the snapshot of the worker is read after each: the normal run is not
affected. The notes only direct the check; whether they prove anything is recomputed there.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

import numpy as np

from cbs_opt.certificate_bounds import Frame, Part, States
from cbs_opt.certificate_counting import MOST_OF_CERTIFICATE, MOST_OF_LEAF, selections
from cbs_opt.certificate_tree import counts, forced, least, settled
from cbs_opt.files.certificate_file import COUNT, NOTHING, POINT, VALUE
from cbs_opt.solvers.kernels.counting import SETS_BEFORE_PRICES
from cbs_opt.solvers.kernels.stack_layout import COUNTED, ROOT
from cbs_opt.solvers.problem.joint_problem import condition
from cbs_opt.solvers.trees.best_first import (
    HARD,
    SHIFT_SIZE,
    Patience,
    Shift,
    Subproblem,
)
from cbs_opt.solvers.trees.joint_worker import JointWorker
from cbs_opt.solvers.trees.recorded_nodes import Node
from cbs_opt.solvers.trees.selection_worker import SelectionWorker
from cbs_opt.solvers.trees.stack import Snapshot, StackEntry
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
        Position in the part of each variable of the worker's problem.
    unit, stiffness : float64 (n,)
        Factors that bring points and diagonals to the units of the part.
    """

    pruned_value = 1  # what the kernel calls a pruned weight

    def __init__(
        self,
        part: Part,
        left: IntArray,
        worker: SelectionWorker | JointWorker,
        threshold: float,
        place: IntArray,
        unit: FloatArray,
        stiffness: FloatArray,
    ) -> None:
        self.part, self.left, self.threshold = part, left, threshold
        self.worker: SelectionWorker | JointWorker = worker
        self.place, self.unit, self.stiffness = place, unit, stiffness
        self._patience = Patience()
        self.nodes = 0
        self.cut = False
        self.root_point: tuple[Frame, FloatArray] | None = None
        self.root = Node()
        self._levels: list[tuple[Node, States] | None] = [None] * (place.size + 3)
        self._open = part.state < 0
        self._top: tuple[Node, States] = (self.root, part.state.copy())

    def run(self, most: int, should_stop: Callable[[], bool]) -> Node:
        """Record up to about `most` nodes; what is open then stays with the bound of the last point above it.

        Told to stop, it may record none.
        """
        tick = itertools.count()
        whole = Subproblem(-np.inf, np.full(self.place.size, -1, np.int8), None, None)
        heap = [(-np.inf, next(tick), whole, self.root, self.part.state.copy())]
        while heap:
            if self.nodes >= most or should_stop():
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
        worker = self.worker
        if not self._load(sub, node, state):
            return []
        thorough = self.nodes >= HARD * self.place.size
        cost, done = worker.shift_cost(thorough), 0
        out: list[tuple[float, Subproblem, Node, States]] = []
        tried = worker.size < SHIFT_SIZE
        while more := self._step():
            done += 1
            if not tried and done >= self._patience.before_shift(cost):
                tried, done = True, 0
                out += self._try_shift(sub, node, state, thorough)
            elif worker.crowded() or done >= self._patience.of_dive(cost) or self.nodes >= most or should_stop():
                break
        if tried and not more:
            self._patience.closed()
        return out + self._export()

    def _try_shift(
        self, sub: Subproblem, node: Node, state: States, thorough: bool
    ) -> list[tuple[float, Subproblem, Node, States]]:
        """Start again with another shift where it closes enough of the gap; else the open nodes, but one."""
        worker = self.worker
        better = worker.better_relaxation(thorough)
        if better is None:
            return []
        sub = sub._replace(shift=better[0], start=sub.start if better[1] is None else better[1])
        before, left = worker.bound(), self._export()
        trial = Node()
        if self._load(sub, trial, state):
            more = self._step()
            if more and not self._patience.is_better(worker.bound() - before, worker.snapshot().limit - before):
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

    def _step(self) -> bool:
        """Let the kernel work on one node and note it; whether something is left."""
        worker, view = self.worker, self.worker.snapshot()
        above = view.open_entry()
        if above < 0:
            return worker.run(1)
        entry, before = view.entry(above), view.nodes
        at = above if entry.pending == ROOT else above + 1  # where the kernel puts the node it works on
        node, state = self._top if entry.pending == ROOT else self._child(above, entry, view)
        more = worker.run(1)
        if view.nodes == before:
            return more
        self.nodes += 1
        pushed = view.top == at
        level = view.entry(at).level if pushed else entry.level
        state = self._note(node, state, at, level, pushed)
        if pushed:
            node.branch = self._branch(view.entry(at), view)
            node.children = [Node(), Node()]
            self._levels[at] = (node, state)
        return more

    def _branch(self, entry: StackEntry, view: Snapshot) -> int:
        """The variable on which an entry of the stack branches, by its position in the part."""
        return int(self.place[view.variables(entry.level)[entry.branch]])

    def _child(self, i: int, entry: StackEntry, view: Snapshot) -> tuple[Node, States]:
        """The next child of an entry of the stack, and the state there."""
        found = self._levels[i]
        assert found is not None
        y = entry.value if self.pruned_value == 1 else 1 - entry.value
        state = found[1].copy()
        state[self._branch(entry, view)] = y
        return found[0].children[y], state

    def _export(self) -> list[tuple[float, Subproblem, Node, States]]:
        """The open nodes of the worker with their places in the tree."""
        worker, view = self.worker, self.worker.snapshot()
        places: list[tuple[Node, States]] = []
        for i in range(view.top + 1):
            entry = view.entry(i)
            if entry.pending == ROOT:
                places.append(self._top)
            elif entry.pending == 1:
                places.append(self._child(i, entry, view))
            elif entry.pending:
                found = self._levels[i]
                assert found is not None
                places.append((found[0].only_child(), found[1].copy()))
        subs = worker.export()
        return [(sub.bound, sub, *place) for sub, place in zip(subs, places, strict=True)]

    def _counts(self, state: States) -> tuple[IntArray, IntArray]:
        return counts(state, self._open, self.part.group, self.left)

    def _settled(self, state: States) -> States:
        return settled(state, self._open, self.part.group, self.left)

    # What the two problems do differently ------------------------------------------------------------------

    def _load(self, sub: Subproblem, node: Node, state: States) -> bool:
        """Load a subproblem; whether there is a root to work on."""
        raise NotImplementedError

    def _note(self, node: Node, state: States, at: int, level: int, pushed: bool) -> States:
        """Note what the kernel has found at a node; the state that its children start from.

        `at` is its entry on the stack, `level` holds its columns; `pushed` says whether it branches.
        """
        raise NotImplementedError


class SelectionRecorder(Recorder):
    """Of the selection problem."""

    worker: SelectionWorker

    def _load(self, sub: Subproblem, node: Node, state: States) -> bool:
        self.worker.load(sub)
        # Below a diagonal its part of the tree goes on with it; only a new one is noted.
        shift = sub.shift
        if shift is not None and self._known is not shift:
            full = np.zeros(self.part.index.size)
            full[self.place] = shift.diagonal * self.stiffness
            node.diagonal = full[state < 0]
            if shift.price.size:
                node.products = self.place[shift.first], self.place[shift.second], shift.price * self.stiffness[0]
        self._top = (node, state)
        return True

    _known: Shift | None = None

    def _dive(
        self, sub: Subproblem, node: Node, state: States, most: int, should_stop: Callable[[], bool]
    ) -> list[tuple[float, Subproblem, Node, States]]:
        self._known = sub.shift
        return super()._dive(sub, node, state, most, should_stop)

    def _note(self, node: Node, state: States, at: int, level: int, pushed: bool) -> States:
        view = self.worker.snapshot()
        after, point = state.copy(), np.zeros(state.size)
        after[self.place], point[self.place] = view.decisions(at, level), view.point(at, level)
        decided = np.flatnonzero((state < 0) & (after >= 0))
        free_count, need = self._counts(state)
        if ((need < 0) | (need > free_count)).any():
            node.bounded_by = NOTHING
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
                    child.bounded_by = NOTHING
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
        node.bounded_by = POINT
        node.codes, node.numbers = np.concatenate([number, values == 1]), values[number]


class JointRecorder(Recorder):
    """Of the joint problem; its kernel calls a kept weight 1."""

    pruned_value = 0
    worker: JointWorker
    _selections = _counted = 0

    def _load(self, sub: Subproblem, node: Node, state: States) -> bool:
        worker, problem = self.worker, self.worker.problem
        worker.most_counted = min(worker.most_counted, MOST_OF_LEAF // SETS_BEFORE_PRICES)
        open_, A, v, extra = condition(problem.A, problem.w, sub.fixings)
        limit = float(worker.snapshot().shared[0])
        worker.load(sub)
        view = worker.snapshot()
        state = self._settled(state)
        if extra < limit:
            leaps = self.place[open_[extra + 0.5 * v**2 / np.diag(A) >= limit]]
            leaps = leaps[state[leaps] < 0]
            if leaps.size:
                node.bounded_by, node.fixings = VALUE, [(int(i), 0) for i in leaps]
                state[leaps] = 0
                state = self._settled(state)
                node = node.only_child()
        if view.top < 0:
            node.bounded_by = VALUE
            return False
        full = np.zeros(state.size)
        full[self.place[view.open]] = view.diagonal * self.stiffness[view.open]
        node.diagonal = full[state < 0]
        self._frame: Frame = self.part.frame(state, node.diagonal, self.left)
        self._frame_state = state.copy()
        self._top = (node, state)
        return True

    def _note(self, node: Node, state: States, at: int, level: int, pushed: bool) -> States:
        view = self.worker.snapshot()
        counted, self._counted = int(view.state[COUNTED]) > self._counted, int(view.state[COUNTED])
        relaxed = view.relaxed_point()
        state = self._settled(state)
        after = state.copy()
        if relaxed is None:
            node.bounded_by = VALUE
            return after
        variables, u = relaxed
        point = np.zeros(state.size)
        point[self.place[variables]] = u * self.unit[variables]
        values = point[(self._frame_state < 0) & (state != 1)]
        node.bounded_by, node.codes, node.numbers = POINT, values != 0, values[values != 0]
        if node is self.root and np.array_equal(self._frame_state, self.part.state):
            self.root_point = self._frame, point
        candidates = np.flatnonzero(self._open & (state < 0))
        wanted = np.zeros(state.size, np.int8)
        if pushed:
            variables = view.variables(level)
            wanted[self.place[view.open]] = 1
            wanted[self.place[variables]] = np.where(view.kept[at, : variables.size] == 1, 0, -1)
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
                node.only_child().bounded_by = COUNT if counted and self._is_countable(after) else VALUE
        return after

    def _is_countable(self, state: States) -> bool:
        """Whether what a counted leaf leaves can be counted by the check; adds it up."""
        free, need = self._counts(state)
        at = np.flatnonzero(free)
        if at.size != 1:
            return False
        found = selections(int(free[at[0]]), int(need[at[0]]))
        self._selections += found
        if self._selections > MOST_OF_CERTIFICATE // 2:
            self.worker.most_counted = 0
        return found <= MOST_OF_LEAF and self._selections <= MOST_OF_CERTIFICATE

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
