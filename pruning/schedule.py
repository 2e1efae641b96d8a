"""How much of the budget each stage prunes."""

from __future__ import annotations

import math

from cbs_opt.budget import Budget

SCHEDULES = ("cubic", "exponential", "linear")


def share(schedule: str, stage: int, stages: int, sparsity: float) -> float:
    """The part of the final budget that is pruned after a stage; with t = stage/stages:

    cubic 1 − (1 − t)³ [1]_; linear t; exponential (1 − (1 − s)ᵗ)/s, by which each stage prunes the same fraction
    of what is left [2]_.

    Parameters
    ----------
    schedule : {"cubic", "exponential", "linear"}
    stage : int
        1 … stages.
    stages : int
    sparsity : float
        s, the final one.

    References
    ----------
    .. [1] Zhu, Gupta: To prune, or not to prune, 2017.
    .. [2] Han, Pool, Tran, Dally: Learning both weights and connections, NeurIPS 2015.

    Examples
    --------
    >>> share("cubic", 1, 2, 0.9)
    0.875
    """
    t = stage / stages
    if t >= 1:
        return 1.0
    if schedule == "cubic":
        return 1.0 - (1.0 - t) ** 3
    if schedule == "linear" or sparsity < 1e-6:
        return t
    kept = max(1.0 - sparsity, 1e-6)
    return float((1.0 - kept**t) / (1.0 - kept))


def part_of(budget: Budget, part: float) -> Budget:
    """A budget for an earlier stage: ⌈part · total⌉ weights, groups in proportion, see `Budget.with_total`."""
    # The product of a decimal fraction and a number may exceed a whole number by a rounding error.
    return budget.with_total(min(budget.total, math.ceil(part * budget.total * (1 - 1e-12))))
