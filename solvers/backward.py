"""Backward elimination: greedy Optimal Brain Surgeon with exact updates, over all blocks under one budget."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cbs_opt.curvature import GradientFactor
from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.instance import Instance
from cbs_opt.linalg import inverse_pd
from cbs_opt.losses import joint_loss
from cbs_opt.registry import register
from cbs_opt.result import Status
from cbs_opt.solver import Capabilities, Context, Parameters, Solver, option
from cbs_opt.solvers.kernels import joint_numba as kernels
from cbs_opt.solvers.stages import staged
from cbs_opt.typing import BoolArray, IntArray

logger = logging.getLogger("cbs_opt")

DENSE_LIMIT = 5000
"""Blocks up to this size are eliminated exactly; larger ones are first thinned out by stages."""

_LAZY_STEPS = 128  # eliminations between two updates of the inverse


@dataclass(frozen=True)
class BackwardParameters(Parameters):
    """How large blocks are thinned out."""

    stage: float = option(0.1, "share of a large block's weights that a stage removes before it solves again")

    def __post_init__(self) -> None:
        if not 0 < self.stage < 1:
            raise UsageError(f"`stage` must be between 0 and 1, got {self.stage}")


@register("backward")
class BackwardElimination(Solver):
    """Remove the weight that costs least, update the others, and again; an iteration is a removal.

    Every block keeps the conditional inverse of its Hessian (ExactOBS: Frantar, Alistarh: Optimal Brain
    Compression, NeurIPS 2022). The budget runs over all blocks in the order of the losses, and over groups.
    A block of more than 5000 weights is first thinned out by stages.
    """

    summary = "greedy removal with exact updates (ExactOBS), one budget over all blocks"
    supports = Capabilities(objectives=frozenset({"joint"}))
    parameters_type = BackwardParameters
    parameters: BackwardParameters

    def check_supports(self, instance: Instance, context: Context) -> None:
        """Refuse a singular Hessian."""
        super().check_supports(instance, context)
        check_regular(instance)

    def prepare(self, instance: Instance, context: Context) -> None:
        """Compile."""
        warm_up()

    def run(self, instance: Instance, context: Context) -> Status:
        """Eliminate; when stopped early, the cheapest of the remaining weights complete the selection."""
        pruned = eliminate(instance, self.parameters.stage, context.monitor.should_stop, context.threads)
        context.monitor.advance(instance.budget.total)
        context.monitor.report(joint_loss(instance, pruned), pruned)
        return Status.CONVERGED


def check_regular(instance: Instance) -> None:
    """Raise `InstanceError` where the joint problem is singular: no damping, and fewer gradients than weights."""
    curvature = instance.curvature
    if isinstance(curvature, GradientFactor) and curvature.damping == 0:
        largest = int(curvature.block_sizes.max())
        if curvature.m < largest:
            mean = float(curvature.diagonal().mean())
            raise InstanceError(
                f"the joint problem is singular: {curvature.m} gradients, a block of {largest} weights and no "
                f"damping; a damping of {1e-3 * mean:.1g} (a thousandth of the mean diagonal of H) would do"
            )


def eliminate(
    instance: Instance,
    stage: float = 0.1,
    should_stop: Callable[[], bool] = lambda: False,
    threads: int | None = None,
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
    threads : int, optional
        Blocks are worked on in parallel where there are several and no groups.

    Notes
    -----
    O(b³) time and O(b²) memory a block; for a large block with m gradients O(m² b) a stage.
    """
    open_budget = instance.budget.per_group.copy()
    group = instance.budget.group_of(instance.n)
    pruned = np.zeros(instance.n, dtype=bool)
    if instance.fixed is not None:
        pruned |= instance.fixed == 1
        open_budget -= np.bincount(group[pruned], minlength=open_budget.size)
    blocks = range(instance.curvature.number_of_blocks)
    shared = open_budget.copy()
    for k in blocks:
        _thin_out(instance, k, stage, pruned, open_budget, shared, should_stop)
    states = [_Block(instance, k, pruned) for k in blocks if open_budget.any() and not should_stop()]
    merge = _merge_blocks if instance.budget.groups is None else _merge_groups
    merge(states, pruned, open_budget, should_stop, threads)
    if open_budget.any():
        logger.info("stopped during backward elimination: the smallest weights of the rest complete the selection")
        rest = np.where(pruned, 1, 0 if instance.fixed is None else np.minimum(instance.fixed, 0))
        pruned = instance.budget.cheapest(np.abs(instance.weights), rest)
    return pruned


def _merge_blocks(
    blocks: list[_Block],
    pruned: BoolArray,
    open_budget: IntArray,
    should_stop: Callable[[], bool],
    threads: int | None,
) -> None:
    """Eliminate every block by itself, in parallel, and take the removals in the order of their losses."""

    def trace(block: _Block) -> list[tuple[float, int]]:
        made: list[tuple[float, int]] = []
        goal = int(open_budget[0])
        while len(made) < goal and not should_stop():
            step = block.remove(min(_LAZY_STEPS, goal - len(made)))
            if not step:
                break
            made += step
        return made

    with ThreadPoolExecutor(threads if len(blocks) > 1 else 1) as pool:
        traces = list(pool.map(trace, blocks))
    heap = [(made[0][0], k, 0) for k, made in enumerate(traces) if made]
    heapq.heapify(heap)
    while heap and open_budget[0]:
        _, k, position = heapq.heappop(heap)
        pruned[traces[k][position][1]] = True
        open_budget[0] -= 1
        if position + 1 < len(traces[k]):
            heapq.heappush(heap, (traces[k][position + 1][0], k, position + 1))


def _merge_groups(
    blocks: list[_Block],
    pruned: BoolArray,
    open_budget: IntArray,
    should_stop: Callable[[], bool],
    threads: int | None,
) -> None:
    """Remove the cheapest weight of all blocks whose group is open, one at a time."""
    holders: dict[int, list[_Block]] = {}
    for block in blocks:
        for group in np.unique(block.group).tolist():
            holders.setdefault(group, []).append(block)
            if open_budget[group] == 0:
                block.close(group)
    heap = [(*block.cheapest(), k) for k, block in enumerate(blocks)]
    heapq.heapify(heap)
    while heap and open_budget.any() and not should_stop():
        cost, j, k = heapq.heappop(heap)
        block = blocks[k]
        if cost == np.inf:
            continue
        if not block.removable[j]:  # its group was closed meanwhile
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


class _Block:
    """The elimination of one block: the conditional inverse of what is left, and the updated weights."""

    def __init__(self, instance: Instance, k: int, pruned: BoolArray) -> None:
        curvature, part = instance.curvature, instance.curvature.block_slice(k)
        w, local = instance.weights[part], pruned[part]
        g = None if instance.linear is None else instance.linear[part]
        index = np.flatnonzero(~local)
        inverse = inverse_pd(curvature.submatrix(k, index, index)) if local.any() else curvature.inverse_block(k)
        if inverse is None:
            raise InstanceError(f"block {k} of the Hessian is singular: a positive damping is needed")
        self.T = np.array(inverse)
        self.x = (w + curvature.best_update(k, w, local, g))[index]
        self.t = self.T.diagonal().copy()
        self.weight = part.start + index
        self.group = instance.budget.group_of(instance.n)[self.weight]
        self.removable = np.ones(index.size, dtype=bool)
        if instance.fixed is not None:
            self.removable = instance.fixed[self.weight] == 0
        self._V = np.empty((_LAZY_STEPS, index.size))
        self._left = np.ones(index.size, dtype=bool)
        self._done = 0

    def close(self, group: int) -> None:
        """Remove no more weights of this group."""
        self.removable &= self.group != group

    def cheapest(self) -> tuple[float, int]:
        """The next removal: rise of the doubled loss and position; infinity when there is none."""
        if not self.removable.any():
            return np.inf, -1
        costs = np.where(self.removable, self.x**2 / self.t, np.inf)
        j = int(np.argmin(costs))
        return float(costs[j]), j

    def remove(self, steps: int, forced: int = -1) -> list[tuple[float, int]]:
        """Remove up to `steps` weights, `forced` first; returns the rise of the doubled loss and the weight."""
        steps = min(steps, _LAZY_STEPS - self._done)
        order, losses = np.empty(steps, dtype=np.int64), np.empty(steps)
        taken = kernels.eliminate(
            self.T, self._V, self._done, self.x, self.t, self.removable, forced, steps, order, losses
        )
        made = list(zip(losses[:taken].tolist(), self.weight[order[:taken]].tolist(), strict=True))
        self._left[order[:taken]] = False
        self._done += taken
        if self._done == _LAZY_STEPS:
            self._apply()
        return made

    def _apply(self) -> None:
        """Bring the steps into T and drop what was removed."""
        left = self._left
        V = self._V[: self._done, left]
        self.T = self.T[np.ix_(left, left)]
        self.T -= V.T @ V
        self.t = self.T.diagonal().copy()
        for name in ("x", "weight", "group", "removable"):
            setattr(self, name, getattr(self, name)[left])
        self._V = np.empty((_LAZY_STEPS, self.x.size))
        self._left = np.ones(self.x.size, dtype=bool)
        self._done = 0


def _thin_out(
    instance: Instance,
    k: int,
    stage: float,
    pruned: BoolArray,
    open_budget: IntArray,
    shared: IntArray,
    should_stop: Callable[[], bool],
) -> None:
    """Remove weights of a large block by stages until it is small enough or its share of the budget is used.

    A stage computes x and the diagonal of the conditional inverse and removes the cheapest weights together.
    With several blocks a large one takes at most its share, by size, of `shared`, the budgets at the start; the
    common order of the losses decides on the rest.
    """
    part = instance.curvature.block_slice(k)
    size = part.stop - part.start
    if size <= DENSE_LIMIT:
        return
    group = instance.budget.group_of(instance.n)[part]
    allowance = open_budget.copy()
    if instance.curvature.number_of_blocks > 1:
        share = np.bincount(group, minlength=open_budget.size) / instance.budget.group_sizes(instance.n).clip(1)
        allowance = np.minimum(np.floor(share * shared).astype(np.int64), open_budget)
    local = pruned[part]  # a view
    state = staged(instance, k, np.flatnonzero(~local))
    stays = np.zeros(size, dtype=bool) if instance.fixed is None else instance.fixed[part] == -1
    while not should_stop():
        kept = np.flatnonzero(~local)
        excess = min(kept.size - DENSE_LIMIT, int(allowance.sum()))
        if excess <= 0:
            return
        order = kept[np.argsort(np.where(stays[kept], np.inf, state.prices(kept)), kind="stable")]
        order = order[~stays[order]]
        # Of each group no more than its allowance: the rank of a weight among its group's in the order.
        by_group = np.argsort(group[order], kind="stable")
        sizes = np.bincount(group[order], minlength=allowance.size)
        rank = np.empty(order.size, dtype=np.int64)
        rank[by_group] = np.arange(order.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        order = order[rank < allowance[group[order]]][: min(excess, max(1, int(stage * kept.size)))]
        if order.size == 0:
            return
        local[order] = True
        taken = np.bincount(group[order], minlength=allowance.size)
        allowance -= taken
        open_budget -= taken
        state.drop(order)


def warm_up() -> None:
    """Compile the kernel."""
    one, index = np.ones((1, 1)), np.zeros(1, dtype=np.int64)
    kernels.eliminate(one, one.copy(), 0, np.ones(1), np.ones(1), np.ones(1, dtype=bool), -1, 1, index, np.ones(1))
