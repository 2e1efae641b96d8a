"""Epochs of `search`: points bred on a core by concave continuation, from the relaxation and from good points."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cbs_opt.monitor import Monitor
from cbs_opt.solvers.problem.elites import Elites, Roulette
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.selection.incumbent import GAIN, CorePoint, Incumbent, candidate_swaps
from cbs_opt.solvers.selection.parameters import SearchParameters
from cbs_opt.solvers.selection.relaxation import Relaxation
from cbs_opt.typing import FloatArray, IntArray

EXPONENT = 0.5
"""Of the relative diagonal in the concave weights, in some cycles; 0 in the others."""

_APART = 16  # variables in which elites differ at least; fewer on small cores
_START = (1e-3, 3e-2)  # concave weight of a start from the relaxation, log-uniform
_MELT = (5e-3, 0.5)  # concave weight after melting binary points, log-uniform
_NOISE = ((0.03, 0.1), (0.1, 0.3), (0.3, 0.8), (0.8, 1.8))  # log-normal spread of the random concave weights
_TENURE = (4, 15)
_SUM_OF_TOLERANCES = 0.2  # of the descents on a core, in units of the objective
_BLOCKS_OF_A_CORE = 8
_FRESH, _MELTED, _CROSSED = range(3)

SMALL = 500
"""Open weights up to which cycles are rough."""


class Manner(NamedTuple):
    """What a cycle costs, and how many good points others are bred from.

    Attributes
    ----------
    elites : int
    cycles : int
        Without a new elite, that end an epoch.
    ratio : float
        Growth of the concave weight.
    tolerance : float
        Of descents, in units of the objective.
    blur : tuple of float
        Share of a random point in a start from the relaxation, log-uniform. Descent takes back what changes the
        objective much; a change where Q is nearly flat remains.
    """

    elites: int
    cycles: int
    ratio: float
    tolerance: float
    blur: tuple[float, float] | None


ROUGH, FINE = Manner(16, 40, 2.5, 1e-3, (0.02, 0.3)), Manner(8, 20, 1.6, 1e-6, None)
"""Up to `SMALL` weights, where many rough samples find more than few that are precise, and beyond."""


class Breeding:
    """Cycles on cores, with a memory of good points.

    A cycle starts from the relaxation, from a good point, or half way between two of them; it melts that start
    (relaxes it with a small concave weight, with random weights per variable), hardens it, rounds it, and repairs
    it by tabu search and by the best swaps over all pairs of the core. The spread of the random weights and the
    kind of start are chosen by what succeeded recently. Points bred from the relaxation alone, in the `fresh`
    epochs, form a generation of their own; the others descend from the best of all generations.

    Parameters
    ----------
    problem : SelectionProblem
    parameters : SearchParameters
    monitor : Monitor
    rng : numpy Generator
    incumbent : callable
        Returns the best point so far.
    offer : callable
        Takes a better one.
    """

    def __init__(
        self,
        problem: SelectionProblem,
        parameters: SearchParameters,
        monitor: Monitor,
        rng: np.random.Generator,
        incumbent: Callable[[], Incumbent],
        offer: Callable[[Incumbent], None],
    ) -> None:
        self.problem, self.parameters, self.monitor = problem, parameters, monitor
        self.rng, self.incumbent, self.offer = rng, incumbent, offer
        self.state = np.uint64(rng.integers(1, 2**62))
        self.apart = int(np.clip(problem.n // 64, 2, _APART))
        manner = ROUGH if problem.n <= SMALL else FINE
        cycles = min(manner.cycles, parameters.patience or manner.cycles)
        self.manner = manner._replace(
            cycles=cycles if parameters.cycles is None else parameters.cycles,
            ratio=manner.ratio if parameters.ratio is None else parameters.ratio,
        )
        self.elites = Elites(manner.elites, self.apart)
        self.noise, self.kind = Roulette(2 * len(_NOISE)), Roulette(3)  # of noise with either exponent
        self.kind.learn(_CROSSED, True)  # what is best on most instances

    def tolerance(self, size: int) -> float:
        """Of descents on a core of so many variables, absolute."""
        return min(self.manner.tolerance, _SUM_OF_TOLERANCES / size) * max(abs(self.incumbent().f), 1e-300)

    def choose_core(self, relaxed: Relaxation, t: float, size: int, spread: float = 0.0) -> IntArray:
        """The disputed variables, and those nearest to their threshold, from a few blocks.

        `spread` is that of a random factor on the distances.
        """
        problem, rng = self.problem, self.rng
        h = relaxed.slope(t)
        distance = np.abs(h - problem.threshold(h))
        distance[(relaxed.x > 0) & (relaxed.x < 1)] = 0.0
        if spread:
            distance *= np.exp(spread * rng.standard_normal(distance.size))
        disputed = self.elites.disputed()[: size // 2]
        distance[disputed] = -1.0 / (1.0 + np.arange(disputed.size))
        starts = problem.columns.starts
        at = np.arange(problem.n)
        if starts.size - 1 > _BLOCKS_OF_A_CORE:
            blocks = np.sort(rng.choice(starts.size - 1, _BLOCKS_OF_A_CORE, replace=False))
            at = np.concatenate([np.arange(starts[b], starts[b + 1]) for b in blocks])
        return np.sort(at[np.argsort(distance[at], kind="stable")[:size]])

    def epoch(self, relaxed: Relaxation, t: float, base: Incumbent, fresh: bool, first: bool) -> None:
        """Cycles on one core until none succeeds any more.

        Parameters
        ----------
        relaxed : Relaxation
            A point at the concave weight t.
        t : float
        base : Incumbent
            What the variables outside of the core keep.
        fresh : bool
            Whether this is a generation of its own.
        first : bool
            Whether nothing has been bred before.
        """
        monitor, parameters, known = self.monitor, self.parameters, self.incumbent()
        self.elites.offer(known.y > 0.5, known.f)  # it may come from elsewhere
        size = int(np.clip(5 * relaxed.fractional, min(300, parameters.core), parameters.core))
        local = CorePoint(base, self.choose_core(relaxed, t, size, 0.0 if first else 0.5))
        index, elites = local.core.index, Elites(self.manner.elites, self.apart) if fresh else self.elites
        x = local.fit(relaxed.x[index])
        best, idle = np.inf, 0
        while idle < self.manner.cycles and not monitor.should_stop():
            level, kind = self.noise.choose(self.rng), self.kind.choose(self.rng)
            learning = elites.full
            if (fresh and not learning) or not elites.points:
                kind = _FRESH
            elif fresh and kind == _FRESH:
                kind = _CROSSED
            plain = first and best == np.inf
            start, at = self._start(local, x, elites, kind)
            if plain:
                start, at = x, _START[0]
            y, f = self._cycle(local, start, at, None if plain else level)
            monitor.advance()
            everywhere = base.y > 0.5
            everywhere[index] = y > 0.5
            better = len(elites.values) > 1 and f < float(np.median(elites.values))
            success = elites.offer(everywhere, f)
            self.noise.learn(level, success if learning else better)
            if learning:
                self.kind.learn(kind, success)
            idle = 0 if success else idle + 1
            best = min(best, f)
            if f < self.incumbent().f - GAIN * abs(self.incumbent().f):
                found = Incumbent(self.problem, everywhere.astype(np.float64))
                candidate_swaps(found, monitor.should_stop)
                self.offer(found)
                elites.offer(found.y > 0.5, found.f)
        if fresh and elites.points:
            for point, value in zip(elites.points, elites.values, strict=True):
                self.elites.offer(point, value)
            self.elites.offer(*elites.best(), force=True)

    def _start(self, local: CorePoint, x: FloatArray, elites: Elites, kind: int) -> tuple[FloatArray, float]:
        """A start of the kind, float64 (c,), and its concave weight; x is that from the relaxation."""
        if kind == _FRESH:
            if self.manner.blur is not None:
                share = _log_uniform(self.rng, self.manner.blur)
                x = local.fit((1.0 - share) * x + share * self.rng.random(x.size))
            return x, _log_uniform(self.rng, _START)
        parents = elites.parents(self.rng, 2 if kind == _CROSSED else 1)
        return local.fit(np.mean(parents, axis=0)[local.core.index]), _log_uniform(self.rng, _MELT)

    def _cycle(self, local: CorePoint, start: FloatArray, t: float, level: int | None) -> tuple[FloatArray, float]:
        """Melt, harden, round and repair; the point on the core and its objective."""
        core, rng, parameters, should_stop = local.core, self.rng, self.parameters, self.monitor.should_stop
        weight = local.weights(EXPONENT if level is None or level >= len(_NOISE) else 0.0)
        if level is not None:
            weight = weight * np.exp(_log_uniform(rng, _NOISE[level % len(_NOISE)]) * rng.standard_normal(core.n))
        y = local.harden(start, weight, t, self.manner.ratio, self.tolerance(core.n), should_stop)
        tenure = int(rng.integers(_TENURE[0], _TENURE[1] + 1))
        y, _, self.state = local.tabu(y, parameters.stall, tenure, self.state, should_stop)
        return local.swap(y)


def _log_uniform(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    return float(limits[0] * (limits[1] / limits[0]) ** rng.random())
