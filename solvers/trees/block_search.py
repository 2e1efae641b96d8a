"""Many components under one budget: tables of bounds joined by dynamic programming and a Lagrangian bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cbs_opt.solvers.kernels.choice_knapsack import cheapest_entries
from cbs_opt.solvers.trees.tables import Table
from cbs_opt.typing import FloatArray, Int8Array, IntArray

_FIRST_NODES = 400
_PATIENCE = 5  # rounds after which the nodes of a table's tree grow


def multiplier(tables: list[FloatArray], budget: int) -> tuple[float, float]:
    """The price μ of a pruned weight that maximises Σ min_j (F(j) − μ j) + μ budget, and that bound; bisection."""
    counts = [np.arange(F.size) for F in tables]
    finite = [np.abs(F[np.isfinite(F)]) for F in tables]
    size = max([float(F.max()) for F in finite if F.size] + [1e-300])
    low, high = -4 * size, 4 * size
    best, best_mu = -np.inf, 0.0
    for _ in range(80):
        mu = 0.5 * (low + high)
        total, number = mu * budget, 0
        for F, j in zip(tables, counts, strict=True):
            reduced = F - mu * j
            at = int(np.argmin(reduced))
            total += float(reduced[at])
            number += at
        if total > best:
            best, best_mu = total, mu
        if number > budget:
            high = mu
        elif number < budget:
            low = mu
        else:
            break
    return best_mu, best


def combine(tables: list[FloatArray], budget: int, mu: float, slack: float) -> tuple[float, IntArray]:
    """Dynamic programme over the entries whose reduced cost at μ is at most `slack`; value and entry per table."""
    first, parts = [], []
    for F in tables:
        reduced = F - mu * np.arange(F.size)
        limit = reduced.min() + max(slack, 0.0)
        allowed = np.flatnonzero(reduced <= limit)
        a, b = int(allowed[0]), int(allowed[-1])
        first.append(a)
        parts.append(np.where(reduced[a : b + 1] <= limit, F[a : b + 1], np.inf))
    low = np.array(first, np.int64)
    count = np.array([part.size for part in parts], np.int64)
    rest = budget - int(low.sum())
    if rest < 0 or rest > int((count - 1).sum()):
        return np.inf, low
    starts = np.concatenate([[0], np.cumsum(count)[:-1]])
    choice = np.zeros((len(parts), rest + 1), np.int32)
    value, path = cheapest_entries(np.concatenate(parts), starts, count, rest, choice)
    return float(value), path + low


class BlockSearch:
    """Exact optimum over several components under one budget; the bound is valid whatever was closed.

    Parameters
    ----------
    tables : list of Table
        One a component, not yet built.
    budget : int
    tolerance : float
    threads : int
        Tables are worked on in parallel.
    """

    def __init__(self, tables: Sequence[Table], budget: int, tolerance: float, threads: int = 1) -> None:
        self.tables, self.budget, self.tolerance, self.threads = list(tables), budget, tolerance, threads
        self.built = False
        self.value, self.bound = np.inf, -np.inf
        self.path: IntArray | None = None
        self.rounds = self._nodes = 0

    @property
    def nodes(self) -> int:
        """Nodes so far."""
        return sum(table.nodes for table in self.tables)

    @property
    def open(self) -> int:
        """Table entries that are not closed."""
        if not self.built:
            return 1
        return sum(int((t.lower < t.upper * (1 - 1e-6)).sum()) for t in self.tables)

    def selection(self) -> Int8Array:
        """The incumbent over all components, int8 (Σ n,)."""
        assert self.path is not None
        parts = [table.pick(int(k)) for table, k in zip(self.tables, self.path, strict=True)]
        return np.concatenate(parts)

    def run(self, progress: Callable[[], bool], should_stop: Callable[[], bool]) -> None:
        """Tables, then rounds, until closed or told to stop.

        `progress` is asked after every round, in the caller's thread; `should_stop` from all threads.
        """
        with ThreadPoolExecutor(self.threads) as pool:

            def build(table: Table) -> bool:
                if should_stop():
                    return False
                table.build(should_stop)
                return True

            self.built = all(list(pool.map(build, self.tables)))
            if not self.built:
                return
            nodes, inner = _FIRST_NODES, 0.1 * self.tolerance
            while True:
                self.rounds += 1
                path = self._join()
                if progress() or should_stop() or self.bound >= self.value - self.tolerance * abs(self.value):
                    return
                pairs = [(table, int(k)) for table, k in zip(self.tables, path, strict=True)]
                work = [(t, k) for t, k in pairs if t.lower[k] < t.upper[k] - 2 * inner * abs(t.upper[k])]
                if not work:
                    # Each closed to the tolerance, but not their sum: closer.
                    inner *= 0.01
                    work = [(t, k) for t, k in pairs if t.lower[k] < t.upper[k]]
                    if not work or inner < 1e-13:
                        return
                before = [t.lower[k] for t, k in work]
                done = list(
                    pool.map(lambda at, tol=inner, limit=nodes: at[0].work(at[1], tol, limit, should_stop), work)
                )
                stuck = before == [t.lower[k] for t, k in work]
                if all(done) and stuck:  # as near as rounding allows at this tolerance
                    inner *= 0.01
                    if inner < 1e-13:
                        return
                elif not all(done) and (self.rounds % _PATIENCE == 0 or stuck):
                    nodes *= 4

    def _join(self) -> IntArray:
        """Bring value and bound up to date; the entries on which the bound rests."""
        upper, lower = [t.upper for t in self.tables], [t.lower for t in self.tables]
        mu_up, lagrange_up = multiplier(upper, self.budget)
        size = max(abs(lagrange_up), 1e-300)
        trial, value = 1e-2 * size, np.inf
        while not np.isfinite(value) and trial < 1e12 * size:
            value, path = combine(upper, self.budget, mu_up, trial)
            trial *= 10
        if not np.isfinite(value):
            value, path = combine(upper, self.budget, mu_up, np.inf)
        if np.isfinite(value):
            slack = (value - lagrange_up) * (1 + 1e-9) + 1e-13 * size
            better, better_path = combine(upper, self.budget, mu_up, slack)
            if better <= value:
                value, path = better, better_path
        if value < self.value:
            self.value, self.path = value, path
        mu, lagrange = multiplier(lower, self.budget)
        slack = np.inf
        if np.isfinite(self.value):
            slack = (self.value - lagrange) * (1 + 1e-9) + 1e-12 * abs(self.value)
        found, on = combine(lower, self.budget, mu, slack)
        # Nothing cheaper than the incumbent can use an entry that was left out.
        self.bound = max(self.bound, min(found, self.value))
        return self.path if self.path is not None and not np.isfinite(found) else on
