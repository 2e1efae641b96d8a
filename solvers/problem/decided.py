"""Weights that `fixed` and the budgets of groups decide before any solver starts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cbs_opt.instance import Instance
from cbs_opt.typing import BoolArray, Int8Array, IntArray


class Decided(NamedTuple):
    """The decided weights.

    Attributes
    ----------
    fixed : int8 (n,)
        1 pruned, −1 kept, 0 open.
    base : bool (n,)
        The pruned ones.
    left : int64 (G,)
        Number left to prune among the open weights of each group.
    """

    fixed: Int8Array
    base: BoolArray
    left: IntArray


def decide(instance: Instance) -> Decided:
    """Apply `fixed`, then keep the open weights of groups without a budget left, and prune groups that must go.

    O(n).
    """
    budget = instance.budget
    group = budget.group_of(instance.n)
    fixed = np.zeros(instance.n, dtype=np.int8) if instance.fixed is None else instance.fixed.copy()
    left = budget.per_group - np.bincount(group[fixed == 1], minlength=budget.number_of_groups)
    open_count = np.bincount(group[fixed == 0], minlength=left.size)
    free = fixed == 0
    fixed[free & (left == 0)[group]] = -1
    fixed[free & (left == open_count)[group]] = 1
    base = fixed == 1
    return Decided(fixed, base, budget.per_group - np.bincount(group[base], minlength=left.size))
