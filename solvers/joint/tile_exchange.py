"""Joint search with cross groups on blocks of any form: exchanges of four weights of a tile, priced exactly.

Room: joint, for `swap_search`; layers whose rows share Hessians have a faster search, `layers.tiled_search`.
"""

from __future__ import annotations

import logging

import numpy as np

from cbs_opt.instance import Instance
from cbs_opt.linalg import inverse_pd
from cbs_opt.losses import joint_loss
from cbs_opt.monitor import Monitor
from cbs_opt.result import Status
from cbs_opt.solver import Context
from cbs_opt.solvers.joint.lagrangian_bound import improve_bound
from cbs_opt.typing import BoolArray, FloatArray, IntArray
from cbs_opt.update import best_update

logger = logging.getLogger("cbs_opt")

_MOST_ENTRIES = 1 << 26  # of the tableaus of all blocks
_MOST_EXCHANGES = 1 << 22
_GAIN = 1e-9  # smallest improvement that counts, relative to the loss
_KICKS = 10  # perturbations of the incumbent in a run without a limit
_KICK = 3  # random exchanges of each


class TileExchange:
    """The tableau of every block at a selection, and the prices of all exchanges.

    An exchange takes two rows and two columns of a tile in which the weights on one diagonal are kept and those on
    the other are pruned; all four change sides. With kept weights Q and pruned ones P the tableau of a block holds
    T = H_QQ⁻¹, U = H_PQ T and A = H_PP − U H_QP, with x = T (Hw − g)_Q and d = (Hw − g)_P − H_PQ x. The pruned
    pair I returns, which lowers the doubled loss by d_Iᵀ A_II⁻¹ d_I, and then the kept pair J leaves, at the price
    x'_Jᵀ T'_JJ⁻¹ x'_J with x'_J = x_J − U_IJᵀ A_II⁻¹ d_I and T'_JJ = T_JJ + U_IJᵀ A_II⁻¹ U_IJ.

    Parameters
    ----------
    instance : Instance
        With cross groups, H positive definite.

    Raises
    ------
    numpy.linalg.LinAlgError
        H is singular.
    """

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        curvature = instance.curvature
        self.sizes, self.starts = curvature.block_sizes, curvature.offsets[:-1]
        self.block_of = np.repeat(np.arange(self.sizes.size), self.sizes)
        self.flat_starts = np.concatenate([[0], np.cumsum(self.sizes**2)])
        self.M = np.zeros(int(self.flat_starts[-1]))
        self.values = np.zeros(instance.n)  # x of kept weights, d of pruned ones
        self.b = np.zeros(instance.n)
        for k in range(self.sizes.size):
            part = curvature.block_slice(k)
            self.b[part] = curvature.block(k) @ instance.weights[part]
        if instance.linear is not None:
            self.b -= instance.linear
        self.exchanges = _exchanges(instance)
        self.pruned = np.zeros(instance.n, dtype=bool)

    def start_from(self, pruned: BoolArray) -> None:
        """Factorise all blocks at a selection; O(Σ b³)."""
        self.pruned = pruned.copy()
        for k in range(self.sizes.size):
            self._factorise(k)

    def _factorise(self, k: int) -> None:
        part = self.instance.curvature.block_slice(k)
        H, P, Q = self.instance.curvature.block(k), *map(np.flatnonzero, (self.pruned[part], ~self.pruned[part]))
        T = inverse_pd(H[np.ix_(Q, Q)]) if Q.size else np.zeros((0, 0))
        if T is None:
            raise np.linalg.LinAlgError("the Hessian of the kept weights is singular")
        U = H[np.ix_(P, Q)] @ T
        M = self.M[self.flat_starts[k] : self.flat_starts[k + 1]].reshape(H.shape)
        M[np.ix_(Q, Q)], M[np.ix_(P, Q)], M[np.ix_(Q, P)] = T, U, U.T
        M[np.ix_(P, P)] = H[np.ix_(P, P)] - U @ H[np.ix_(Q, P)]
        x = T @ self.b[part][Q]
        values = np.zeros(H.shape[0])
        values[Q], values[P] = x, self.b[part][P] - H[np.ix_(P, Q)] @ x
        self.values[part] = values

    def _entries(self, i: IntArray, j: IntArray) -> FloatArray:
        """Entries of the tableaus, 0 between blocks."""
        k = self.block_of[i]
        at = self.flat_starts[k] + (i - self.starts[k]) * self.sizes[k] + j - self.starts[k]
        same = k == self.block_of[j]
        return np.where(same, self.M[np.where(same, at, 0)], 0.0)

    def possible(self) -> IntArray:
        """The exchanges of the present selection: the kept pair, then the pruned pair; int64 (e, 4)."""
        # Columns of `exchanges`: the upper row, then the lower one.
        out = self.pruned[self.exchanges]
        fits = (out[:, 0] == out[:, 3]) & (out[:, 1] == out[:, 2]) & (out[:, 0] != out[:, 1])
        four, first_pruned = self.exchanges[fits], out[fits, 0]
        return np.asarray(np.where(first_pruned[:, None], four[:, [1, 2, 0, 3]], four[:, [0, 3, 1, 2]]))

    def prices(self, four: IntArray) -> FloatArray:
        """The change of the doubled loss by each exchange, float64 (e,); O(e)."""
        j1, j2, i1, i2 = four.T
        a11, a22, a12 = self._entries(i1, i1), self._entries(i2, i2), self._entries(i1, i2)
        det = np.maximum(a11 * a22 - a12 * a12, 1e-300)
        d1, d2 = self.values[i1], self.values[i2]
        s1, s2 = (a22 * d1 - a12 * d2) / det, (a11 * d2 - a12 * d1) / det
        u11, u12 = self._entries(i1, j1), self._entries(i1, j2)
        u21, u22 = self._entries(i2, j1), self._entries(i2, j2)
        x1 = self.values[j1] - u11 * s1 - u21 * s2
        x2 = self.values[j2] - u12 * s1 - u22 * s2
        v11, v21 = (a22 * u11 - a12 * u21) / det, (a11 * u21 - a12 * u11) / det  # A_II⁻¹ of the column of j1
        v12, v22 = (a22 * u12 - a12 * u22) / det, (a11 * u22 - a12 * u12) / det
        t11 = self._entries(j1, j1) + u11 * v11 + u21 * v21
        t22 = self._entries(j2, j2) + u12 * v12 + u22 * v22
        t12 = self._entries(j1, j2) + u11 * v12 + u21 * v22
        det = np.maximum(t11 * t22 - t12 * t12, 1e-300)
        cost = (t22 * x1 * x1 - 2.0 * t12 * x1 * x2 + t11 * x2 * x2) / det
        return np.asarray(cost - d1 * s1 - d2 * s2)

    def make(self, four: IntArray) -> None:
        """Let four weights change sides; O(b³) for their blocks."""
        self.pruned[four] = ~self.pruned[four]
        for k in np.unique(self.block_of[four]).tolist():
            self._factorise(k)


def search_tiles(instance: Instance, context: Context, bound_steps: int) -> Status:
    """Magnitude, OBS and a warm start; descent from the best, and from perturbations of the incumbent; a bound.

    An iteration is an exchange.

    Parameters
    ----------
    instance : Instance
        With cross groups, H positive definite.
    context : Context
    bound_steps : int
        Of the ascent to a lower bound.
    """
    monitor, budget = context.monitor, instance.budget

    def report(pruned: BoolArray) -> None:
        monitor.report(joint_loss(instance, pruned), pruned)

    report(budget.cheapest(np.abs(instance.weights), instance.fixed))
    if context.warm_start is not None:
        report(context.warm_start)
    if instance.linear is None:
        monitor.report_bound(0.0)
    if not monitor.should_stop():
        report(budget.cheapest(instance.weights**2 / instance.curvature.inverse_diagonal(), instance.fixed))
    if monitor.should_stop():
        return Status.CONVERGED
    entries = float((instance.curvature.block_sizes.astype(np.float64) ** 2).sum())
    if max(entries / _MOST_ENTRIES, _number_of_exchanges(instance) / _MOST_EXCHANGES) > 1:
        logger.warning(
            "joint: cross groups on blocks without rows that share a Hessian, too large for exchanges: the better "
            "of magnitude and OBS is the answer"
        )
    else:
        try:
            _search(instance, context)
        except np.linalg.LinAlgError as error:
            logger.warning(f"joint: {error}; the search ends here")
    if not monitor.should_stop() and bound_steps:
        assert monitor.pruned is not None and monitor.objective is not None
        displacement = best_update(instance, monitor.pruned) - instance.weights
        improve_bound(
            instance, displacement, monitor.objective, monitor, bound_steps, min(10.0, monitor.remaining)
        )
    return Status.OPTIMAL if monitor.closed else Status.CONVERGED


def _search(instance: Instance, context: Context) -> None:
    """Descent from the incumbent, then from perturbations of it."""
    monitor, rng, state = context.monitor, context.rng(), TileExchange(instance)
    assert monitor.pruned is not None
    state.start_from(monitor.pruned)
    _descend(state, monitor)
    kicks = _KICKS
    while kicks and not monitor.should_stop() and state.possible().size:
        kicks -= not monitor.stop.limits_work
        state.start_from(monitor.pruned)
        for _ in range(_KICK):
            if monitor.should_stop():
                break
            state.make(rng.choice(state.possible()))
            monitor.advance()
        _descend(state, monitor)


def _descend(state: TileExchange, monitor: Monitor) -> None:
    """Make the best exchange as long as it gains."""
    while not monitor.should_stop():
        four = state.possible()
        loss = joint_loss(state.instance, state.pruned)
        monitor.report(loss, state.pruned.copy())
        if not four.size:
            return
        prices = state.prices(four)
        best = int(np.argmin(prices))
        if not prices[best] < -2 * _GAIN * abs(loss):
            return
        state.make(four[best])
        monitor.advance()
    monitor.report(joint_loss(state.instance, state.pruned), state.pruned.copy())


def _number_of_exchanges(instance: Instance) -> float:
    shapes = [part.index.shape for part in instance.budget.tiles]
    return float(sum(T * a * (a - 1) // 2 * b * (b - 1) // 2 for T, a, b in shapes))


def _exchanges(instance: Instance) -> IntArray:
    """Two rows and two columns of every tile without fixed weights: (upper left, right, lower left, right)."""
    found = [np.zeros((0, 4), dtype=np.int64)]
    for part in instance.budget.tiles:
        _, a, b = part.index.shape
        pairs = np.triu_indices(a, 1), np.triu_indices(b, 1)
        rows = [np.repeat(row, pairs[1][0].size) for row in pairs[0]]
        columns = [np.tile(column, pairs[0][0].size) for column in pairs[1]]
        corners = [part.index[:, row, column] for row in rows for column in columns]
        found.append(np.stack(corners, axis=2).reshape(-1, 4))
    out = np.concatenate(found)
    if instance.fixed is not None:
        out = out[(instance.fixed[out] == 0).all(axis=1)]
    return out
