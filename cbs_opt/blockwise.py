"""Solving an instance block by block, where a solver cannot hold all blocks in memory at once.

Room: the core, for `run`. The blocks share nothing but the budget: each gets a number of weights to prune, and the
solver takes one after the other.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from cbs_opt.budget import Budget
from cbs_opt.curvature import HessianBlocks
from cbs_opt.errors import MemoryShortageError
from cbs_opt.instance import Instance
from cbs_opt.interrupt import checkpoint
from cbs_opt.losses import joint_loss, selection_loss
from cbs_opt.monitor import Monitor
from cbs_opt.price_curves import PriceCurve, counts_at_one_price, curve_of_costs, flat_curve, price_range
from cbs_opt.result import Status
from cbs_opt.solver import Context, Solver
from cbs_opt.stop import Stop
from cbs_opt.typing import BoolArray, FloatArray, IntArray
from cbs_opt.view import text

logger = logging.getLogger("cbs_opt")

_FIRST_SHARE = 0.6  # of the time, for the first pass where others follow
_LEAST_SECONDS = 0.5  # of a block: in less a solver finds nothing
_SETTLED = 1e-3  # relative gain of a pass that ends the passes
_MOST_PASSES = 4
_STILL = 1e-3  # of a block's weights: counts that change by less stay as they are

RunOne = Callable[[Instance, Context], Monitor]
"""Solves one block; raises the solver's error."""


def can_split(instance: Instance) -> bool:
    """Whether there are several blocks to take in turn; not with cross groups, whose tiles lie across blocks."""
    return instance.curvature.number_of_blocks > 1 and instance.budget.cross_groups is None


def block_instance(instance: Instance, k: int, pruned: BoolArray) -> Instance:
    """Block k alone, with the numbers to prune that `pruned`, bool (b,), has in each of its groups."""
    part = instance.curvature.block_slice(k)
    curvature = instance.curvature.of_block(k) or HessianBlocks.from_blocks([instance.curvature.block(k)])
    return Instance(
        instance.weights[part],
        curvature,
        instance.budget.of_part(part, pruned),
        linear=None if instance.linear is None else instance.linear[part],
        fixed=None if instance.fixed is None else instance.fixed[part],
    )


def solve_by_blocks(solver: Solver, instance: Instance, context: Context, run_one: RunOne) -> Status:
    """Run a solver on one block after the other, reporting to the context's monitor.

    The better of magnitude, the cheapest weights by ½ w² H_ii − g w, and a warm start gives every block its share
    of the budget, and the solver takes the blocks in turn. A block that it does not improve, or that is too large
    alone, keeps its part of that selection. Where one budget ties the blocks together, further passes move the
    shares to one price: that of a block is the one of its curve of costs, times the loss that the solver reached
    over the loss of the curve. The best pass is the answer.

    The bound is the sum of those of the blocks where every group lies in one block. One budget over several blocks
    leaves none: a block's bound holds for its share only.

    Parameters
    ----------
    solver : Solver
    instance : Instance
    context : Context
    run_one : callable

    Returns
    -------
    Status

    Raises
    ------
    MemoryShortageError
        When every block alone is too large.

    Notes
    -----
    Memory: that of the solver on the largest block, and O(n). The matrices are read once for the diagonals,
    once for the losses of the start, and once in each pass.
    """
    return _Passes(solver, instance, context, run_one).run()


class _Passes:
    def __init__(self, solver: Solver, instance: Instance, context: Context, run_one: RunOne) -> None:
        self.solver, self.instance, self.context, self.run_one = solver, instance, context, run_one
        self.monitor = context.monitor
        curvature, budget = instance.curvature, instance.budget
        self.blocks = [curvature.block_slice(k) for k in range(curvature.number_of_blocks)]
        self.magnitude = budget.cheapest(np.abs(instance.weights), instance.fixed)
        self.tied = budget.groups is None or _across_blocks(budget.groups, curvature.offsets)
        self.several_passes = budget.groups is None and instance.linear is None

    def run(self) -> Status:
        """The passes."""
        instance, monitor = self.instance, self.monitor
        blocks = text.count(len(self.blocks), "block")
        logger.info(f"{blocks} are solved one at a time with '{self.solver.name}'")
        if self.tied:
            logger.info("one budget ties them together: no bound is proven")
        self.costs = 0.5 * instance.weights**2 * instance.curvature.diagonal()
        if instance.linear is not None:
            self.costs -= instance.linear * instance.weights
        masks, losses = self._start()
        curves = [_curve(self.costs[part]) for part in self.blocks] if self.several_passes else []
        passes = 0
        for passes in range(1, (_MOST_PASSES if self.several_passes else 1) + 1):
            before = float(losses.sum()) if passes == 1 else monitor.objective
            share = _FIRST_SHARE if self.several_passes and passes == 1 else 1.0
            found = self._pass(masks, losses if passes == 1 else None, share)
            if found is None or monitor.should_stop() or not self.several_passes:
                break
            losses, solved = found
            if passes > 1 and (before or 0.0) - (monitor.objective or 0.0) < _SETTLED * abs(before or 0.0):
                break
            shares = self._shares(curves, losses, solved)
            if shares is None:
                break
            masks = shares
        self.context.extras |= {"blocks_in_turn": len(self.blocks), "passes": passes}
        return Status.OPTIMAL if monitor.closed else Status.CONVERGED

    def _start(self) -> tuple[BoolArray, FloatArray]:
        """The best of magnitude, the cheapest by ½ w² H_ii − g w, and the warm start; and its losses by block."""
        instance, warm = self.instance, self.context.warm_start
        masks = [self.magnitude, instance.budget.cheapest(self.costs, instance.fixed)]
        masks += [] if warm is None else [warm]
        losses = np.empty((len(self.blocks), len(masks)))
        for k, part in enumerate(self.blocks):
            block = block_instance(instance, k, masks[0][part])
            losses[k] = self._losses(block, [mask[part] for mask in masks])
        for mask, whole in zip(masks, losses.sum(0).tolist(), strict=True):
            self.monitor.report(whole, mask)
        best = int(np.argmin(losses.sum(0)))
        return masks[best], losses[:, best]

    def _losses(self, block: Instance, masks: Sequence[BoolArray]) -> list[float]:
        checkpoint()
        loss = joint_loss if self.context.objective == "joint" else selection_loss
        return [loss(block, mask) for mask in masks]

    def _pass(
        self, masks: BoolArray, known: FloatArray | None, share: float
    ) -> tuple[FloatArray, BoolArray] | None:
        """Solve all blocks with the numbers of `masks`, and report; the losses by block, and the selection.

        `known` are the losses of `masks` by block. None where the pass was stopped before the end: the blocks that
        are left then keep their part of `masks`, if the loss of that is known, else the pass is given up.
        """
        instance, monitor = self.instance, self.monitor
        losses = np.zeros(len(self.blocks)) if known is None else known.copy()
        bound, finished, pruned, too_large = 0.0, True, masks.copy(), list[int]()
        for k, seconds in self._in_turn(share):
            part = self.blocks[k]
            if monitor.should_stop():
                finished = False
                break
            block = block_instance(instance, k, masks[part])
            try:
                found = self._solve(block, masks[part], seconds)
            except MemoryShortageError as error:
                too_large.append(k)
                if len(too_large) == len(self.blocks):
                    raise
                logger.debug(f"block {k}: {error}")
                found = Monitor()
            if known is None:
                losses[k] = self._losses(block, [masks[part]])[0]
            if found.pruned is not None and found.objective is not None and found.objective < losses[k]:
                pruned[part], losses[k] = found.pruned, found.objective
            bound += -math.inf if found.bound is None else found.bound
        if too_large:
            logger.warning(
                f"of {len(self.blocks)} blocks {len(too_large)} do not fit into memory even alone (block "
                f"{too_large[0]} first), and keep what they had"
            )
        if finished or known is not None:
            monitor.report(float(losses.sum()), pruned)
        if not finished:
            return None
        if not self.tied:
            monitor.report_bound(bound)
        return losses, pruned

    def _in_turn(self, share: float) -> Iterator[tuple[int, float]]:
        """The blocks, each with the clock's time at which its part of the time is over."""
        monitor = self.monitor
        work = np.array([float(part.stop - part.start) ** 2 for part in self.blocks])
        seconds = share * monitor.remaining
        for k in range(len(self.blocks)):
            left = seconds if not math.isfinite(seconds) else min(seconds, monitor.remaining)
            own = max(_LEAST_SECONDS, float(left * work[k] / work[k:].sum()))
            began = monitor.elapsed
            yield k, own
            seconds -= monitor.elapsed - began

    def _solve(self, block: Instance, warm: BoolArray, seconds: float) -> Monitor:
        """The run of the solver on one block."""
        outer = self.monitor
        stop = outer.stop
        left = None if stop.max_iterations is None else max(0, stop.max_iterations - outer.iterations)
        inner = Monitor(
            Stop(
                time_limit=seconds if math.isfinite(seconds) else None,
                max_iterations=left,
                no_improvement=stop.no_improvement,
                gap=None if self.tied else stop.gap,
                should_stop=outer.should_stop,
            )
        )
        start = warm if self.solver.supports.warm_start else None
        found = self.run_one(block, replace(self.context, monitor=inner, warm_start=start, extras={}, engine=None))
        outer.advance(found.iterations)
        return found

    def _shares(self, curves: list[PriceCurve], losses: FloatArray, pruned: BoolArray) -> BoolArray | None:
        """Selections with the numbers that one price gives the blocks; None where these hardly change."""
        fixed, counts = self.instance.fixed, [int(pruned[part].sum()) for part in self.blocks]
        low = [0 if fixed is None else int((fixed[part] == 1).sum()) for part in self.blocks]
        high = [
            part.stop - part.start - (0 if fixed is None else int((fixed[part] == -1).sum()))
            for part in self.blocks
        ]
        factors = np.array(
            [max(f, 1e-300) / max(c.loss_at(n), 1e-300) for f, c, n in zip(losses, curves, counts, strict=True)]
        )
        wanted = counts_at_one_price(curves, factors, self.instance.budget.total, low, high)
        sizes = [part.stop - part.start for part in self.blocks]
        if all(abs(a - b) <= _STILL * size for a, b, size in zip(wanted, counts, sizes, strict=True)):
            return None
        out = np.zeros_like(pruned)
        for part, count in zip(self.blocks, wanted, strict=True):
            mine = np.where(pruned[part], self.costs[part] - 2.0 * self.costs[part].max() - 1.0, self.costs[part])
            out[part] = Budget(count).cheapest(mine, None if fixed is None else fixed[part])
        return out


def _across_blocks(groups: IntArray, offsets: IntArray) -> bool:
    """Whether a group has weights of several blocks."""
    block = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
    first = np.zeros(int(groups.max()) + 1, dtype=np.int64)
    first[groups] = block
    return bool((first[groups] != block).any())


def _curve(costs: FloatArray) -> PriceCurve:
    prices = price_range(costs)
    return flat_curve(costs.size) if prices is None else curve_of_costs(prices, [costs] * prices.size)
