"""Good points that differ from each other, and random choices that learn: for breeding in `search` and `joint`."""

from __future__ import annotations

import numpy as np

from cbs_opt.typing import BoolArray, IntArray

_FORGET = 0.95  # of the past at each use of a choice


class Elites:
    """A few good points, no two of which differ in less than `apart` variables.

    Parameters
    ----------
    size : int
    apart : int

    Attributes
    ----------
    points : list of bool (r,)
    values : list of float
    """

    def __init__(self, size: int, apart: int) -> None:
        self.size, self.apart = size, apart
        self.points: list[BoolArray] = []
        self.values: list[float] = []

    @property
    def full(self) -> bool:
        """Whether a point comes in only in place of another one."""
        return len(self.points) >= self.size

    def offer(self, y: BoolArray, f: float, force: bool = False) -> bool:
        """Take in a point of value f; returns whether that happened.

        It takes the place of the nearest one if that is near and worse, else of the worst if that is worse, or,
        with `force`, in any case unless a near one is better.
        """
        distances = [int(np.count_nonzero(y != other)) for other in self.points]
        near = [k for k, distance in enumerate(distances) if distance < self.apart]
        if near:
            if f >= min(self.values[k] for k in near):
                return False
            for k in sorted(near, reverse=True):
                del self.points[k], self.values[k]
        elif self.full:
            worst = int(np.argmax(self.values))
            if f >= self.values[worst] and not force:
                return False
            del self.points[worst], self.values[worst]
        self.points.append(y.copy())
        self.values.append(f)
        return True

    def best(self) -> tuple[BoolArray, float]:
        """The best point and its value."""
        k = int(np.argmin(self.values))
        return self.points[k], self.values[k]

    def disputed(self) -> IntArray:
        """The variables on which not all points agree, those of the most even dispute first."""
        if not self.points:
            return np.zeros(0, dtype=np.int64)
        share = np.mean(self.points, axis=0)
        order = np.argsort(np.abs(share - 0.5), kind="stable")
        return np.asarray(order[: int(np.count_nonzero((share > 0) & (share < 1)))])

    def parents(self, rng: np.random.Generator, number: int) -> list[BoolArray]:
        """Different points at random, as many as there are up to `number`."""
        number = min(number, len(self.points))
        return [self.points[k] for k in rng.choice(len(self.points), number, replace=False)]


class Roulette:
    """Chooses among a few things at random, more often what succeeded recently: Ropke, Pisinger 2006.

    Parameters
    ----------
    choices : int
    """

    def __init__(self, choices: int) -> None:
        self._uses, self._successes = np.zeros(choices), np.zeros(choices)

    def choose(self, rng: np.random.Generator) -> int:
        """One of the choices."""
        reached = np.cumsum(np.square((self._successes + 0.5) / (self._uses + 2.0)))
        return min(int(np.searchsorted(reached, rng.random() * reached[-1], side="right")), reached.size - 1)

    def learn(self, choice: int, success: bool) -> None:
        """Tell how a choice went."""
        self._uses[choice] = _FORGET * self._uses[choice] + 1.0
        self._successes[choice] = _FORGET * self._successes[choice] + success
