"""Bulk exchanges on the joint loss of large blocks, where no tableau fits: H is never formed."""

from __future__ import annotations

import numpy as np

from cbs_opt.instance import Instance
from cbs_opt.losses import joint_loss
from cbs_opt.monitor import Monitor
from cbs_opt.solvers.joint.backward import DENSE_LIMIT
from cbs_opt.typing import BoolArray, FloatArray

_PASSES = 12
_SMALLEST = 8  # weights exchanged at once, below which a pass gives up


def exchange_in_bulk(
    instance: Instance, pruned: BoolArray, monitor: Monitor, least_kept: int = 0, loss: float | None = None
) -> BoolArray:
    """Swap many weights at once in every block of more than 5000, as long as the loss falls.

    A pass prices each removal at x²/2[H_KK⁻¹]_ii and each return at d²/2H_ii, exchanges the best pairs of every
    group together, and halves their number until the exact loss falls. H_ii is at least the Schur complement, so
    the price of a return underestimates its gain.

    Parameters
    ----------
    instance : Instance
    pruned : bool (n,)
        Feasible.
    monitor : Monitor
    least_kept : int
        Blocks that keep fewer weights are not changed.
    loss : float, optional
        The joint loss of `pruned`, where it is known.

    Returns
    -------
    bool (n,)
        At least as good. O(m² q) per trial for m gradients and q kept weights, O(m n) memory.
    """
    curvature = instance.curvature
    total = joint_loss(instance, pruned) if loss is None else loss
    for k in range(curvature.number_of_blocks):
        if curvature.block_sizes[k] <= DENSE_LIMIT:
            continue
        if int((~pruned[curvature.block_slice(k)]).sum()) < least_kept:
            continue
        here = _block_loss(instance, k, pruned)
        number = max(_SMALLEST, int(curvature.block_sizes[k]) // 50)
        for _ in range(_PASSES):
            if monitor.should_stop():
                break
            order_out, order_in = _prices(instance, k, pruned)
            while number >= _SMALLEST and not monitor.should_stop():
                trial = _exchange(instance, pruned, order_out, order_in, number)
                value = _block_loss(instance, k, trial)
                if value < here - 1e-9 * abs(here):
                    pruned, total, here = trial, total + value - here, value
                    monitor.report(total, pruned)
                    break
                number //= 2
            if number < _SMALLEST:
                break
    return pruned


def _block_loss(instance: Instance, k: int, pruned: BoolArray) -> float:
    """The joint loss of block k alone."""
    part = instance.curvature.block_slice(k)
    g = None if instance.linear is None else instance.linear[part]
    delta = instance.curvature.best_update(k, instance.weights[part], pruned[part], g)
    return 0.5 * instance.curvature.block_quadratic(k, delta) + (0.0 if g is None else float(g @ delta))


def _prices(instance: Instance, k: int, pruned: BoolArray) -> tuple[FloatArray, FloatArray]:
    """Rise by each removal and fall by each return, doubled, in block k; infinity and −infinity elsewhere."""
    curvature = instance.curvature
    part = curvature.block_slice(k)
    w, local = instance.weights[part], pruned[part]
    g = None if instance.linear is None else instance.linear[part]
    fixed = np.zeros(w.size) if instance.fixed is None else instance.fixed[part]
    delta = curvature.best_update(k, w, local, g)
    kept = np.flatnonzero(~local)
    rise, fall = np.full(instance.n, np.inf), np.full(instance.n, -np.inf)
    local_rise, local_fall = rise[part], fall[part]
    local_rise[kept] = (w + delta)[kept] ** 2 / curvature.conditional_inverse_diagonal(k, kept)
    residual = curvature.block_matmul(k, delta) + (0.0 if g is None else g)
    local_fall[local] = (residual**2 / np.maximum(curvature.diagonal()[part], 1e-300))[local]
    local_rise[fixed == -1] = np.inf
    local_fall[fixed == 1] = -np.inf
    return rise, fall


def _exchange(instance: Instance, pruned: BoolArray, rise: FloatArray, fall: FloatArray, number: int) -> BoolArray:
    """Exchange up to `number` weights: the cheapest removals with the largest returns of the same group."""
    out = pruned.copy()
    pairs: list[tuple[float, int, int]] = []
    for members in instance.budget.members(instance.n):
        leave = members[np.isfinite(rise[members])]
        come = members[np.isfinite(fall[members])]
        leave = leave[np.argsort(rise[leave], kind="stable")][:number]
        come = come[np.argsort(-fall[come], kind="stable")][:number]
        count = min(leave.size, come.size)
        pairs += zip(
            (rise[leave[:count]] - fall[come[:count]]).tolist(), leave.tolist(), come.tolist(), strict=False
        )
    for change, i, j in sorted(pairs)[:number]:
        if change < 0:
            out[i], out[j] = True, False
    return out
