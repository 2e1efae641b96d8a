"""Selection with cross groups: exchanges of four weights of a tile, priced exactly.

Room: selection, for `search`.
"""

from __future__ import annotations

import numpy as np

from cbs_opt.instance import Instance
from cbs_opt.losses import selection_loss
from cbs_opt.result import Status
from cbs_opt.selection import SelectionObjective
from cbs_opt.solver import Context
from cbs_opt.solvers.kernels import loading
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.problem.tile_moves import (
    TileMoves,
    is_searchable,
    report_starts,
    search,
    seconds_for_bound,
)
from cbs_opt.solvers.selection.relaxation import Relaxation
from cbs_opt.typing import BoolArray, FloatArray, IntArray

_SIGNS = np.array([1.0, 1.0, -1.0, -1.0])  # of x in an exchange: the kept pair is pruned, the pruned pair returns
_ROUNDS = 50  # of the relaxation


class SelectionTiles(TileMoves):
    """The gradient of ½ xᵀQx + cᵀx at a selection; an exchange with signs s changes it by gᵀs + ½ sᵀQs."""

    def __init__(self, instance: Instance) -> None:
        super().__init__(instance)
        self.objective = SelectionObjective(instance)
        self.gradient = np.zeros(instance.n)
        for k in range(self.sizes.size):
            self.matrix(k)[:] = self.objective.block(k)

    def loss(self, pruned: BoolArray) -> float:
        """The selection loss of a selection."""
        return selection_loss(self.instance, pruned)

    def start_from(self, pruned: BoolArray) -> None:
        """The gradient at a selection; O(Σ b²)."""
        self.pruned = pruned.copy()
        self.gradient = self.objective.gradient(pruned.astype(np.float64))

    def prices(self, four: IntArray) -> FloatArray:
        """The change of the doubled loss by each of some exchanges, float64 (e,); O(e)."""
        out = 2.0 * (self.gradient[four] @ _SIGNS)
        for a in range(4):
            for b in range(4):
                out += _SIGNS[a] * _SIGNS[b] * self.entries(four[:, a], four[:, b])
        return np.asarray(out)

    def make(self, four: IntArray) -> None:
        """Let four weights change sides; O(b)."""
        for i, sign in zip(four.tolist(), _SIGNS.tolist(), strict=True):
            k = int(self.block_of[i])
            part = self.instance.curvature.block_slice(k)
            self.gradient[part] += sign * self.matrix(k)[:, i - part.start]
        self.pruned[four] = ~self.pruned[four]


def search_tiles(instance: Instance, context: Context) -> Status:
    """Magnitude, ½ w² H_ii, a warm start; descent from the best, a bound, and descents from perturbations.

    The bound is that of the convex relaxation without cross groups. An iteration is an exchange.
    """
    monitor = context.monitor

    def score() -> FloatArray:
        objective = SelectionObjective(instance)
        return np.asarray(0.5 * objective.diagonal + objective.c)

    if not report_starts(instance, context, selection_loss, score):
        return Status.CONVERGED

    def bound() -> None:
        until = monitor.elapsed + seconds_for_bound(monitor)

        def ended() -> bool:
            return monitor.should_stop() or monitor.elapsed > until

        if loading.wait("selection", should_stop=ended):
            relaxed = Relaxation(SelectionProblem(instance, context.threads))
            relaxed.solve(size=256, tolerance=1e-7, rounds=_ROUNDS, should_stop=ended)
            monitor.report_bound(relaxed.bound())

    if is_searchable(instance):
        search(SelectionTiles(instance), context, bound)
    return Status.OPTIMAL if monitor.closed else Status.CONVERGED
