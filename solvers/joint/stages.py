"""Elimination of large blocks in stages: many weights at once, then prices from scratch.

Room: joint, for `backward`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from cbs_opt.curvature.base import LARGE_BLOCK
from cbs_opt.instance import Instance
from cbs_opt.interrupt import checkpoint
from cbs_opt.solvers.joint.thinning import Thinning, thinning_of
from cbs_opt.typing import BoolArray, FloatArray, IntArray

_LARGEST_STAGE = 0.4  # share of the weights that a stage removes where time is short
_TIME_OF_STAGES = 0.4  # of the remaining time


class Stages:
    """The blocks of an instance, each with the prices x²/[H_KK⁻¹]_ii of its kept weights.

    Parameters
    ----------
    instance : Instance
    coupled : list of bool (b_k,)
        The weights of each block that are coupled to another one.
    pruned : bool (n,)
        Changed in place.
    open_budget : int64 (G,)
        Weights still to be pruned, changed in place.
    stage : float
        Share of the weights that a stage removes.
    should_stop : callable
        Asked before the work on each block.

    Attributes
    ----------
    prices : float64 (n,)
        Of the last stage, rise of the doubled loss; infinity where there is none.
    """

    def __init__(
        self,
        instance: Instance,
        coupled: list[BoolArray],
        pruned: BoolArray,
        open_budget: IntArray,
        stage: float,
        should_stop: Callable[[], bool],
    ) -> None:
        self.instance, self.coupled, self.pruned, self.open_budget = instance, coupled, pruned, open_budget
        self.stage, self.should_stop = stage, should_stop
        self.group = instance.budget.group_of(instance.n)
        self.stays = np.zeros(instance.n, dtype=bool) if instance.fixed is None else instance.fixed == -1
        self.prices = np.full(instance.n, np.inf)
        self.seconds_per_weight = 0.0  # of pricing, as measured last
        self._states: dict[int, Thinning] = {}

    def price(self, k: int) -> None:
        """Set the prices of block k."""
        began = time.perf_counter()
        part = self.instance.curvature.block_slice(k)
        if part.stop - part.start > LARGE_BLOCK:
            checkpoint()
        kept = np.flatnonzero(~self.pruned[part])
        if k not in self._states:
            self._states[k] = thinning_of(self.instance, k, kept, self.coupled[k])
        self.prices[part] = np.inf
        if kept.size:
            self.prices[part][kept] = np.where(self.stays[part][kept], np.inf, self._states[k].prices(kept))
            self.seconds_per_weight = (time.perf_counter() - began) / kept.size

    def reduce_blocks(self, largest: int) -> None:
        """Reduce every larger block to `largest` coupled weights, or by its share of the budget.

        With several blocks each takes at most its share, by size, of the budgets at the start; the common order of
        the losses decides on the rest. The blocks take turns, so that a stop finds all of them at the same stage.
        """
        curvature, left = self.instance.curvature, {}
        sizes = self.instance.budget.group_sizes(self.instance.n).clip(1)
        for k in range(curvature.number_of_blocks):
            part = curvature.block_slice(k)
            if int(self.coupled[k].sum()) <= largest:
                continue
            allowance = self.open_budget.copy()
            if curvature.number_of_blocks > 1:
                share = np.bincount(self.group[part], minlength=allowance.size) / sizes
                allowance = np.floor(share * self.open_budget).astype(np.int64)
            left[k] = allowance
        while left:
            for k, allowance in list(left.items()):
                part = curvature.block_slice(k)
                here = int((~self.pruned[part] & self.coupled[k]).sum())
                excess = min(here - largest, int(allowance.sum()))
                if excess <= 0:
                    del left[k]
                    continue
                if self.should_stop():
                    return
                self.price(k)
                index = np.arange(part.start, part.stop)
                if not self._remove(index, min(excess, max(1, int(self.stage * here))), allowance):
                    del left[k]

    def eliminate(self, remaining: Callable[[], float]) -> None:
        """Prune the whole budget in the common order of the prices of all blocks, in stages.

        A stage removes a larger share of the weights than `stage` if too little time remains; `remaining` returns
        seconds.
        """
        n, blocks = self.instance.n, self.instance.curvature.number_of_blocks
        while self.open_budget.any():
            began = time.perf_counter()
            for k in range(blocks):
                if self.should_stop():
                    return
                self.price(k)
            kept, missing = n - int(self.pruned.sum()), int(self.open_budget.sum())
            # Stages of share s cost about (kept − final) / (s · kept) times this one.
            ahead = (time.perf_counter() - began) * missing / kept
            share = ahead / max(_TIME_OF_STAGES * remaining(), 1e-9)
            share = float(np.clip(share, self.stage, _LARGEST_STAGE))
            if not self._remove(np.arange(n), min(missing, max(1, int(share * kept))), self.open_budget.copy()):
                return

    def _remove(self, index: IntArray, number: int, allowance: IntArray) -> int:
        """Remove the cheapest of the weights `index`, `number` of the coupled ones and all cheaper ones.

        Of each group no more than its `allowance`, which is reduced; returns how many were removed.
        """
        order = index[np.isfinite(self.prices[index]) & ~self.pruned[index]]
        order = order[np.argsort(self.prices[order], kind="stable")]
        coupled = np.concatenate(self.coupled)[order]
        order = order[: int(np.searchsorted(np.cumsum(coupled), number, side="right"))]
        group = self.group[order]
        by_group = np.argsort(group, kind="stable")
        sizes = np.bincount(group, minlength=allowance.size)
        rank = np.empty(order.size, dtype=np.int64)
        rank[by_group] = np.arange(order.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        order = order[rank < allowance[group]]
        if order.size == 0:
            return 0
        self.pruned[order] = True
        taken = np.bincount(self.group[order], minlength=allowance.size)
        allowance -= taken
        self.open_budget -= taken
        offsets = self.instance.curvature.offsets
        block = np.searchsorted(offsets, order, side="right") - 1
        for k in np.unique(block).tolist():
            self._states[k].drop(np.sort(order[block == k] - offsets[k]))
        return int(order.size)


def complete(instance: Instance, pruned: BoolArray, prices: FloatArray) -> BoolArray:
    """A feasible selection, bool (n,), that contains `pruned`, for a run that is stopped.

    The blocks are pruned as far as magnitude prunes them, or as far as they already are: prices of different
    blocks are not compared, as they may belong to different stages, or be unknown. Within a block the order is
    that of its prices, float64 (n,), or of the magnitudes where no price is known.
    """
    curvature, budget = instance.curvature, instance.budget
    group, magnitude = budget.group_of(instance.n), np.abs(instance.weights)
    fixed = np.zeros(instance.n, dtype=np.int8) if instance.fixed is None else instance.fixed
    scores = magnitude.copy()
    for k in range(curvature.number_of_blocks):
        part = curvature.block_slice(k)
        known = np.isfinite(prices[part]) & ~pruned[part]
        if not (known.any() or pruned[part].any()):
            continue  # nothing is known of this block: its order is that of the magnitudes
        for cell in np.unique(group[part]).tolist():
            at = part.start + np.flatnonzero((group[part] == cell) & (fixed[part] == 0))
            order = np.lexsort((prices[at], ~pruned[at]))
            # The weights take the magnitudes of their cell in this order, so that as many of them fall below a
            # threshold as before.
            scores[at[order]] = np.sort(magnitude[at])
    rest = np.where(pruned & (fixed == 0), 1, fixed).astype(np.int8)
    return budget.cheapest(scores, rest)
