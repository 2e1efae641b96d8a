"""Repairs of a binary point over many blocks: meet the budgets, trade weights between blocks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cbs_opt.solvers.selection.incumbent import GAIN, Incumbent
from cbs_opt.typing import FloatArray, IntArray


def _cheapest_of_blocks(point: Incumbent, cost: FloatArray, allowed: IntArray) -> IntArray:
    """The cheapest of the variables `allowed` in each block, cheapest block first."""
    order = allowed[np.argsort(cost[allowed], kind="stable")]
    _, first = np.unique(point.problem.columns.block_of[order], return_index=True)
    return order[np.sort(first)]


def _costs(point: Incumbent) -> FloatArray:
    """What flipping each variable alone adds to the objective."""
    problem = point.problem
    sign = 1.0 - 2.0 * point.y
    return 0.5 * problem.columns.diagonal + sign * (point.g + problem.linear)


def meet_budgets(point: Incumbent) -> None:
    """Flip the cheapest variables, at most one of a block at a time, until every group has its number."""
    problem = point.problem
    for g in range(problem.budget.size):
        group = problem.group == g
        while missing := int(problem.budget[g] - point.y[group].sum()):
            value = 0.0 if missing > 0 else 1.0
            allowed = np.flatnonzero(group & (point.y == value))
            flips = np.sort(_cheapest_of_blocks(point, _costs(point), allowed)[: abs(missing)])
            point.move(flips, np.full(flips.size, 1.0 - value))


def trade(point: Incumbent, should_stop: Callable[[], bool], rounds: int = 20) -> int:
    """Prune more of one block and less of another where that gains, many pairs of blocks at a time.

    There is no term between blocks, so that gains add up as long as each block takes part once. Returns the trades
    made.
    """
    problem = point.problem
    block_of = problem.columns.block_of
    made = 0
    for _ in range(rounds):
        before = made
        for g in range(problem.budget.size):
            group = problem.group == g
            cost = _costs(point)
            adds = _cheapest_of_blocks(point, cost, np.flatnonzero(group & (point.y == 0))).tolist()
            drops = _cheapest_of_blocks(point, cost, np.flatnonzero(group & (point.y == 1))).tolist()
            used: set[int] = set()
            flips: list[int] = []
            i = j = 0
            while i < len(adds) and j < len(drops):
                a, d = adds[i], drops[j]
                if block_of[a] in used:
                    i += 1
                elif block_of[d] in used or block_of[a] == block_of[d]:
                    j += 1
                elif cost[a] + cost[d] < -GAIN * abs(point.f):
                    used |= {int(block_of[a]), int(block_of[d])}
                    flips += [a, d]
                else:
                    break
            index = np.sort(np.array(flips, dtype=np.int64))
            point.move(index, 1.0 - point.y[index])
            made += len(flips) // 2
        if made == before or should_stop():
            break
    return made
