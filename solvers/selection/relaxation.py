"""The convex relaxation of the selection problem, solved by decomposition into cores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.selection.core import Core
from cbs_opt.typing import FloatArray, IntArray

_FRACTIONAL_LIMIT = 1000  # fractional variables of one block in a working set
_WORKING_LIMIT = 3000  # variables of a working set in all


class Relaxation:
    """min ½ xᵀQx + cᵀx, 0 ≤ x ≤ 1, with given group sums; optionally with a concave term.

    A round takes the fractional and the most violating variables as a core, works on it with pairwise descent
    (the second-order working set of LIBSVM: Fan, Chen, Lin 2005) and Newton steps, and brings the changed columns
    into the gradient. With t > 0 the term t/2 Σ Q_ii x_i (1 − x_i) pushes towards binary points; at t = 1 the
    objective is the expected loss of rounding every x_i at random, independently.

    Parameters
    ----------
    problem : SelectionProblem
    x : float64 (r,), optional
        Start; by default the weights that cost least by themselves.

    Attributes
    ----------
    x, g : float64 (r,)
        The point, and Qx.
    steps : int
        Pairwise steps so far.
    """

    def __init__(self, problem: SelectionProblem, x: FloatArray | None = None) -> None:
        self.problem = problem
        self.x = problem.cheapest() if x is None else x.copy()
        self.g = problem.columns.product(self.x)
        self.scale = self._size()
        self.steps = 0

    def copy(self) -> Relaxation:
        """An independent copy."""
        other = object.__new__(Relaxation)
        other.__dict__.update(self.__dict__)
        other.x, other.g = self.x.copy(), self.g.copy()
        return other

    @property
    def fractional(self) -> int:
        """Number of variables strictly between 0 and 1."""
        return int(np.count_nonzero((self.x > 0) & (self.x < 1)))

    def value(self) -> float:
        """The relaxed objective at x, in the units of presolve."""
        return float(0.5 * self.x @ self.g + self.problem.linear @ self.x)

    def _size(self) -> float:
        """What violations are measured against: the expected loss of rounding at random."""
        x, problem = self.x, self.problem
        rounding = 0.5 * float(problem.columns.diagonal @ (x * (1.0 - x)))
        return max(abs(0.5 * float(x @ self.g)) + float(np.abs(problem.linear) @ x) + rounding, 1e-300)

    def slope(self, t: float) -> FloatArray:
        """Gradient with the concave term, float64 (r,)."""
        problem = self.problem
        return self.g + problem.linear + t * problem.columns.diagonal * (0.5 - self.x)

    def bound(self) -> float:
        """A certified lower bound on the loss of the instance, from x as it is now."""
        return self.problem.certified_bound(self.x)

    def solve(
        self,
        t: float = 0.0,
        *,
        size: int = 256,
        steps: int = 2000,
        tolerance: float = 1e-6,
        rounds: int = 100,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> int:
        """Rounds until no violation exceeds `tolerance` times the size of the objective.

        Parameters
        ----------
        t : float
            Weight of the concave term.
        size : int
            Violating variables in a working set.
        steps : int
            Pairwise steps per call of the kernel.
        tolerance : float
        rounds : int
        should_stop : callable

        Returns
        -------
        int
            Rounds taken; fewer than `rounds` when converged.
        """
        for taken in range(rounds):
            if should_stop():
                return rounds
            if self._round(t, size, steps, tolerance * self.scale, should_stop) <= tolerance * self.scale:
                return taken
            self.scale = min(self.scale, self._size())
        return rounds

    def _round(self, t: float, size: int, steps: int, tolerance: float, should_stop: Callable[[], bool]) -> float:
        """One round; returns the violation found before it, 0 where the round changes nothing."""
        index, worst = self._working_set(t, size)
        if worst <= tolerance or index.size < 2:
            return worst
        problem = self.problem
        core = Core(problem.columns, problem.group, index)
        before = self.x[core.index]
        x = before.copy()
        shift = t * core.diagonal
        h = self.slope(t)[core.index]
        for attempt in range(4 * max(len(core.squares), 1)):
            done = core.descend(x, h, shift, steps, 0.1 * tolerance)
            self.steps += done
            if should_stop():
                break
            if attempt + 1 < len(core.squares) and done == steps:
                continue
            if (attempt and done < 20) or core.newton(x, h, shift, should_stop) == 0:
                break
        moved = np.flatnonzero(x != before)
        if not moved.size:  # rounding hides what is left, and the next round would be the same
            return worst if should_stop() else 0.0
        problem.columns.add_product(core.index[moved], (x - before)[moved], self.g)
        self.x[core.index] = x
        return worst

    def _working_set(self, t: float, size: int) -> tuple[IntArray, float]:
        """Fractional variables and the most violating ones of every block; also the largest violation."""
        x = self.x
        h = self.slope(t)
        excess = h - self.problem.threshold(h)
        fractional = (x > 0) & (x < 1)
        score = np.where(x == 0, -excess, np.where(fractional, np.abs(excess), excess))
        worst = float(score.max(initial=0.0))
        if worst <= 0:
            return np.zeros(0, dtype=np.int64), worst
        starts = self.problem.columns.starts
        per_block = max(8, min(size, _WORKING_LIMIT // max(starts.size - 1, 1)))
        chosen = []
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            inside = np.flatnonzero(fractional[start:stop])
            if inside.size > min(_FRACTIONAL_LIMIT, 4 * per_block):
                worst_first = np.argsort(-score[start:stop][inside], kind="stable")
                inside = inside[worst_first[: min(_FRACTIONAL_LIMIT, 4 * per_block)]]
            parts = [inside]
            rest = max(per_block - inside.size, per_block // 2) // 2
            for side in (x[start:stop] == 0, x[start:stop] == 1):
                candidates = np.flatnonzero(side)
                if candidates.size > rest:
                    values = -score[start:stop][candidates]
                    candidates = candidates[np.argpartition(values, rest)[:rest]]
                parts.append(candidates)
            chosen.append(start + np.concatenate(parts))
        return np.sort(np.concatenate(chosen)), worst
