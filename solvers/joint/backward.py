"""Backward elimination: greedy Optimal Brain Surgeon with exact updates, over all blocks under one budget."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import numpy as np

from cbs_opt.curvature.base import LARGE_BLOCK
from cbs_opt.errors import UsageError
from cbs_opt.instance import Instance
from cbs_opt.interrupt import Interrupted
from cbs_opt.losses import joint_loss
from cbs_opt.memory import require_bytes
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
from cbs_opt.solvers.joint.rank_deficient import check_well_posed, is_rank_deficient, search_singular
from cbs_opt.solvers.joint.stages import Stages, complete
from cbs_opt.solvers.kernels import loading
from cbs_opt.typing import BoolArray, IntArray

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
    supports = Capabilities(objectives=frozenset({"joint"}), not_worse_than_magnitude=True)
    parameters_type = BackwardParameters
    parameters: BackwardParameters

    def check_supports(self, instance: Instance, context: Context) -> None:
        """Refuse a singular Hessian with too many kept weights."""
        super().check_supports(instance, context)
        if is_rank_deficient(instance):
            check_well_posed(instance, self.name)

    def prepare(self, instance: Instance, context: Context) -> None:
        """Compile."""
        self._singular = is_rank_deficient(instance)
        loading.wait("joint", should_stop=context.monitor.should_stop)

    def run(self, instance: Instance, context: Context) -> Status:
        """Eliminate; when stopped early, the cheapest of the remaining weights complete the selection."""
        monitor = context.monitor
        if self._singular:
            status = search_singular(instance, context, self._eliminate)
            monitor.advance(instance.budget.total)
            return status
        pruned = self._eliminate(instance, context)
        monitor.advance(instance.budget.total)
        monitor.report(joint_loss(instance, pruned), pruned)
        return Status.CONVERGED

    def _eliminate(self, instance: Instance, context: Context) -> BoolArray:
        monitor = context.monitor
        return eliminate(
            instance, self.parameters.stage, monitor.should_stop, context.workers, lambda: monitor.remaining
        )


_FASTER = 4.0  # single precision products of a stage, against an exact elimination, per operation


def eliminate(
    instance: Instance,
    stage: float = 0.1,
    should_stop: Callable[[], bool] = lambda: False,
    threads: int = 1,
    remaining: Callable[[], float] = lambda: np.inf,
) -> BoolArray:
    """Backward elimination over all blocks; returns the pruned weights, bool (n,), within the budget.

    Parameters
    ----------
    instance : Instance
        H positive definite.
    stage : float
        For blocks of more than `DENSE_LIMIT` weights: share of them removed at once before the next solve.
    should_stop : callable
        Asked every `_LAZY_STEPS` removals. A selection is returned all the same; see `stages.complete`.
    threads : int
        Blocks are worked on in parallel where there are several and no groups.
    remaining : callable
        Seconds that remain: where they are too few for exact elimination, all of it happens in stages.

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
    coupled = [curvature.coupled(k) for k in range(curvature.number_of_blocks)]
    stages = Stages(instance, coupled, pruned, open_budget, stage, should_stop)
    try:
        if _is_too_long(instance, stages, remaining):
            stages.eliminate(remaining)
        else:
            stages.reduce_blocks(DENSE_LIMIT)
        if open_budget.any() and not should_stop():
            states: list[Elimination] = []
            left = [int((~pruned[curvature.block_slice(k)] & coupled[k]).sum()) for k in range(len(coupled))]
            require_bytes(sum(8.0 * size**2 for size in left), "the inverses of all blocks at once")
            for k in curvature.blocks_in_turn():
                if k and curvature.block_sizes[k] > LARGE_BLOCK and should_stop():
                    raise Interrupted
                states += _states(instance, k, pruned, coupled[k])
            if instance.budget.groups is None:
                _merge_blocks(states, pruned, open_budget, should_stop, threads)
            else:
                _merge_groups(states, pruned, open_budget, should_stop)
    except Interrupted:
        open_budget = instance.budget.per_group - np.bincount(group[pruned], minlength=open_budget.size)
    if open_budget.any():
        logger.info("stopped during backward elimination: each block is pruned as far as by magnitude")
        pruned = complete(instance, pruned, stages.prices)
    return pruned


def _is_too_long(instance: Instance, stages: Stages, remaining: Callable[[], float]) -> bool:
    """Whether exact elimination would take more than half of the remaining time; by the time of a first stage."""
    curvature, seconds = instance.curvature, remaining()
    sizes = curvature.block_sizes.astype(np.float64)
    large = np.flatnonzero(sizes > DENSE_LIMIT)
    if not large.size or not np.isfinite(seconds):
        return False
    k = int(large[0])
    stages.price(k)
    factor = curvature.as_factor()
    width = min(sizes[k], np.inf if factor is None else factor.m)
    operations_per_second = width**2 / max(stages.seconds_per_weight, 1e-12)
    kept = 1 - instance.budget.total / instance.n
    left = np.minimum(sizes, np.maximum(DENSE_LIMIT, kept * sizes))
    return bool(_FASTER * float((left**3).sum()) / operations_per_second > 0.5 * remaining())


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

    When stopped, the remaining weights of a block follow in the order of their current prices, and the blocks
    share the budget by the prices before the elimination: those after it cannot be compared with those of a block
    that has not been reached.
    """
    goal = int(open_budget[0])
    before = [state.rest() for state in states]
    stopped = [False]
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
                stopped[0] = True
                return made + state.rest()
            step = state.remove(min(LAZY_STEPS, missing))
            if not step:
                break
            made += step
            highest = max(highest, max(step)[0])
        return made

    with ThreadPoolExecutor(threads if len(states) > 1 else 1) as pool:
        traces = list(pool.map(trace, states))
    if stopped[0] and len(states) > 1:
        cheapest = sorted((price, k) for k, prices in enumerate(before) for price, _ in prices)[:goal]
        numbers = np.bincount([k for _, k in cheapest], minlength=len(states))
        for made, number in zip(traces, numbers.tolist(), strict=True):
            pruned[[weight for _, weight in made[:number]]] = True
            open_budget[0] -= len(made[:number])
        return
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
