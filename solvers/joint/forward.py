"""Forward selection: the weights that lower the joint loss most, one after the other.

Room: joint; for `rank_deficient`, which starts from it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cbs_opt.instance import Instance
from cbs_opt.typing import BoolArray

_DETERMINED = 1e-10
"""Share of H_ii that the kept weights must leave of a weight that joins them."""


def select_forward(instance: Instance, should_stop: Callable[[], bool] = lambda: False) -> BoolArray:
    """Keep the weight with the largest exact gain, update the others, and again; bool (n,), True = pruned.

    With b = Hw − g the joint loss of the kept set K is a constant less ½ b_Kᵀ H_KK⁻¹ b_K: the columns of a pivoted
    Cholesky factorisation of H give the gain of every further weight. H may be singular. Orthogonal least squares
    in regression (Chen, Billings, Luo, 1989).

    Parameters
    ----------
    instance : Instance
    should_stop : callable
        Asked after each weight; the rest is kept in the order of its gain then.

    Returns
    -------
    bool (n,)
        Meets the budget, the groups and `fixed`. O(n k) time and memory for k kept weights, besides a column of H
        for each.
    """
    curvature, n = instance.curvature, instance.n
    group = instance.budget.group_of(n)
    left = instance.budget.group_sizes(n) - instance.budget.per_group  # to keep
    fixed = np.zeros(n, np.int8) if instance.fixed is None else instance.fixed
    diagonal = curvature.diagonal()
    d = curvature.matmul(instance.weights)
    if instance.linear is not None:
        d = d - instance.linear
    a, pruned = diagonal.copy(), np.ones(n, dtype=bool)
    rows = np.zeros((int(left.sum()), n))
    count = 0

    def keep(i: int) -> None:
        nonlocal count, a, d
        pruned[i] = False
        left[group[i]] -= 1
        if a[i] <= _DETERMINED * diagonal[i]:
            return  # determined by the others: it adds nothing
        k = int(np.searchsorted(curvature.offsets, i, side="right")) - 1
        part = curvature.block_slice(k)
        column = np.zeros(n)
        column[part] = curvature.columns(k, np.array([i - part.start]))[:, 0]
        row = (column - rows[:count, i] @ rows[:count]) / np.sqrt(a[i])
        rows[count] = row
        count += 1
        d = d - row * (d[i] / np.sqrt(a[i]))
        a = a - row**2

    for i in np.flatnonzero(fixed == -1).tolist():
        keep(i)
    while left.any() and not should_stop():
        able = pruned & (fixed == 0) & (left > 0)[group]
        gains = np.where(a > _DETERMINED * diagonal, d**2 / np.where(a > 0, a, 1.0), 0.0)
        keep(int(np.argmax(np.where(able, gains, -1.0))))
    if left.any():
        gains = d**2 / np.where(diagonal > 0, diagonal, 1.0)
        return instance.budget.cheapest(np.where(pruned, gains, np.inf), instance.fixed)
    return pruned
