"""Weights that `fixed` and the budgets of groups decide before any solver starts; equations of the others."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cbs_opt.instance import Instance
from cbs_opt.typing import BoolArray, FloatArray, Int8Array, IntArray


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


def open_sums(instance: Instance, index: IntArray, base: BoolArray) -> list[tuple[IntArray, int]]:
    """The equations Σ y = p of groups, and cross groups if there are any, over the open weights.

    Parameters
    ----------
    instance : Instance
    index : int64 (r,)
        The open weights.
    base : bool (n,)
        The weights that are pruned in every selection.

    Returns
    -------
    list of (int64 (c,), int)
        Places in `index`, and how many of them to prune; equations without open weights are left out.
    """
    out = []
    for group, budgets in instance.budget.partitions(instance.n):
        left = budgets - np.bincount(group[base], minlength=budgets.size)
        of = group[index]
        parts = np.split(np.argsort(of, kind="stable"), np.cumsum(np.bincount(of, minlength=budgets.size))[:-1])
        out += [(members, int(p)) for members, p in zip(parts, left, strict=True) if members.size]
    return out


def cheapest_open(instance: Instance, index: IntArray, base: BoolArray, values: FloatArray) -> FloatArray:
    """The binary y of the open weights, float64 (r,), with the least sum of values that meets all budgets."""
    scores, fixed = np.zeros(instance.n), np.where(base, 1, -1).astype(np.int8)
    scores[index], fixed[index] = values, 0
    return instance.budget.cheapest(scores, fixed)[index].astype(np.float64)
