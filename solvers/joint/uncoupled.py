"""Uncoupled weights: each has its price, and nothing to update."""

from __future__ import annotations

import copy

import numpy as np

from cbs_opt.typing import BoolArray, FloatArray, IntArray

_NEVER = 1e300


class UncoupledWeights:
    """The weights of a block whose H is diagonal, with the interface of `Tableau`.

    Keeping weight i reduces the doubled loss by b_i²/H_ii, independently of the others.

    Parameters
    ----------
    values : float64 (n,)
        b_i²/H_ii.
    constant : float
        Doubled loss when none of them is kept.
    kept : bool (n,)
    group : int64 (n,)
    movable : bool (n,)

    Notes
    -----
    O(n) time per move and O(n) memory.
    """

    def __init__(
        self, values: FloatArray, constant: float, kept: BoolArray, group: IntArray, movable: BoolArray
    ) -> None:
        self.values, self.constant, self.group, self.movable = values, constant, group, movable
        self.tabu = np.zeros(values.size, dtype=bool)
        self.S, self.P = np.flatnonzero(kept), np.flatnonzero(~kept)

    @property
    def kept(self) -> BoolArray:
        """The kept set, bool (n,)."""
        mask = np.zeros(self.values.size, dtype=bool)
        mask[self.S] = True
        return mask

    @property
    def doubled(self) -> float:
        """The doubled loss."""
        return self.constant - float(self.values[self.S].sum())

    def refactor(self) -> float:
        """No rounding errors accumulate here."""
        return 0.0

    def copy(self) -> UncoupledWeights:
        """An independent copy."""
        other = copy.copy(self)
        other.S, other.P, other.tabu = self.S.copy(), self.P.copy(), self.tabu.copy()
        return other

    def restore(self, saved: UncoupledWeights) -> None:
        """Go back to an earlier `copy`; what is tabu stays."""
        self.S, self.P = saved.S.copy(), saved.P.copy()

    def forbid(self, weight: int, forbidden: bool) -> None:
        """Forbid a weight to move, or allow it again."""
        self.tabu[weight] = forbidden

    def removal_costs(self) -> FloatArray:
        """Rise of the doubled loss when each kept weight goes, float64 (q,)."""
        free = self.movable[self.S] & ~self.tabu[self.S]
        return np.where(free, self.values[self.S], _NEVER)

    def return_gains(self) -> FloatArray:
        """Fall of the doubled loss when each pruned weight comes back, float64 (p,); −1e300 where it may not."""
        free = self.movable[self.P] & ~self.tabu[self.P]
        return np.where(free, self.values[self.P], -_NEVER)

    def best_swap(self) -> tuple[int, int, float]:
        """The best swap inside its group: row r of P, column s of S, change of the doubled loss."""
        costs, gains = self.removal_costs(), self.return_gains()
        leaving, coming = self.group[self.S], self.group[self.P]
        best = (-1, -1, _NEVER)
        for group in np.intersect1d(leaving, coming).tolist():
            s = int(np.argmin(np.where(leaving == group, costs, np.inf)))
            r = int(np.argmax(np.where(coming == group, gains, -np.inf)))
            change = float(costs[s] - gains[r])
            if change < min(best[2], _NEVER / 2):
                best = (r, s, change)
        return best

    def swap(self, r: int, s: int) -> None:
        """Return row r to the kept weights in place of column s."""
        self.S[s], self.P[r] = self.P[r], self.S[s]

    def remove(self, s: int) -> None:
        """Prune column s."""
        self.S, self.P = np.delete(self.S, s), np.append(self.P, self.S[s])

    def bring_back(self, r: int) -> None:
        """Return row r to the kept weights."""
        self.S, self.P = np.append(self.S, self.P[r]), np.delete(self.P, r)
