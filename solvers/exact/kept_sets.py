"""Enumeration of the kept sets of a singular joint problem: its only proof, for no convex bound is above 0.

Room: exact, for the solver `exact`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from cbs_opt.instance import Instance
from cbs_opt.typing import BoolArray, FloatArray, IntArray

PAIRS_PER_SECOND = 5e7
"""Pairs of last members that a second sees, roughly."""

_DEPENDENT = 1e-11  # sets in which a member has a smaller share of H_ii left are skipped
_ROUNDING = 2e-15  # such a share, where the member depends on the others exactly and these are independent


class KeptSets:
    """All sets of k kept weights: the one that lowers ½ vᵀHv − bᵀv most, b = Hw, by rank-one updates.

    A set grows in the order of the columns; after each member the others hold their part of H and b that it does
    not explain, and the last two members are pairs in closed form. Sets whose H is singular to working precision
    lose no less than one of their subsets, which a regular set contains; they are skipped.

    Parameters
    ----------
    instance : Instance
        Without groups and first-order term.

    Attributes
    ----------
    gain : float
        Largest ½ b_Kᵀ H_KK⁻¹ b_K so far.
    kept : int64 (k,) or None
        Its set.
    least_pivot : float
        Smallest share of H_ii that a member of a set had left: rounding errors grow with its inverse.
    unclear : bool
        Whether a set was skipped that is only nearly dependent: it may be better than all others.
    work : float
        Estimated number of pairs in all.
    """

    def __init__(self, instance: Instance) -> None:
        curvature, n = instance.curvature, instance.n
        fixed = np.zeros(n, np.int8) if instance.fixed is None else instance.fixed
        self._stays = np.flatnonzero(fixed == -1)
        b = curvature.matmul(instance.weights)
        diagonal = curvature.diagonal()
        free = np.flatnonzero(fixed == 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            single = np.where(diagonal > 0, b**2 / diagonal, 0.0)[free]
        free = free[np.argsort(-single, kind="stable")]  # good sets first
        self._order: IntArray = np.concatenate([self._stays, free])
        H = np.zeros((n, n))
        for k in range(curvature.number_of_blocks):
            part = curvature.block_slice(k)
            H[part, part] = curvature.block(k)
        s = 1.0 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
        H = H * s[:, None] * s
        self._H, self._b = H[np.ix_(self._order, self._order)], (b * s)[self._order]
        self.number = n - instance.budget.total
        self.instance = instance
        self.gain, self.least_pivot, self.unclear = -np.inf, 1.0, False
        self.kept: IntArray | None = None
        m, r = free.size, self.number - self._stays.size
        self.work = float(math.comb(m, max(r, 0))) if r < 2 else float(math.comb(m, r - 2)) * m * m / 2

    def run(self, should_stop: Callable[[], bool]) -> bool:
        """Go through all sets; whether the end was reached."""
        H, b, base = self._H, self._b, 0.0
        least = 1.0
        for _ in range(self._stays.size):
            self._skip(H[0, :1], least)
            least = min(least, max(float(H[0, 0]), _DEPENDENT))
            H, b, base = self._eliminate(H, b, base, 0, stays=True)
        return self._grow(H, b, base, np.arange(self._stays.size, self._order.size), [], least, should_stop)

    def _skip(self, shares: FloatArray, least: float) -> None:
        """Note whether members with these shares of H_ii, after others with `least`, are nearly dependent."""
        noise = _ROUNDING / least
        small = shares[shares <= _DEPENDENT]
        self.unclear = self.unclear or bool(small.size and (noise > _DEPENDENT or small.max() > noise))

    def mask(self) -> BoolArray | None:
        """The best set as a selection, bool (n,), True = pruned; None before the first."""
        if self.kept is None:
            return None
        pruned = np.ones(self.instance.n, dtype=bool)
        pruned[self.kept] = False
        return pruned

    def _eliminate(
        self, H: FloatArray, b: FloatArray, base: float, i: int, stays: bool = False
    ) -> tuple[FloatArray, FloatArray, float]:
        """H and b of the columns after i once i is kept, and the gain with it.

        −∞ where the others determine i; what must stay is kept without gain then.
        """
        pivot, rest = float(H[i, i]), slice(i + 1, None)
        if pivot <= _DEPENDENT:
            return H[rest, rest], b[rest], base if stays else -np.inf
        self.least_pivot = min(self.least_pivot, pivot)
        row, share = H[i, rest], float(b[i]) / pivot
        return H[rest, rest] - np.outer(row, row / pivot), b[rest] - row * share, base + 0.5 * float(b[i]) * share

    def _grow(
        self,
        H: FloatArray,
        b: FloatArray,
        base: float,
        index: IntArray,
        chosen: list[int],
        least: float,
        halt: Callable[[], bool],
    ) -> bool:
        left = self.number - self._stays.size - len(chosen)
        if left <= 2:
            self._finish(H, b, base, index, chosen, left, least)
            return not halt()
        for i in range(b.size - left + 1):
            inner, rest, gain = self._eliminate(H, b, base, i)
            if not np.isfinite(gain):
                self._skip(H[i, i : i + 1], least)
                continue
            chosen_now, least_now = [*chosen, int(index[i])], min(least, float(H[i, i]))
            if not self._grow(inner, rest, gain, index[i + 1 :], chosen_now, least_now, halt):
                return False
        return True

    def _finish(
        self,
        H: FloatArray,
        b: FloatArray,
        base: float,
        index: IntArray,
        chosen: list[int],
        left: int,
        least: float,
    ) -> None:
        """The best choice of the last members, at most two."""
        last: list[int] = []
        gain = base
        a = H.diagonal()
        if left == 1:
            gains = np.where(a > _DEPENDENT, b**2 / np.where(a > _DEPENDENT, a, 1.0), 0.0)
            self.least_pivot = min(self.least_pivot, float(a[a > _DEPENDENT].min(initial=1.0)))
            self._skip(a, least)
            last = [int(np.argmax(gains))]
            gain += 0.5 * float(gains[last[0]])
        elif left == 2:
            i, j = np.triu_indices(b.size, 1)
            c, ai, aj = H[i, j], a[i], a[j]
            det = ai * aj - c * c
            regular = (ai > _DEPENDENT) & (aj > _DEPENDENT) & (det > _DEPENDENT * np.maximum(ai, aj))
            largest = np.maximum(ai, aj)
            shares = det / np.where(largest > _DEPENDENT, largest, 1.0)
            self._skip(a, least)
            self._skip(shares[(ai > _DEPENDENT) & (aj > _DEPENDENT)], least)
            self.least_pivot = min(self.least_pivot, float(shares[regular].min(initial=1.0)))
            top = b[i] ** 2 * aj + b[j] ** 2 * ai - 2.0 * b[i] * b[j] * c
            gains = np.where(regular, top / np.where(regular, det, 1.0), -np.inf)
            if not gains.size:
                return
            at = int(np.argmax(gains))
            last, gain = [int(i[at]), int(j[at])], gain + 0.5 * float(gains[at])
        if gain > self.gain:
            self.gain = gain
            members = [*range(self._stays.size), *chosen, *(int(index[x]) for x in last)]
            self.kept = self._order[members]
