"""Repairs of a binary point over many blocks: meet the budgets, exchange weights between blocks."""

from __future__ import annotations

import itertools
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
    """The change of the objective when each variable alone is flipped."""
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


def _best_pair(
    adds: list[int], drops: list[int], cost: FloatArray, block_of: IntArray, used: set[int]
) -> tuple[int, int] | None:
    """The cheapest addition and drop in two blocks that are not `used`, from lists with one of each block.

    Both lists are sorted by cost, the cheapest last; what is used there is removed from them.
    """
    for order in (adds, drops):
        while order and int(block_of[order[-1]]) in used:
            order.pop()
    if not adds or not drops:
        return None
    if block_of[adds[-1]] != block_of[drops[-1]]:
        return adds[-1], drops[-1]
    # Both cheapest lie in one block: the best pair has one of them, and the next of the other list.
    pairs = [(a, drops[-1]) for a in _second(adds, block_of, used)]
    pairs += [(adds[-1], d) for d in _second(drops, block_of, used)]
    return min(pairs, key=lambda pair: float(cost[pair[0]] + cost[pair[1]]), default=None)


def _second(order: list[int], block_of: IntArray, used: set[int]) -> list[int]:
    """The last but one of an unused block, as a list; empty without one."""
    return next(([i] for i in itertools.islice(reversed(order), 1, None) if int(block_of[i]) not in used), [])


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
            # Costly first, as what is done with is taken off the end.
            adds = _cheapest_of_blocks(point, cost, np.flatnonzero(group & (point.y == 0)))[::-1].tolist()
            drops = _cheapest_of_blocks(point, cost, np.flatnonzero(group & (point.y == 1)))[::-1].tolist()
            flips: list[int] = []
            used: set[int] = set()
            while pair := _best_pair(adds, drops, cost, block_of, used):
                if cost[pair[0]] + cost[pair[1]] >= -GAIN * abs(point.f):
                    break
                used |= {int(block_of[i]) for i in pair}
                flips += pair
            index = np.sort(np.array(flips, dtype=np.int64))
            point.move(index, 1.0 - point.y[index])
            made += len(flips) // 2
        if made == before or should_stop():
            break
    return made
