"""Search of small joint problems: tabu search in one kernel, from what two good selections share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cbs_opt.monitor import Monitor
from cbs_opt.solvers.joint.moves import JointMoves
from cbs_opt.solvers.joint.tableau import Tableau
from cbs_opt.solvers.kernels.sweep_tabu import sweep, sweep_tabu
from cbs_opt.solvers.problem.elites import Elites
from cbs_opt.typing import BoolArray, FloatArray, Int8Array

LARGEST = 400
"""Open weights up to which a problem is searched on one dense tableau."""

_ELITES = 10
_APART = 40  # weights for each one in which elites differ at least
_STALL = 4  # moves without improvement that end a search, over the number of weights
_TENURE = 12  # moves for which a weight that moved is tabu, at least; fewer where few may move
_REFRESH = 200  # moves between two fresh tableaux
_OPERATIONS = 3e7  # of a call of the kernel: some 10 ms
_BARREN = 30  # selections without a new elite after which all but the best elite are forgotten
_NEVER = 2**62


class DenseJoint:
    """All open weights of a joint problem as one dense quadratic form, sorted by group.

    Parameters
    ----------
    moves : JointMoves
        Whose tableaux hold all open weights.

    Attributes
    ----------
    index : int64 (r,)
        The weights.
    movable : bool (r,)
    """

    def __init__(self, moves: JointMoves) -> None:
        index = np.concatenate([np.zeros(0, dtype=np.int64), *moves.weights_of])
        group = np.concatenate([np.zeros(0, dtype=np.int64), *(tableau.group for tableau in moves.tableaux)])
        order = np.argsort(group, kind="stable")
        n = index.size
        self.index = index[order]
        present, self.group = np.unique(group[order], return_inverse=True)
        self.group_start = np.searchsorted(self.group, np.arange(present.size + 1)).astype(np.int64)
        H, b, floor = np.zeros((n, n)), np.zeros(n), np.zeros(n)
        doubled, start = moves.base, 0
        for tableau in moves.tableaux:
            part = slice(start, start + tableau.group.size)
            if isinstance(tableau, Tableau):
                H[part, part], b[part], floor[part] = tableau.H, tableau.b, tableau.floor
                doubled += 2.0 * tableau.constant
            else:
                H[part, part] = np.eye(tableau.group.size)
                b[part], floor[part] = np.sqrt(tableau.values), 1e-14
                doubled += tableau.constant
            start = part.stop
        self.movable = np.concatenate([np.zeros(0, dtype=bool), *(t.movable for t in moves.tableaux)])[order]
        self.floor = floor[order]
        self._M = np.empty((n + 1, n + 1))
        self._M[:n, :n] = H[np.ix_(order, order)]
        self._M[n, :n] = self._M[:n, n] = b[order]
        self._M[n, n] = doubled
        self._A = np.empty_like(self._M)

    @property
    def n(self) -> int:
        """Number of weights."""
        return self.index.size

    def improve(
        self, pruned: BoolArray, tenure: int, rng: np.random.Generator, spend: Callable[[int], int]
    ) -> tuple[BoolArray, float]:
        """Tabu search from a selection, bool (r,); the best one and its doubled loss.

        Parameters
        ----------
        pruned : bool (r,)
        tenure : int
        rng : numpy Generator
        spend : callable
            Is told how many moves were made since the last call; returns how many may follow, 0 to stop.
        """
        kept: Int8Array = (~pruned).astype(np.int8)
        best = kept.copy()
        sweep(self._M, kept, self.floor, self._A)
        value, clock, idle, since = float(self._A[-1, -1]), 0, 0, 0
        release = np.where(self.movable, -1, _NEVER)
        free = kept[self.movable]
        back, away = (max(1, min(tenure, int((free == k).sum()) // 3)) for k in (1, 0))
        state, stall = np.uint64(rng.integers(1, 2**62)), _STALL * self.n
        most = max(20, int(_OPERATIONS / (self.n + 1) ** 2))
        steps = min(spend(0), most)
        while steps > 0 and idle < stall:
            before = clock
            value, clock, idle, since, state = sweep_tabu(
                self._M, self._A, kept, self.floor, self.group, self.group_start, release, best,
                value, clock, idle, since, np.uint64(state), steps, stall, away, back, _REFRESH,
            )  # fmt: skip
            steps = min(spend(clock - before), most)
        return best == 0, float(value)


class JointBreeding:
    """Selections that are improved by tabu search and replace the worst of a few good ones, as long as asked.

    A new one has what two good ones share, and of what they dispute as much at random as the budget wants; the
    first ones are at random. When nothing new has come for long, all but the best are forgotten. After Wu, Hao: A
    hybrid metaheuristic method for the maximum diversity problem. European Journal of Operational Research 231,
    2013.

    Parameters
    ----------
    problem : DenseJoint
    monitor : Monitor
    rng : numpy Generator
    tenure : int
    """

    def __init__(
        self, problem: DenseJoint, monitor: Monitor, rng: np.random.Generator, tenure: int = _TENURE
    ) -> None:
        self.problem, self.monitor, self.rng, self.tenure = problem, monitor, rng, tenure
        self._apart = max(3, problem.n // _APART)
        self._elites = Elites(_ELITES, self._apart)
        self._barren = 0

    def run(
        self,
        pruned: BoolArray,
        doubled: float,
        patience: int | None,
        until: float,
        offer: Callable[[BoolArray, float], None],
    ) -> None:
        """Breed until told to stop, the clock shows `until`, or after `patience` moves without improvement.

        Parameters
        ----------
        pruned : bool (r,)
            A first good selection, of that doubled loss.
        doubled : float
        patience : int or None
        until : float
        offer : callable
            Takes a selection that is better than all before, and its doubled loss.
        """
        monitor, best, idle = self.monitor, doubled, 0
        self._elites.offer(pruned, doubled)

        def spend(moves: int) -> int:
            nonlocal idle
            monitor.advance(moves)
            idle += moves
            if monitor.should_stop() or monitor.elapsed > until:
                return 0
            left = [10**9 if patience is None else patience - idle]
            if monitor.stop.max_iterations is not None:
                left.append(monitor.stop.max_iterations - monitor.iterations)
            if monitor.stop.no_improvement is not None:
                left.append(monitor.stop.no_improvement)
            return max(min(left), 0)

        while spend(0):
            if monitor.pruned is not None and monitor.objective is not None and 2 * monitor.objective < best:
                best = 2 * monitor.objective  # from elsewhere, such as a proof
                self._elites.offer(monitor.pruned[self.problem.index], best)
            found, value = self.problem.improve(self._next(), self.tenure, self.rng, spend)
            if value < best:
                best, idle = value, 0
                offer(found, value)
            self._barren = 0 if self._elites.offer(found, value) else self._barren + 1
            if self._barren >= _BARREN:
                only, worth = self._elites.best()
                self._elites, self._barren = Elites(_ELITES, self._apart), 0
                self._elites.offer(only, worth)

    def _next(self) -> BoolArray:
        """A selection to start from, bool (r,)."""
        problem, rng = self.problem, self.rng
        known = self._elites.best()[0]
        key: FloatArray = rng.random(problem.n)
        if self._elites.full:
            first, second = self._elites.parents(rng, 2)
            key[first & second] -= 1.0
            key[~(first | second)] += 1.0
            for side in (first & second, ~(first | second)):
                at = np.flatnonzero(side & problem.movable)
                at = rng.permutation(at)[: int(rng.integers(1, 4))]
                key[at] = rng.random(at.size)
        key[~problem.movable] = np.inf
        counts = np.bincount(problem.group[known], minlength=problem.group_start.size - 1)
        order = np.lexsort((key, problem.group))  # the weights of each group stay in its range
        rank = np.arange(problem.n) - problem.group_start[problem.group]
        out = np.zeros(problem.n, dtype=bool)
        out[order[rank < counts[problem.group]]] = True
        return out
