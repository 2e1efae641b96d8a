"""The relaxation of large problems: coordinate descent in each block, in threads, coordinated by prices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from cbs_opt.solvers.kernels import selection_numba
from cbs_opt.solvers.kernels import sweeps_numba as kernels
from cbs_opt.solvers.kernels.threads import run_tasks
from cbs_opt.solvers.problem.columns import Columns, DenseBlock, DiagonalBlock, FactorBlock
from cbs_opt.typing import FloatArray, IntArray

_FULL_EVERY = 6  # sweeps between two that visit everything
_SHRINK = 0.3  # share of the largest possible change of a slope that a variable at a bound must exceed
_RATE = 10.0  # change of a price, relative, that a mismatch of all its weights asks for
_OFF = 1e-4  # mismatch of the budget, relative, at which a point may pass as converged


def _ignoring(what: Callable[[int], None], k: int, halted: Callable[[], bool]) -> None:
    what(k)


class Sweeps:
    """min ½ xᵀQx + cᵀx + t/2 Σ Q_ii x_i (1 − x_i) over the box, with given group sums in the limit.

    One price for each group replaces its budget, so that the blocks decouple; each keeps the residual
    Aᵀx of its factor (or Qx, where Q is dense), and a sweep sets every variable of it to its best value. Prices
    and blocks are coordinated by the sharing form of ADMM: a block is charged for moving its group sums during a
    sweep, and prices go up by `rate` times what is missing afterwards. Nothing depends on the order in which
    threads finish.

    Parameters
    ----------
    columns : Columns
    linear : float64 (r,)
    group : int64 (r,)
    budget : int64 (G,)
    x : float64 (r,)
        Start; any point of the box.
    threads : int

    Attributes
    ----------
    x : float64 (r,)
    price : float64 (G,)
    """

    def __init__(
        self,
        columns: Columns,
        linear: FloatArray,
        group: IntArray,
        budget: IntArray,
        x: FloatArray,
        threads: int,
        seed: int = 0,
    ) -> None:
        self.columns, self.linear, self.group = columns, linear, group
        self.budget = budget.astype(np.float64)
        self.threads = threads
        self.x = x.copy()
        rng = np.random.default_rng(seed)
        starts = columns.starts
        self.parts = [slice(int(starts[k]), int(starts[k + 1])) for k in range(starts.size - 1)]
        self.order = [rng.permutation(part.stop - part.start) for part in self.parts]
        self.active = [order.copy() for order in self.order]
        self.count = np.diff(starts)
        self.margin = np.zeros(len(self.parts))
        sizes = np.array(
            [np.bincount(group[part], minlength=budget.size) for part in self.parts], dtype=np.float64
        )
        self.share = np.maximum(sizes, 1e-9) / np.maximum(sizes.sum(axis=0), 1e-9)
        self.state: list[FloatArray] = [np.zeros(0)] * len(self.parts)
        self._visit(self._load, lambda: False)
        self.sizes = np.maximum(sizes.sum(axis=0), 1.0)
        self._start_prices()
        self.sweeps = 0

    def copy(self) -> Sweeps:
        """An independent copy; blocks are shared."""
        other = object.__new__(Sweeps)
        other.__dict__.update(self.__dict__)
        for name in ("x", "price", "rate", "count", "margin"):
            setattr(other, name, getattr(self, name).copy())
        other.state = [state.copy() for state in self.state]
        other.active = [active.copy() for active in self.active]
        return other

    def at(self, x: FloatArray) -> Sweeps:
        """A copy with another point, and the prices as they are."""
        other = self.copy()
        other.x = x.copy()
        other._visit(other._load, lambda: False)
        return other

    def _start_prices(self) -> None:
        """Prices at which as many weights as the budget would go if no two were coupled."""
        alone = 0.5 * self.columns.diagonal + self.linear
        self.price, self.typical = np.zeros(self.budget.size), np.zeros(self.budget.size)
        for g in range(self.budget.size):
            inside = self.group == g
            if inside.any():
                p = max(int(self.budget[g]) - 1, 0)
                self.price[g] = np.partition(alone[inside], p)[p]
                self.typical[g] = np.median(self.columns.diagonal[inside])
        self.rate = self._rate(0.0)

    def _visit(self, what: Callable[[int], None], should_stop: Callable[[], bool]) -> bool:
        return run_tasks(self.threads, [partial(_ignoring, what, k) for k in range(len(self.parts))], should_stop)

    def _load(self, k: int) -> None:
        """The state of block k from x."""
        block, x = self.columns.blocks[k], self.x[self.parts[k]]
        if isinstance(block, FactorBlock):
            index = np.flatnonzero(x)
            self.state[k] = selection_numba.combine_rows(block.rows, index, x[index])
        elif isinstance(block, DenseBlock):
            self.state[k] = block.Q @ x

    def gradient(self) -> FloatArray:
        """Qx, float64 (r,), from the states."""
        g = np.empty(self.x.size)

        def part(k: int) -> None:
            block, out, x = self.columns.blocks[k], g[self.parts[k]], self.x[self.parts[k]]
            if isinstance(block, FactorBlock):
                out[:] = block.ridge * x
                selection_numba.add_dots(block.rows, self.state[k], out)
            elif isinstance(block, DenseBlock):
                out[:] = self.state[k]
            else:
                out[:] = block.diagonal() * x

        self._visit(part, lambda: False)
        return g

    def value(self) -> float:
        """½ xᵀQx + cᵀx."""
        total = float(self.linear @ self.x)
        for block, part, state in zip(self.columns.blocks, self.parts, self.state, strict=True):
            x = self.x[part]
            if isinstance(block, FactorBlock):
                total += 0.5 * float(state @ state + block.ridge @ x**2)
            elif isinstance(block, DenseBlock):
                total += 0.5 * float(state @ x)
            else:
                total += 0.5 * float(block.diagonal() @ x**2)
        return total

    def harden(
        self, weights: Sequence[float], sweeps: int, should_stop: Callable[[], bool] = lambda: False
    ) -> bool:
        """Follow growing concave weights, in place, up to a binary point; returns whether it got there.

        The sum may be off by a few.
        """
        for t in weights:
            self.run(t, sweeps, 0.0, should_stop)
            if should_stop():
                return False
            if t >= 1 and not ((self.x > 0) & (self.x < 1)).any():
                break
        return True

    def off(self) -> float:
        """Largest mismatch of a group sum, relative to the size of the budget."""
        return float((np.abs(self._sums() - self.budget) / np.maximum(self.budget, 1.0)).max())

    def _sums(self) -> FloatArray:
        return np.bincount(self.group, self.x, self.budget.size).astype(np.float64)

    def run(self, t: float, sweeps: int, tolerance: float, should_stop: Callable[[], bool] = lambda: False) -> int:
        """Sweeps until one over everything gains less than `tolerance` of the objective, within the budget.

        Returns the sweeps made, fewer than `sweeps` when converged.
        """
        sums = self._sums()
        for made in range(sweeps):
            full = made % _FULL_EVERY == 0
            self.rate = self._rate(t)
            self.price = self.price + self.rate * (self.budget - sums)
            gain = self._sweep(t, full, should_stop)
            if gain is None:
                return sweeps
            self.sweeps += 1
            sums = self._sums()
            missing = self.budget - sums
            if t >= 1 and gain == 0 and not missing.any():
                return made
            if full and made:
                close = bool((np.abs(missing) <= _OFF * np.maximum(self.budget, 1.0)).all())
                if close and gain <= tolerance * max(abs(self.value()), 1e-300):
                    return made
        return sweeps

    def _rate(self, t: float) -> FloatArray:
        """What one missing weight adds to the price of its group."""
        return np.asarray(_RATE * np.maximum(np.abs(self.price), t * self.typical) / self.sizes)

    def _sweep(self, t: float, full: bool, should_stop: Callable[[], bool]) -> float | None:
        gains = np.zeros(len(self.parts))
        diagonal = self.columns.diagonal

        def visit(k: int) -> None:
            block, part, state = self.columns.blocks[k], self.parts[k], self.state[k]
            margin = _SHRINK * self.margin[k]
            if full:
                self.active[k][:] = self.order[k]
                self.count[k] = self.order[k].size
            before, x = state.copy(), self.x[part]
            start = x.copy() if isinstance(block, DenseBlock) else x
            rest = (
                diagonal[part],
                self.linear[part],
                self.group[part],
                self.price.copy(),
                self.rate / self.share[k],
                t,
                x,
                self.active[k],
                int(self.count[k]),
                np.inf if full and not self.sweeps else margin,
            )
            if isinstance(block, FactorBlock):
                self.count[k], gains[k] = kernels.sweep_factor(block.rows, block.ridge, state, *rest)
                self.margin[k] = np.linalg.norm(state - before)
            elif isinstance(block, DenseBlock):
                self.count[k], gains[k] = kernels.sweep_dense(block.Q, state, *rest)
                self.margin[k] = np.sqrt(max(float((state - before) @ (x - start)), 0.0))
            elif isinstance(block, DiagonalBlock):
                self.count[k], gains[k] = kernels.sweep_diagonal(*rest)

        return float(gains.sum()) if self._visit(visit, should_stop) else None
