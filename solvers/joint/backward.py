"""Backward elimination: greedy Optimal Brain Surgeon with exact updates, over all blocks under one budget."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import numpy as np

from cbs_opt.errors import UsageError
from cbs_opt.instance import Instance
from cbs_opt.losses import joint_loss
from cbs_opt.registry import register
from cbs_opt.result import Status
from cbs_opt.solver import Capabilities, Context, Parameters, Solver, option
from cbs_opt.solvers.joint.elimination import (
    LAZY_STEPS,
    CoupledElimination,
    Elimination,
    Removal,
    UncoupledElimination,
)
from cbs_opt.solvers.joint.thinning import thinning_of
from cbs_opt.solvers.kernels import loading
from cbs_opt.typing import BoolArray, FloatArray, IntArray

logger = logging.getLogger("cbs_opt")

DENSE_LIMIT = 5000
"""Coupled weights of a block that are eliminated exactly; larger blocks are first reduced in stages."""


@dataclass(frozen=True)
class BackwardParameters(Parameters):
    """How large blocks are reduced."""

    stage: float = option(0.1, "share of a large block's weights that a stage removes before it solves again")

    def __post_init__(self) -> None:
        if not 0 < self.stage < 1:
            raise UsageError(f"`stage` must be between 0 and 1, got {self.stage}")


@register("backward")
class BackwardElimination(Solver):
    """Remove the weight that costs least, update the others, and again; an iteration is a removal.

    Every block keeps the conditional inverse of its Hessian (ExactOBS: Frantar, Alistarh: Optimal Brain
    Compression, NeurIPS 2022). The budget runs over all blocks in the order of the losses, and over groups.
    A block of more than 5000 weights is first reduced in stages.
    """

    summary = "greedy removal with exact updates (ExactOBS), one budget over all blocks"
    supports = Capabilities(objectives=frozenset({"joint"}))
    parameters_type = BackwardParameters
    parameters: BackwardParameters

    def check_supports(self, instance: Instance, context: Context) -> None:
        """Refuse a singular Hessian."""
        super().check_supports(instance, context)
        instance.curvature.check_regular()

    def prepare(self, instance: Instance, context: Context) -> None:
        """Compile."""
        loading.wait("joint", should_stop=context.monitor.should_stop)

    def run(self, instance: Instance, context: Context) -> Status:
        """Eliminate; when stopped early, the cheapest of the remaining weights complete the selection."""
        pruned = eliminate(instance, self.parameters.stage, context.monitor.should_stop, context.workers)
        context.monitor.advance(instance.budget.total)
        context.monitor.report(joint_loss(instance, pruned), pruned)
        return Status.CONVERGED


def eliminate(
    instance: Instance,
    stage: float = 0.1,
    should_stop: Callable[[], bool] = lambda: False,
    threads: int = 1,
) -> BoolArray:
    """Backward elimination over all blocks; returns the pruned weights, bool (n,), within the budget.

    Parameters
    ----------
    instance : Instance
        H positive definite.
    stage : float
        For blocks of more than `DENSE_LIMIT` weights: share of them removed at once before the next solve.
    should_stop : callable
        Asked every `_LAZY_STEPS` removals.
    threads : int
        Blocks are worked on in parallel where there are several and no groups.

    Notes
    -----
    O(b³) time and O(b²) memory per block; for a large block with m gradients O(m² b) per stage.
    """
    open_budget = instance.budget.per_group.copy()
    group = instance.budget.group_of(instance.n)
    pruned = np.zeros(instance.n, dtype=bool)
    if instance.fixed is not None:
        pruned |= instance.fixed == 1
        open_budget -= np.bincount(group[pruned], minlength=open_budget.size)
    curvature = instance.curvature
    blocks = range(curvature.number_of_blocks)
    shared = open_budget.copy()
    coupled = [curvature.coupled(k) for k in blocks]
    prices = np.full(instance.n, np.inf)
    for k in blocks:
        _thin_out(instance, k, coupled[k], stage, pruned, open_budget, shared, prices, should_stop)
    if open_budget.any() and not should_stop():
        states: list[Elimination] = []
        for k in blocks:
            states += _states(instance, k, pruned, coupled[k])
        if instance.budget.groups is None:
            _merge_blocks(states, pruned, open_budget, should_stop, threads)
        else:
            _merge_groups(states, pruned, open_budget, should_stop)
    if open_budget.any():
        # Stopped before any elimination: the order of the last stage, or of the magnitudes.
        logger.info("stopped at the start of backward elimination: the smallest weights complete the selection")
        rest = np.where(pruned, 1, 0 if instance.fixed is None else np.minimum(instance.fixed, 0))
        scores = np.abs(instance.weights)
        if np.isfinite(prices).any():
            scores = np.where(np.isfinite(prices), prices, instance.weights**2 * curvature.diagonal())
        pruned = instance.budget.cheapest(scores, rest)
    return pruned


def _states(instance: Instance, k: int, pruned: BoolArray, coupled: BoolArray) -> list[Elimination]:
    """The weights of block k that are left: the uncoupled ones, and the coupled ones."""
    part = instance.curvature.block_slice(k)
    w, local = instance.weights[part], pruned[part]
    g = None if instance.linear is None else instance.linear[part]
    x = w + instance.curvature.best_update(k, w, local, g)
    states: list[Elimination] = []
    uncoupled, index = np.flatnonzero(~local & ~coupled), np.flatnonzero(~local & coupled)
    if uncoupled.size:
        states.append(UncoupledElimination(instance, k, uncoupled, x))
    if index.size:
        states.append(CoupledElimination(instance, k, index, x))
    return states


def _merge_blocks(
    states: list[Elimination],
    pruned: BoolArray,
    open_budget: IntArray,
    should_stop: Callable[[], bool],
    threads: int,
) -> None:
    """Eliminate every block by itself, in parallel, and take the removals in the order of their losses.

    When stopped, the remaining weights of a block follow in the order of their current prices.
    """
    goal = int(open_budget[0])
    uncoupled = [state.rest() for state in states if isinstance(state, UncoupledElimination)]
    fixed_prices = np.sort([price for made in uncoupled for price, _ in made])

    def trace(state: Elimination) -> list[Removal]:
        if isinstance(state, UncoupledElimination):
            return state.rest()[:goal]
        made: list[Removal] = []
        highest = -np.inf
        # Uncoupled weights that are cheaper than what has been removed come before it and need no step here.
        while (missing := goal - len(made) - int(np.searchsorted(fixed_prices, highest))) > 0:
            if should_stop():
                return made + state.rest()
            step = state.remove(min(LAZY_STEPS, missing))
            if not step:
                break
            made += step
            highest = max(highest, max(step)[0])
        return made

    with ThreadPoolExecutor(threads if len(states) > 1 else 1) as pool:
        traces = list(pool.map(trace, states))
    heap = [(made[0][0], k, 0) for k, made in enumerate(traces) if made]
    heapq.heapify(heap)
    while heap and open_budget[0]:
        _, k, position = heapq.heappop(heap)
        pruned[traces[k][position][1]] = True
        open_budget[0] -= 1
        if position + 1 < len(traces[k]):
            heapq.heappush(heap, (traces[k][position + 1][0], k, position + 1))


def _merge_groups(
    blocks: list[Elimination],
    pruned: BoolArray,
    open_budget: IntArray,
    should_stop: Callable[[], bool],
) -> None:
    """Remove the cheapest weight of all blocks whose group is open, one at a time; all at once when stopped."""
    holders: dict[int, list[Elimination]] = {}
    for block in blocks:
        for group in np.unique(block.group).tolist():
            holders.setdefault(group, []).append(block)
            if open_budget[group] == 0:
                block.close(group)
    heap = [(*block.cheapest(), k) for k, block in enumerate(blocks)]
    heapq.heapify(heap)
    for taken in count():
        if not (heap and open_budget.any()):
            return
        if taken % 16 == 0 and should_stop():
            break
        cost, j, k = heapq.heappop(heap)
        block = blocks[k]
        if cost == np.inf:
            continue
        if not block.removable[j]:  # its group has been closed in the meantime
            heapq.heappush(heap, (*block.cheapest(), k))
            continue
        group = block.group[j]
        ((_, weight),) = block.remove(1, j)
        pruned[weight] = True
        open_budget[group] -= 1
        if open_budget[group] == 0:
            for holder in holders[int(group)]:
                holder.close(int(group))
        heapq.heappush(heap, (*block.cheapest(), k))
    group_of: dict[int, int] = {}
    for block in blocks:
        group_of.update(zip(block.weight.tolist(), block.group.tolist(), strict=True))
    for _, weight in sorted(removal for block in blocks for removal in block.rest()):
        if open_budget[group_of[weight]]:
            pruned[weight] = True
            open_budget[group_of[weight]] -= 1


def _thin_out(
    instance: Instance,
    k: int,
    coupled: BoolArray,
    stage: float,
    pruned: BoolArray,
    open_budget: IntArray,
    shared: IntArray,
    prices: FloatArray,
    should_stop: Callable[[], bool],
) -> None:
    """Remove weights of a large block by stages until it is small enough or its share of the budget is used.

    A stage computes x and the diagonal of the conditional inverse and removes the cheapest weights together; its
    `prices`, float64 (n,), are left for the case that nothing else is known in the end. With several blocks a
    large one takes at most its share, by size, of `shared`, the budgets at the start; the common order of the
    losses decides on the rest.
    """
    part = instance.curvature.block_slice(k)
    size = part.stop - part.start
    if int(coupled.sum()) <= DENSE_LIMIT:
        return
    group = instance.budget.group_of(instance.n)[part]
    allowance = open_budget.copy()
    if instance.curvature.number_of_blocks > 1:
        share = np.bincount(group, minlength=open_budget.size) / instance.budget.group_sizes(instance.n).clip(1)
        allowance = np.minimum(np.floor(share * shared).astype(np.int64), open_budget)
    local = pruned[part]  # a view
    state = thinning_of(instance, k, np.flatnonzero(~local), coupled)
    stays = np.zeros(size, dtype=bool) if instance.fixed is None else instance.fixed[part] == -1
    while not should_stop():
        kept = np.flatnonzero(~local)
        excess = min(int((~local & coupled).sum()) - DENSE_LIMIT, int(allowance.sum()))
        if excess <= 0:
            return
        prices[part] = np.inf
        prices[part][kept] = np.where(stays[kept], np.inf, state.prices(kept))
        order = kept[np.argsort(prices[part][kept], kind="stable")]
        order = order[~stays[order]]
        # A stage's share of the coupled ones with all others that are cheaper, and of each group no more than its
        # allowance: the rank of a weight among its group's in the order.
        number = min(excess, max(1, int(stage * int((~local & coupled).sum()))))
        order = order[: int(np.searchsorted(np.cumsum(coupled[order]), number, side="right"))]
        by_group = np.argsort(group[order], kind="stable")
        sizes = np.bincount(group[order], minlength=allowance.size)
        rank = np.empty(order.size, dtype=np.int64)
        rank[by_group] = np.arange(order.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        order = order[rank < allowance[group[order]]]
        if order.size == 0:
            return
        local[order] = True
        taken = np.bincount(group[order], minlength=allowance.size)
        allowance -= taken
        open_budget -= taken
        state.drop(order)
