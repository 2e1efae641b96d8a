"""How much of the budget each stage prunes."""

from __future__ import annotations

import numpy as np

from cbs_opt.budget import Budget
from cbs_opt.typing import IntArray

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


def part_of(budget: Budget, part: float, seed: int = 0) -> Budget:
    """A budget for an earlier stage: the given part of each group's, in whole numbers.

    Parameters
    ----------
    budget : Budget
    part : float
        0 … 1.
    seed : int
        Which groups get one more is drawn where their remainders are equal, as in N:M patterns; the same for all
        parts, so that no group loses weights from one stage to the next.

    Returns
    -------
    Budget
        Of ⌈part · total⌉ weights.
    """
    # The product of a decimal fraction and a number may exceed a whole number by a rounding error.
    total = min(budget.total, int(np.ceil(part * budget.total * (1 - 1e-12))))
    if budget.groups is None or budget.group_budgets is None:
        return Budget(total)
    wanted = part * np.asarray(budget.group_budgets, dtype=np.float64)
    counts: IntArray = np.floor(wanted + 1e-9).astype(np.int64)
    left = total - int(counts.sum())
    ties = np.random.default_rng(seed).permutation(counts.size)
    order = np.lexsort((ties, -(wanted - counts)))
    order = order[counts[order] < np.asarray(budget.group_budgets)[order]]
    counts[order[: max(left, 0)]] += 1
    return Budget(int(counts.sum()), budget.groups, counts)
