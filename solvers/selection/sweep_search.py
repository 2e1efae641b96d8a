"""The search on large problems: sweeps over all variables, then cores of all blocks, in threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from cbs_opt.monitor import Monitor
from cbs_opt.solvers.kernels.threads import run_tasks
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.selection.breeding import FINE
from cbs_opt.solvers.selection.incumbent import GAIN, CorePoint, Incumbent
from cbs_opt.solvers.selection.parameters import LARGE, MANY_BLOCKS, SMALL_BLOCK, SearchParameters
from cbs_opt.solvers.selection.relaxation import Relaxation
from cbs_opt.solvers.selection.repair import meet_budgets, trade
from cbs_opt.solvers.selection.sweeps import Sweeps
from cbs_opt.typing import FloatArray, IntArray

_MOST_GROUPS = 16
_SWEEPS = 12  # at each weight of the path
_TOLERANCE = 1e-4
_HARDEN = (0.03, 0.1, 0.2, 0.4, 0.8, 1.2)
_HARDEN_SLOWLY = (0.003, 0.01, *_HARDEN)
_HARDEN_FINELY = tuple(float(t) for t in np.geomspace(0.03, 1.2, 32))
_HARDEN_SWEEPS = 12
_TIGHT_SWEEPS = 18
_TIGHT_PATIENCE = 3  # consecutive bounds without improvement after which the relaxation ends
_CORE = 300
_CYCLES = 4  # on the core of a block before the next block
_BLOCKS_AT_A_TIME = 32
_MELT = (5e-3, 0.1)
_NOISE = (0.3, 1.2)
_STALL = 500
_TENURE = (4, 15)


def is_large(problem: SelectionProblem, large: int = LARGE) -> bool:
    """Whether the search starts with sweeps, not working sets: more than `large` coupled variables."""
    return problem.budget.size <= _MOST_GROUPS and int(_coupled(problem).sum()) > large


def is_split(
    problem: SelectionProblem, large: int = LARGE, many: int = MANY_BLOCKS, small: int = SMALL_BLOCK
) -> bool:
    """Whether a large problem has more than `many` blocks of more than `small` variables on average.

    They are then searched one by one.
    """
    sizes = _coupled(problem)
    return is_large(problem, large) and sizes.size > many and int(sizes.sum()) > small * sizes.size


def _coupled(problem: SelectionProblem) -> IntArray:
    return np.array(problem.component_sizes, dtype=np.int64)


class SweepSearch:
    """Parts of `search` for large problems.

    Parameters
    ----------
    problem : SelectionProblem
    monitor : Monitor
    offer : callable
        Takes an `Incumbent`.
    seed : int
    finely : bool
        Whether points harden in small steps, as where no search over all blocks follows.
    """

    def __init__(
        self,
        problem: SelectionProblem,
        monitor: Monitor,
        offer: Callable[[Incumbent], None],
        seed: int,
        finely: bool = False,
    ) -> None:
        self.problem, self.monitor, self.offer, self.seed = problem, monitor, offer, seed
        start = problem.cheapest()
        self.relaxed = Sweeps(
            problem.columns, problem.linear, problem.group, problem.budget, start, problem.threads
        )
        self.tight: Sweeps | None = None
        self.settled, self.idle = False, 0
        self.visits = 0
        self._slow = _HARDEN_FINELY if finely else _HARDEN
        coupled = [k for k, component in enumerate(problem.components) if component.coupled]
        self.coupled = np.array(coupled, dtype=np.int64)

    @property
    def blocks(self) -> int:
        """Number of coupled blocks."""
        return int(self.coupled.size)

    def path(self, weights: Sequence[float]) -> None:
        """Follow the concave weights down; harden at the start quickly, in the middle and at the end slowly."""
        monitor = self.monitor
        for k, t in enumerate(weights):
            self.relaxed.run(t, _SWEEPS, _TOLERANCE, monitor.should_stop)
            if k in (0, len(weights) // 2, len(weights) - 1) and not monitor.should_stop():
                self.monitor.report_bound(self.problem.certified_bound(self.relaxed.x))
                self._harden(self.relaxed.copy(), _HARDEN[2:] if not k else self._slow if k > 2 else _HARDEN)
            if monitor.should_stop():
                break

    def relaxation(self) -> Relaxation:
        """The point of the path with the right sums, for rounds with working sets."""
        return Relaxation(self.problem, self._fit(self.relaxed.x))

    def harden_from(self, x: FloatArray) -> None:
        """Offer what a point of the relaxation hardens to."""
        self._harden(self.relaxed.at(x), _HARDEN_SLOWLY)

    def _harden(self, sweeps: Sweeps, weights: Sequence[float]) -> None:
        sweeps.harden(weights, _HARDEN_SWEEPS, self.monitor.should_stop)
        if self.monitor.should_stop():
            return
        point = Incumbent(self.problem, np.round(sweeps.x))
        meet_budgets(point)
        trade(point, self.monitor.should_stop)
        self.offer(point)

    def _fit(self, x: FloatArray) -> FloatArray:
        """X moved towards 0 or 1 in each group until its sum is the budget."""
        problem = self.problem
        sums = np.bincount(problem.group, x, problem.budget.size)
        sizes = np.bincount(problem.group, minlength=problem.budget.size)
        inner = np.bincount(problem.group, (x > 0) & (x < 1), problem.budget.size)
        missing = problem.budget - sums
        room = np.where(x > 0, 1.0 - x, 0.0) * (x < 1), np.where(x < 1, x, 0.0)
        up = np.bincount(problem.group, room[0], problem.budget.size)
        down = np.bincount(problem.group, room[1], problem.budget.size)
        with np.errstate(divide="ignore", invalid="ignore"):
            a = np.where(missing > 0, missing / up, 0.0)[problem.group]
            b = np.where(missing < 0, -missing / down, 0.0)[problem.group]
        enough = ((missing <= up) & (-missing <= down) & (inner > 0) | (missing == 0) | (sizes == 0)).all()
        if enough:
            return np.asarray(np.clip(x + np.nan_to_num(a) * room[0] - np.nan_to_num(b) * room[1], 0.0, 1.0))
        return problem.smallest(-x)

    def tighten(self) -> None:
        """Sweeps of the plain relaxation, for the bound."""
        if self.settled:
            return
        if self.tight is None:
            self.tight = self.relaxed.copy()
        made = self.tight.run(0.0, _TIGHT_SWEEPS, 1e-7, self.monitor.should_stop)
        better = self.monitor.report_bound(self.problem.certified_bound(self.tight.x))
        self.idle = 0 if better else self.idle + 1
        self.settled = made < _TIGHT_SWEEPS or self.idle >= _TIGHT_PATIENCE

    def visit_blocks(self, point: Incumbent, parameters: SearchParameters) -> None:
        """Cycles on a core of every block, from `point`, many blocks at a time; then trades between blocks.

        Every block keeps its own sums, so that what is gained in the blocks adds up.
        """
        problem, monitor = self.problem, self.monitor
        self.visits += 1
        h = point.g + problem.linear
        price = problem.threshold(h)
        found: dict[int, tuple[IntArray, FloatArray]] = {}

        def visit(b: int, halted: Callable[[], bool]) -> None:
            found[b] = self._visit(b, point, h, price, parameters, halted)

        order = np.random.default_rng([self.seed, self.visits]).permutation(self.coupled)
        for first in range(0, order.size, _BLOCKS_AT_A_TIME):
            chunk = order[first : first + _BLOCKS_AT_A_TIME].tolist()
            found.clear()
            run_tasks(problem.threads, [partial(visit, b) for b in chunk], monitor.should_stop)
            stopped = monitor.should_stop()
            better = point.copy()
            for b in sorted(found):
                better.move(*found[b])
            point = better
            self.offer(point)
            monitor.advance(_CYCLES * len(chunk))
            if stopped or monitor.should_stop():
                return
        traded = Incumbent(problem, point.y)  # another object: `point` may be the incumbent by now
        trade(traded, monitor.should_stop)
        self.offer(traded)

    def _visit(
        self,
        b: int,
        point: Incumbent,
        h: FloatArray,
        price: FloatArray,
        parameters: SearchParameters,
        halted: Callable[[], bool],
    ) -> tuple[IntArray, FloatArray]:
        """The best values found for a core of block b."""
        problem = self.problem
        rng = np.random.default_rng([self.seed, self.visits, b])
        part = slice(int(problem.columns.starts[b]), int(problem.columns.starts[b + 1]))
        half = 0.5 * problem.columns.diagonal[part]
        y = point.y[part]
        # What a single change costs beyond the price, with some noise for other cores at other visits.
        score = np.where(y > 0, half - (h - price)[part], half + (h - price)[part])
        score = score * np.exp(0.5 * (self.visits > 1) * rng.standard_normal(score.size))
        size = min(_CORE, parameters.core, score.size)
        inside, outside = np.flatnonzero(y > 0), np.flatnonzero(y == 0)
        few = min(outside.size, max(size // 2, size - inside.size))
        chosen = [
            side[np.argsort(score[side], kind="stable")[:count]]
            for side, count in ((outside, few), (inside, size - few))
        ]
        local = CorePoint(point, part.start + np.sort(np.concatenate(chosen)))
        core = local.core
        best, value = local.y, local.value(local.y)
        ratio = parameters.ratio or FINE.ratio
        tolerance = 1e-6 * max(abs(value - local.value(np.zeros(core.n))), 1e-300)
        state = np.uint64(rng.integers(1, 2**62))
        for cycle in range(_CYCLES):
            current = best
            if cycle:
                t = float(_MELT[0] * (_MELT[1] / _MELT[0]) ** rng.random())
                weight = core.diagonal * np.exp(rng.uniform(*_NOISE) * rng.standard_normal(core.n))
                current = local.harden(best, weight, t, ratio, tolerance, halted)
            if halted():
                break
            current, f, state = local.tabu(current, _STALL, int(rng.integers(*_TENURE)), state, halted)
            if f < value - GAIN * abs(value):
                best, value = current, f
        return core.index, best
