"""Joint search with cross groups on blocks of any form: exchanges of four weights of a tile, priced exactly.

Room: joint, for `swap_search`; layers whose rows share Hessians have a faster search, `layers.tiled_search`.
"""

from __future__ import annotations

import logging
from contextlib import suppress

import numpy as np

from cbs_opt.instance import Instance
from cbs_opt.interrupt import Interrupted, checkpoint, interruptible
from cbs_opt.linalg import inverse_pd
from cbs_opt.losses import joint_loss
from cbs_opt.result import Status
from cbs_opt.solver import Context
from cbs_opt.solvers.joint.lagrangian_bound import improve_bound
from cbs_opt.solvers.problem.tile_moves import (
    TileMoves,
    is_searchable,
    report_starts,
    search,
    seconds_for_bound,
)
from cbs_opt.typing import BoolArray, FloatArray, IntArray
from cbs_opt.update import best_update

logger = logging.getLogger("cbs_opt")


class JointTiles(TileMoves):
    """The tableau of every block at a selection, and the prices of all exchanges.

    With kept weights Q and pruned ones P the tableau of a block holds T = H_QQ⁻¹, U = H_PQ T and
    A = H_PP − U H_QP, with x = T (Hw − g)_Q and d = (Hw − g)_P − H_PQ x. The pruned pair I of an exchange returns,
    which lowers the doubled loss by d_Iᵀ A_II⁻¹ d_I; then the kept pair J leaves, at the price x'_Jᵀ T'_JJ⁻¹ x'_J
    with x'_J = x_J − U_IJᵀ A_II⁻¹ d_I and T'_JJ = T_JJ + U_IJᵀ A_II⁻¹ U_IJ.

    Parameters
    ----------
    instance : Instance
        With cross groups, H positive definite.
    """

    def __init__(self, instance: Instance) -> None:
        super().__init__(instance)
        self.values = np.zeros(instance.n)  # x of kept weights, d of pruned ones
        self.b = np.zeros(instance.n)
        for k in range(self.sizes.size):
            part = instance.curvature.block_slice(k)
            self.b[part] = instance.curvature.block(k) @ instance.weights[part]
        if instance.linear is not None:
            self.b -= instance.linear

    def loss(self, pruned: BoolArray) -> float:
        """The joint loss of a selection."""
        return joint_loss(self.instance, pruned)

    def start_from(self, pruned: BoolArray) -> None:
        """Factorise all blocks at a selection; O(Σ b³). Raises `LinAlgError` where H is singular."""
        self.pruned = pruned.copy()
        for k in range(self.sizes.size):
            checkpoint()
            self._factorise(k)

    def _factorise(self, k: int) -> None:
        part = self.instance.curvature.block_slice(k)
        H, P, Q = self.instance.curvature.block(k), *map(np.flatnonzero, (self.pruned[part], ~self.pruned[part]))
        T = inverse_pd(H[np.ix_(Q, Q)]) if Q.size else np.zeros((0, 0))
        if T is None:
            raise np.linalg.LinAlgError("the Hessian of the kept weights is singular")
        U, M = H[np.ix_(P, Q)] @ T, self.matrix(k)
        M[np.ix_(Q, Q)], M[np.ix_(P, Q)], M[np.ix_(Q, P)] = T, U, U.T
        M[np.ix_(P, P)] = H[np.ix_(P, P)] - U @ H[np.ix_(Q, P)]
        x = T @ self.b[part][Q]
        values = np.zeros(H.shape[0])
        values[Q], values[P] = x, self.b[part][P] - H[np.ix_(P, Q)] @ x
        self.values[part] = values

    def prices(self, four: IntArray) -> FloatArray:
        """The change of the doubled loss by each exchange, float64 (e,); O(e)."""
        j1, j2, i1, i2 = four.T
        a11, a22, a12 = self.entries(i1, i1), self.entries(i2, i2), self.entries(i1, i2)
        det = np.maximum(a11 * a22 - a12 * a12, 1e-300)
        d1, d2 = self.values[i1], self.values[i2]
        s1, s2 = (a22 * d1 - a12 * d2) / det, (a11 * d2 - a12 * d1) / det
        u11, u12 = self.entries(i1, j1), self.entries(i1, j2)
        u21, u22 = self.entries(i2, j1), self.entries(i2, j2)
        x1 = self.values[j1] - u11 * s1 - u21 * s2
        x2 = self.values[j2] - u12 * s1 - u22 * s2
        v11, v21 = (a22 * u11 - a12 * u21) / det, (a11 * u21 - a12 * u11) / det  # A_II⁻¹ of the column of j1
        v12, v22 = (a22 * u12 - a12 * u22) / det, (a11 * u22 - a12 * u12) / det
        t11 = self.entries(j1, j1) + u11 * v11 + u21 * v21
        t22 = self.entries(j2, j2) + u12 * v12 + u22 * v22
        t12 = self.entries(j1, j2) + u11 * v12 + u21 * v22
        det = np.maximum(t11 * t22 - t12 * t12, 1e-300)
        cost = (t22 * x1 * x1 - 2.0 * t12 * x1 * x2 + t11 * x2 * x2) / det
        return np.asarray(cost - d1 * s1 - d2 * s2)

    def make(self, four: IntArray) -> None:
        """Let four weights change sides; O(b³) for their blocks."""
        self.pruned[four] = ~self.pruned[four]
        for k in np.unique(self.block_of[four]).tolist():
            self._factorise(k)


def search_tiles(instance: Instance, context: Context, bound_steps: int) -> Status:
    """Magnitude, OBS and a warm start; descent from the best, a bound, and descents from perturbations.

    An iteration is an exchange.

    Parameters
    ----------
    instance : Instance
        With cross groups, H positive definite.
    context : Context
    bound_steps : int
        Of the ascent to a lower bound.
    """
    monitor = context.monitor

    def score() -> FloatArray:
        return np.asarray(instance.weights**2 / instance.curvature.inverse_diagonal())

    if not report_starts(instance, context, joint_loss, score):
        return Status.CONVERGED

    def bound() -> None:
        assert monitor.pruned is not None and monitor.objective is not None
        displacement = best_update(instance, monitor.pruned) - instance.weights
        seconds = seconds_for_bound(monitor)
        improve_bound(instance, displacement, monitor.objective, monitor, bound_steps, seconds)

    if is_searchable(instance):
        try:
            with suppress(Interrupted), interruptible(monitor.should_stop):
                search(JointTiles(instance), context, bound)
        except np.linalg.LinAlgError as error:
            logger.warning(f"joint: {error}; the search ends here")
    return Status.OPTIMAL if monitor.closed else Status.CONVERGED
