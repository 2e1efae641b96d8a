"""Lower bounds on the joint loss, over all blocks under one budget or one per group."""

from __future__ import annotations

import numpy as np

from cbs_opt.instance import Instance
from cbs_opt.monitor import Monitor
from cbs_opt.typing import FloatArray


def dual_bound(instance: Instance, D: FloatArray, u: FloatArray) -> tuple[float, FloatArray]:
    """A lower bound on the joint loss of every feasible selection, and an ascent direction.

    With R = H − D and any u, ½dᵀRd ≥ (Ru)ᵀd − ½uᵀRu, so that gᵀd + ½dᵀHd is at least a separable function of d,
    which is minimised weight by weight: kept weights at −v²/2D, v = Ru + g, pruned ones at ½D(w̄ − v/D)² more. The
    budget takes the smallest of these, in every group. This is the Lagrangian dual of the perspective relaxation
    of the joint problem for the split H = R + D.

    Parameters
    ----------
    instance : Instance
    D : float64 (n,)
        From `Curvature.diagonal_split`.
    u : float64 (n,)
        A displacement; that of a good selection is a good start.

    Returns
    -------
    bound : float
        Reduced by a bound on the rounding of the sums.
    direction : float64 (n,)
        Toward a better u, in the metric of R. O(m n) for a gradient factor, O(Σ b_k²) for dense blocks.
    """
    Ru = instance.curvature.matmul(u) - D * u
    v = Ru if instance.linear is None else Ru + instance.linear
    excess = 0.5 * D * (instance.weights - v / D) ** 2
    pruned = instance.budget.cheapest(excess, instance.fixed)
    quadratic, kept = 0.5 * float(u @ Ru), v**2 / (2.0 * D)
    bound = -quadratic - float(kept.sum()) + float(excess[pruned].sum())
    rounding = 1e-14 * (float(np.abs(u * Ru).sum()) + float(kept.sum()) + float(excess[pruned].sum()))
    return bound - rounding, np.where(pruned, -instance.weights, -v / D) - u


def improve_bound(
    instance: Instance, start: FloatArray, objective: float, monitor: Monitor, steps: int, seconds: float
) -> None:
    """Ascend from `start`, float64 (n,), by Polyak steps toward `objective`, reporting every better bound.

    Parameters
    ----------
    instance : Instance
    start : float64 (n,)
        The displacement of the incumbent.
    objective : float
        The joint loss of the incumbent.
    monitor : Monitor
    steps : int
    seconds : float
        Time limit.
    """
    if steps == 0:
        return
    until = monitor.elapsed + seconds
    D = instance.curvature.diagonal_split(lambda: monitor.should_stop() or monitor.elapsed > until)
    if D is None:
        return
    nothing = np.zeros_like(start)  # its bound is never negative without a linear term
    best, _ = dual_bound(instance, D, nothing)
    monitor.report_bound(best)
    u, best_u = start.copy(), start
    ambition, idle = 0.5, 0
    for _ in range(steps):
        if monitor.should_stop() or monitor.elapsed > until:
            break
        bound, direction = dual_bound(instance, D, u)
        if bound > best + 1e-6 * abs(best):
            best, best_u, idle = bound, u, 0
            monitor.report_bound(bound)
        else:
            idle += 1
            if idle == 10:
                ambition, idle, u = ambition / 2, 0, best_u
                continue
        curvature = float(direction @ (instance.curvature.matmul(direction) - D * direction))
        missing = ambition * max(objective - bound, 1e-6 * abs(objective))
        if curvature <= 0 or ambition < 1e-3:
            break
        u = u + min(1.0, missing / curvature) * direction
