"""Randomized magnitude pruning: Algorithm 2 of the paper."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cbs_opt.device import in_batches, or_on_cpu
from cbs_opt.errors import UsageError
from cbs_opt.instance import Instance
from cbs_opt.interrupt import checkpoint
from cbs_opt.registry import register
from cbs_opt.result import Status
from cbs_opt.solver import Capabilities, Context, Parameters, Solver, option
from cbs_opt.solvers.paper.batch_evaluator import BatchEvaluator
from cbs_opt.typing import BoolArray, FloatArray, IntArray

_DEFAULT_BATCH = 64
_BATCH_ON_CARD = 512
_MOST_GROUPS = 64  # beyond which a card draws no faster
_BATCH_ENTRIES = 1 << 22  # entries of a batch, draws by weights: less where a draw takes long
_LARGE = 50_000  # weights from which on a draw takes 10 ms or more


@dataclass(frozen=True)
class RmpParameters(Parameters):
    """S and B of Algorithm 2."""

    draws: int = option(50, "selections drawn, the first of them plain magnitude")
    buckets: int | None = option(None, "buckets per draw; max(1, min(⌊√n⌋, 1000)) of a group when not set")

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise UsageError(f"`draws` must be at least 1, got {self.draws}")
        if self.buckets is not None and self.buckets < 1:
            raise UsageError(f"`buckets` must be at least 1, got {self.buckets}")


@register("rmp")
class RandomizedMagnitudePruning(Solver):
    """Algorithm 2 of the CBS paper, the best draw by the objective; an iteration is a draw.

    The paper evaluates draws by the loss on training images; here by the quadratic objective.
    """

    summary = "randomized magnitude pruning, Algorithm 2 of the paper"
    supports = Capabilities(batched=True, not_worse_than_magnitude=True)
    parameters_type = RmpParameters
    parameters: RmpParameters

    def prepare(self, instance: Instance, context: Context) -> None:
        """Transfer the curvature to the device."""
        self._evaluator = BatchEvaluator(instance, context, self.parameters.draws)

    def run(self, instance: Instance, context: Context) -> Status:
        """Draw and evaluate batch by batch."""
        draws = Draws(instance, self.parameters)
        evaluate_draws(draws, self._evaluator, context, keep=0)
        return Status.CONVERGED


def evaluate_draws(
    draws: Draws, evaluator: BatchEvaluator, context: Context, keep: int
) -> tuple[BoolArray, FloatArray]:
    """Draw S selections and report each; returns the best `keep` of them, bool (k, n), and all values, sorted.

    On a card they are drawn there, by random numbers of torch; the first one is plain magnitude everywhere.
    """
    if evaluator.on_card is not None and len(draws.groups) <= _MOST_GROUPS:
        with or_on_cpu("the draws", context.extras):
            return _draws_on_card(draws, evaluator, context, keep)
    rng, monitor = context.rng(), context.monitor
    limit = context.batch_size or max(1, min(_DEFAULT_BATCH, _BATCH_ENTRIES // draws.magnitude.size))
    selections: list[BoolArray] = []
    values: list[FloatArray] = []
    drawn = 0
    while drawn < draws.parameters.draws and not (drawn and monitor.should_stop()):
        # Small batches first, so that a limit of any length finds a selection.
        count = min(limit if context.batch_size else max(1, drawn), limit, draws.parameters.draws - drawn)
        if monitor.stop.max_iterations is not None:
            count = max(1, min(count, monitor.stop.max_iterations - monitor.iterations))
        batch = np.stack([draws.draw(rng if drawn + r else None) for r in range(count)])
        selections.append(batch)
        values.append(evaluator.values(batch))
        for value, pruned in zip(values[-1], batch, strict=True):
            monitor.advance()
            monitor.report(value, pruned)
        drawn += count
    all_values = np.concatenate(values)
    order = np.argsort(all_values, kind="stable")
    return np.concatenate(selections)[order[:keep]], all_values[order]


def _draws_on_card(
    draws: Draws, evaluator: BatchEvaluator, context: Context, keep: int
) -> tuple[BoolArray, FloatArray]:
    import torch

    from cbs_opt.solvers.device.draws import DeviceDraws
    from cbs_opt.solvers.device.objective import host

    assert evaluator.on_card is not None
    device, monitor = evaluator.on_card.device, context.monitor
    random = DeviceDraws(
        draws.magnitude, draws.always, draws.groups, draws.parameters.buckets, context.seed, device
    )
    selections = [torch.tensor(draws.draw(None)[None], device=device)]
    values = [evaluator.values_on_card(selections[0])]
    monitor.advance()
    monitor.report(values[0][0], draws.draw(None))
    left = draws.parameters.draws - 1
    if monitor.stop.max_iterations is not None:
        left = min(left, monitor.stop.max_iterations - monitor.iterations)

    def draw(first: int, last: int) -> None:
        batch = random.draw(last - first)
        found = evaluator.values_on_card(batch)
        for k, value in enumerate(found.tolist()):
            monitor.advance()
            if monitor.objective is None or value < monitor.objective:
                monitor.report(value, np.asarray(host(batch[k]), dtype=bool))
        selections.append(batch)
        values.append(found)

    if not monitor.should_stop():
        in_batches(left, context.batch_size or _BATCH_ON_CARD, draw, monitor.should_stop)
    all_values = np.concatenate(values)
    order = np.argsort(all_values, kind="stable")
    ranked = torch.cat(selections)[torch.tensor(order[:keep], device=device)]
    return np.asarray(host(ranked), dtype=bool), all_values[order]


class Draws:
    """The random selections of Algorithm 2.

    Each splits the weights of every group at random into B buckets of equal size and prunes every bucket by
    magnitude at the same rate; the remainder from rounding goes to random buckets, so that the budget is met.
    """

    def __init__(self, instance: Instance, parameters: RmpParameters) -> None:
        self.parameters = parameters
        self.magnitude = np.abs(instance.weights)
        self.fixed = instance.fixed
        self.budget = instance.budget
        free = np.ones(instance.n, dtype=bool) if instance.fixed is None else instance.fixed == 0
        self.always = np.zeros(instance.n, dtype=bool) if instance.fixed is None else instance.fixed == 1
        self.groups: list[tuple[IntArray, int]] = []
        for members, p in zip(instance.budget.members(instance.n), instance.budget.per_group, strict=True):
            self.groups.append((members[free[members]], int(p) - int(self.always[members].sum())))

    def draw(self, rng: np.random.Generator | None) -> BoolArray:
        """One selection, bool (n,); plain magnitude without a generator. O(n log n)."""
        if self.magnitude.size > _LARGE:
            checkpoint()
        if rng is None:
            return self.budget.cheapest(self.magnitude, self.fixed)
        pruned = self.always.copy()
        for members, p in self.groups:
            size = members.size
            if p == 0 or size == 0:
                continue
            B = self.parameters.buckets or min(int(np.sqrt(size)), 1000)
            B = max(1, min(B, size))
            bucket = np.empty(size, dtype=np.int64)
            bucket[rng.permutation(size)] = np.arange(size) * B // size
            sizes = np.bincount(bucket, minlength=B)
            quota = sizes * p // size
            room = np.flatnonzero(quota < sizes)
            quota[rng.permutation(room)[: p - int(quota.sum())]] += 1
            order = np.lexsort((self.magnitude[members], bucket))
            first = np.cumsum(sizes) - sizes
            inner = np.arange(size) - first[bucket[order]]
            pruned[members[order[inner < quota[bucket[order]]]]] = True
        return pruned
