"""Products with a large gradient factor in threads, straight from the stored gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from cbs_opt.selection import SelectionObjective
from cbs_opt.solvers.kernels import sweeps_numba as kernels
from cbs_opt.solvers.kernels.threads import run_tasks
from cbs_opt.typing import BoolArray, FloatArray


class ThreadedFactor:
    """The functions of `SelectionObjective` for a gradient factor, in float64, without copies of the gradients.

    Parameters
    ----------
    problem : SelectionObjective
        Of an instance with a `GradientFactor`.
    threads : int
    """

    def __init__(self, problem: SelectionObjective, threads: int) -> None:
        curvature = problem.curvature.as_factor()
        assert curvature is not None
        self.problem, self.curvature, self.threads = problem, curvature, threads

    def _over_blocks(self, what: Callable[[int, FloatArray], None], delta: FloatArray) -> None:
        """Call what(k, G_k delta_k) for every block."""
        curvature = self.curvature

        def visit(k: int, halted: Callable[[], bool]) -> None:
            part = curvature.block_slice(k)
            r = np.empty(curvature.m)
            kernels.project(curvature.gradients, part.start, delta[part], r)
            what(k, r)

        tasks = [partial(visit, k) for k in range(curvature.number_of_blocks)]
        run_tasks(self.threads, tasks, lambda: False)

    def value(self, pruned: BoolArray) -> float:
        """½ xᵀQx + cᵀx at a selection, bool (n,)."""
        curvature = self.curvature
        delta = np.where(pruned, self.problem.w, 0.0)
        squares = np.zeros(curvature.number_of_blocks)

        def add(k: int, r: FloatArray) -> None:
            squares[k] = r @ r

        self._over_blocks(add, delta)
        quadratic = float(squares.sum()) / curvature.m + curvature.damping * float(delta @ delta)
        return 0.5 * quadratic + float(self.problem.c[pruned].sum())

    def product(self, x: FloatArray) -> FloatArray:
        """Qx, float64 (n,)."""
        curvature, w = self.curvature, self.problem.w
        delta = w * x
        out = np.empty(x.size)

        def back(k: int, r: FloatArray) -> None:
            part = curvature.block_slice(k)
            kernels.back_project(curvature.gradients, part.start, r, out[part])

        self._over_blocks(back, delta)
        return np.asarray(w * (out / curvature.m + curvature.damping * delta))
