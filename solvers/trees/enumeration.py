"""Enumeration of a whole joint problem where few weights are kept, or few pruned: by `prove`, beside its tree."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cbs_opt.solvers.kernels.counting import CANCELLATION, DONE, SAFE_PIVOT, best_set
from cbs_opt.solvers.trees.joint_diagonal import best_diagonal, least_pivot
from cbs_opt.typing import BoolArray, FloatArray

MOST_SETS = 3 * 10**10
"""Largest number of selections that are looked at: half a minute."""

SETS_PER_SECOND = 8e8
"""Roughly, in one thread, before prices exclude any."""

_PIECE = 10**8  # sets that a call of the kernel may look at: it cannot be interrupted
_NODE_SECONDS = 4e-10  # of a node of the tree, over the cube of its weights
_LARGEST_PRICED = 400  # weights up to which the relaxation that gives prices is quickly solved


def number_of_sets(n: int, keep: int) -> int:
    """Selections of n weights that keep `keep`."""
    return math.comb(n, keep) if 0 <= keep <= n else 0


def nodes_before(n: int, keep: int) -> int:
    """Nodes of a tree in about a quarter of the time that the enumeration takes: easy problems need fewer."""
    return int(0.25 * number_of_sets(n, keep) / SETS_PER_SECOND / (_NODE_SECONDS * n**3)) + 1


class Enumeration:
    """All selections of one dense joint problem with one budget.

    Parameters
    ----------
    A, H : float64 (n, n)
        Inverse of the Hessian, and the Hessian.
    w : float64 (n,)
        Free minimiser.
    keep : int
        Weights that stay, 0 < keep < n.
    value : float
        The loss of the incumbent: only better selections are looked for.

    Notes
    -----
    The side with fewer members is enumerated (`kernels.counting`), in one piece for every first member. The prices
    of the root's relaxation exclude sets.
    """

    def __init__(self, A: FloatArray, H: FloatArray, w: FloatArray, keep: int, value: float) -> None:
        n = w.size
        self._kept_side = keep <= n - keep
        self.members = keep if self._kept_side else n - keep
        self._prices, self._need, self._n = np.zeros(n), -1.0, n
        self._whole = 0.5 * float(w @ H @ w)
        if 12 < n <= _LARGEST_PRICED:
            self._set_prices(H, w, keep, value)
        order = np.argsort(-self._prices, kind="stable")
        matrix, linear = (H, H @ w) if self._kept_side else (A, w)
        self._order, self._prices = order, self._prices[order]
        self._matrix, self._linear = np.ascontiguousarray(matrix[np.ix_(order, order)]), linear[order]
        self._record = self._whole - value if self._kept_side else value
        least = (
            max(SAFE_PIVOT, CANCELLATION * self._whole / value) if self._kept_side and value > 0 else SAFE_PIVOT
        )
        self._floor = least * np.diag(self._matrix)
        self._checked = not self._kept_side or least_pivot(H) <= least
        self.safe, self.complete = True, False
        self._best: tuple[int, ...] | None = None
        self._lock = threading.Lock()

    def _set_prices(self, H: FloatArray, w: FloatArray, keep: int, value: float) -> None:
        """No selection that keeps T costs less than a constant minus its prices; with a margin for rounding."""
        try:
            d, u = best_diagonal(H, w, np.array([0, w.size]), np.array([keep]), value)
        except np.linalg.LinAlgError:
            return
        slope = H @ (u - w) - d * u
        price = 0.5 * slope**2 / d
        low = 0.5 * float((u - w) @ H @ (u - w)) - 0.5 * float(d @ u**2) - float(slope @ u)
        margin = 1e-9 * (abs(low) + self._whole + float(price.sum()))
        self._prices = price if self._kept_side else -price
        self._need = low - value - margin if self._kept_side else low - value - float(price.sum()) - margin

    def run(self, should_stop: Callable[[], bool], threads: int = 1) -> BoolArray | None:
        """Look at all sets; the best selection that beats the incumbent, bool (n,), True = pruned, or None.

        Afterwards `complete` says whether all were seen, with pivots at which their values can be trusted.
        """
        with ThreadPoolExecutor(threads) as pool:
            pieces = list(pool.map(lambda i: self._piece(i, should_stop), range(self._n - self.members + 1)))
        self.complete = all(pieces) and self.safe
        if self._best is None:
            return None
        pruned = np.full(self._n, self._kept_side)
        pruned[self._order[list(self._best)]] = not self._kept_side
        return pruned

    def _piece(self, i: int, should_stop: Callable[[], bool]) -> bool:
        """All sets whose first member is i; False when told to stop."""
        M, b, floor = self._matrix, self._linear, self._floor
        return self._grow(M, b, floor, self._prices, self._need, 0.0, (), i, should_stop)

    def _grow(
        self,
        M: FloatArray,
        b: FloatArray,
        floor: FloatArray,
        prices: FloatArray,
        need: float,
        base: float,
        chosen: tuple[int, ...],
        i: int,
        should_stop: Callable[[], bool],
    ) -> bool:
        """All sets that start with `chosen` and then column i of what is left; False when told to stop."""
        if should_stop() or not self.safe:
            return False
        sign = 1.0 if self._kept_side else -1.0
        first = self._n - b.size
        own, r = base + 0.5 * float(b[i] ** 2 / M[i, i]), self.members - len(chosen) - 1
        if prices[i : i + r + 1].sum() <= need or (not self._kept_side and own >= self._record):
            return True
        chosen = (*chosen, first + i)
        if r == 0:
            self._offer(own, chosen)
            return True
        rest = slice(i + 1, None)
        S = np.ascontiguousarray(M[rest, rest] - np.outer(M[i, rest], M[i, rest] / M[i, i]))
        slope = b[rest] - M[i, rest] * (b[i] / M[i, i])
        floor, need, prices = floor[rest], need - float(prices[i]), prices[rest]
        m, levels = slope.size, max(r - 3, 0)
        if not (np.diag(S) > floor).all():
            self.safe = False
            return False
        if number_of_sets(m, r) > _PIECE:
            return all(
                self._grow(S, slope, floor, prices, need, own, chosen, j, should_stop) for j in range(m - r + 1)
            )
        record, best = np.array([self._record - own]), np.zeros(r, np.int64)
        outcome, _, found = best_set(
            S, slope, prices, need, r, m, record, sign, MOST_SETS, floor, self._checked, np.empty((levels, m, m)),
            np.empty((levels, m)), np.empty(m), np.empty(m + 1), np.zeros(r, np.int64), best,
            np.zeros(r + 1, np.int64),
        )  # fmt: skip
        if found:
            self._offer(float(record[0]) + own, (*chosen, *(self._n - m + int(j) for j in best)))
        self.safe = self.safe and outcome == DONE
        return self.safe

    def _offer(self, value: float, members: tuple[int, ...]) -> None:
        """Keep a set if it is the best so far; another thread may have found a better one."""
        with self._lock:
            if (value - self._record) * (1.0 if self._kept_side else -1.0) > 0:
                self._record, self._best = value, members
