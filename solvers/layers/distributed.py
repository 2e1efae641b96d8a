"""Layers as tasks of an engine: what they exchange is the price of a weight of their common budget.

Room: layers; `layered_instance` alone imports it. Workers import `solve_task` and `scout_task`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cbs_opt.engines import Engine
from cbs_opt.errors import CbsError, SolverError
from cbs_opt.price_curves import PriceCurve, counts_at_one_price
from cbs_opt.solvers.layers.incumbent import Incumbent, Report
from cbs_opt.solvers.layers.price_curves import curve_of
from cbs_opt.solvers.layers.problem import Layer, LayerBudget, LayerSolution, row_losses
from cbs_opt.solvers.layers.refit import quick_refit
from cbs_opt.solvers.layers.solve import solve_layers
from cbs_opt.solvers.layers.warm_up import layers_joint, layers_selection
from cbs_opt.typing import BoolArray, FloatArray

logger = logging.getLogger("cbs_opt")

_SHARES = (0.5, 0.6, 1.0)  # of the time that is left for each round
_SETTLED = 2e-4  # relative gain of a round that ends a run without a limit
_MOST_ROUNDS = 5  # of such a run
_STILL = 1e-3  # of a layer's weights: counts that change by less stay as they are
_MARGIN = 0.3  # seconds of a round for handing data over
_LEAST_SECONDS = 0.5  # of a task


@dataclass(frozen=True)
class ScoutTask:
    """What a worker needs to price the weights of one layer."""

    index: int
    layer: Layer
    objective: str
    known: tuple[BoolArray, ...]


@dataclass(frozen=True)
class Scouted:
    """The price curve of a layer, and the losses of known masks of it; `error` where it failed."""

    curve: PriceCurve | None
    losses: tuple[float, ...]
    error: str | None = None


@dataclass(frozen=True)
class SolveTask:
    """What a worker needs to solve one layer under a budget of its own."""

    index: int
    layer: Layer
    budget: LayerBudget
    objective: str
    warm_start: BoolArray | None
    seconds: float | None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Solved:
    """The answer of a worker; `error` where it failed."""

    mask: BoolArray | None
    weights: FloatArray | None
    objective: float
    bound: float | None
    error: str | None = None


def loss_of(layer: Layer, mask: BoolArray, objective: str) -> float:
    """The loss of a mask; for the joint objective by a quick refit, so that it is never too low."""
    if objective == "joint":
        return float(quick_refit(layer, mask)[0].sum())
    return float(row_losses(layer, np.where(mask, 0.0, layer.weights)).sum())


def scout_task(task: ScoutTask) -> Scouted:
    """Price one layer; runs in a worker and does not raise."""
    try:
        (layers_joint if task.objective == "joint" else layers_selection)()  # a worker loads its own kernels
        losses = tuple(loss_of(task.layer, mask, task.objective) for mask in task.known)
        return Scouted(curve_of(task.layer, task.objective), losses)
    except (ArithmeticError, ValueError, MemoryError, CbsError) as error:
        return Scouted(None, (), f"{type(error).__name__}: {error}")


def solve_task(task: SolveTask) -> Solved:
    """Solve one layer; runs in a worker and does not raise."""
    try:
        (layers_joint if task.objective == "joint" else layers_selection)()  # loaded, if the worker is the same
        solution = solve_layers(
            [task.layer],
            task.budget,
            objective=task.objective,
            warm_start=None if task.warm_start is None else [task.warm_start],
            time_limit=task.seconds,
            refit=False,
            **task.options,
        )
        weights = solution.weights[0] if solution.near and task.objective == "joint" else None
        return Solved(solution.pruned[0], weights, solution.objective, solution.bound)
    except (ArithmeticError, ValueError, MemoryError, CbsError) as error:
        return Solved(None, None, math.inf, None, f"{type(error).__name__}: {error}")


def solve_distributed(
    layers: list[Layer],
    budget: LayerBudget,
    engine: Engine,
    *,
    objective: str = "joint",
    warm_start: list[BoolArray] | None = None,
    report: Report | None = None,
    report_bound: Callable[[float], object] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    time_limit: float | None = None,
    max_rounds: int | None = None,
    **options: Any,
) -> LayerSolution:
    """Prune layers, each as a task of an engine.

    A first pass asks every layer how many weights it would prune at a range of prices. The price at which these
    numbers sum to the common budget gives each layer a budget of its own, and it is solved alone. The loss that it
    reaches corrects its prices, which gives new budgets for the next round; the best round is the answer. Budgets
    for rows and N:M need one round and no prices.

    Parameters
    ----------
    layers, budget, objective, warm_start, report, report_bound, should_stop, time_limit
        As in `solve_layers`. Workers that are at work when `should_stop` holds are given up.
    engine : Engine
    max_rounds : int, optional
    options
        Of `solve_layers`, for every layer.

    Returns
    -------
    LayerSolution
        With a bound only where the budget does not couple the layers. A layer whose worker was killed at every try
        keeps what it had, or magnitude.

    Raises
    ------
    SolverError
        When no worker can be started.
    """
    run = _Rounds(layers, budget, engine, objective, should_stop, time_limit, options)
    run.incumbent = Incumbent(layers, report, report_bound)
    starts = run.starts(warm_start)
    with engine.kept() as run.engine:
        return run.run(starts, max_rounds)


class _Rounds:
    incumbent: Incumbent

    def __init__(
        self,
        layers: list[Layer],
        budget: LayerBudget,
        engine: Engine,
        objective: str,
        should_stop: Callable[[], bool],
        time_limit: float | None,
        options: dict[str, Any],
    ) -> None:
        self.layers, self.budget, self.engine = layers, budget, engine
        self.objective, self.should_stop, self.options = objective, should_stop, options
        if budget.total is not None:
            self.options = {**options, "bound_share": 0.0}  # a bound of one layer's budget is none of the whole
        self.ends = math.inf if time_limit is None else time.perf_counter() + time_limit
        self.bounds = np.zeros(len(layers))
        self.work = np.array([layer.rows * layer.columns**2 + layer.columns**3 for layer in layers], np.float64)

    def stopped(self) -> bool:
        return time.perf_counter() >= self.ends or self.should_stop()

    def starts(self, warm_start: list[BoolArray] | None) -> list[list[BoolArray]]:
        """Magnitude and the warm start, which are answers at once."""
        magnitude = self.budget.cheapest(self.layers, [np.abs(layer.weights) for layer in self.layers])
        out = [magnitude] if warm_start is None else [magnitude, warm_start]
        for masks in out:
            parts = zip(self.layers, masks, strict=True)
            self.incumbent.offer(sum(self._loss_bound(layer, mask) for layer, mask in parts), masks)
        return out

    def run(self, starts: list[list[BoolArray]], max_rounds: int | None) -> LayerSolution:
        """Price all layers, and solve them round by round."""
        curves = self._scout(starts)
        compared = curves is not None
        if curves is not None and max_rounds != 0:
            self._rounds(curves, starts[1] if len(starts) > 1 else None, max_rounds)
        found = self.incumbent
        near = found.weights is not None
        weights = found.weights or [
            np.where(mask, 0.0, layer.weights) for layer, mask in zip(self.layers, found.pruned, strict=True)
        ]
        return LayerSolution(
            found.pruned, list(weights), found.objective, found.bound, tuple(found.history), compared, near
        )

    def _loss_bound(self, layer: Layer, mask: BoolArray) -> float:
        """An upper bound of the loss of masked weights, in O(K) a row."""
        change = np.where(mask, layer.weights, 0.0)
        norms = np.abs(change) @ np.sqrt(np.maximum(np.diag(layer.hessian), 0.0))
        return 0.5 * float(layer.scale @ norms**2)

    def _scout(self, starts: list[list[BoolArray]]) -> list[PriceCurve] | None:
        """The curves of all layers, and the losses of the starts; None if stopped."""
        tasks = [
            ScoutTask(k, layer, self.objective, tuple(masks[k] for masks in starts))
            for k, layer in enumerate(self.layers)
        ]
        found: dict[int, Scouted] = {}
        for task, answer in self.engine.run(self._largest_first(tasks), scout_task, self.stopped):
            if answer is None or answer.error is not None:
                reason = "its worker was killed at every try" if answer is None else answer.error
                raise SolverError(f"layer {task.index} cannot be priced: {reason}")
            found[task.index] = answer
        if len(found) < len(self.layers):
            return None
        for s, masks in enumerate(starts):
            self.incumbent.offer(sum(found[k].losses[s] for k in range(len(self.layers))), masks)
        curves = [found[k].curve for k in range(len(self.layers))]
        return [curve for curve in curves if curve is not None]

    def _largest_first(self, tasks: Sequence[Any]) -> list[Any]:
        return sorted(tasks, key=lambda task: -self.work[task.index])

    def _rounds(
        self, curves: list[PriceCurve], warm_start: list[BoolArray] | None, max_rounds: int | None
    ) -> None:
        """Solve all layers, correct their prices, and again."""
        factors = np.ones(len(self.layers))
        budgets = self._budgets(curves, factors, None)
        masks: list[BoolArray | None] = [None] * len(self.layers)
        if warm_start is not None:
            masks = list(warm_start)
            if self.budget.total is not None:  # its numbers are kept in the first round
                budgets = [LayerBudget(total=int(mask.sum())) for mask in warm_start]
        most = max_rounds or (_MOST_ROUNDS if self.ends == math.inf else len(_SHARES))
        if self.budget.total is None and self.ends < math.inf:
            most = 1
        for number in range(most):
            before = self.incumbent.objective
            share = 1.0 if number + 1 == most else _SHARES[min(number, len(_SHARES) - 1)]
            answers = self._solve(budgets, masks, share, number)
            if answers is None:
                return
            gained = (before - self.incumbent.objective) / max(before, 1e-300)
            if self.stopped() or (self.ends == math.inf and number and gained < _SETTLED):
                return
            masks = list(answers)
            if self.budget.total is None:
                continue
            worse = number > 0 and gained <= 0
            if worse:  # back to the budgets of the best round, for good
                masks = list(self.incumbent.pruned)
                budgets = [LayerBudget(total=int(mask.sum())) for mask in self.incumbent.pruned]
                continue
            counts = [int(mask.sum()) for mask in answers]
            losses = self._losses
            parts = zip(losses, curves, counts, strict=True)
            factors = np.array([max(loss, 1e-300) / max(c.loss_at(n), 1e-300) for loss, c, n in parts])
            budgets = self._budgets(curves, factors, counts)
            masks = self._fitted(answers, budgets)

    def _budgets(self, curves: list[PriceCurve], factors: FloatArray, now: list[int] | None) -> list[LayerBudget]:
        """One budget for each layer; those of a common budget are at one price."""
        if self.budget.pattern is not None:
            return [self.budget] * len(self.layers)
        if self.budget.per_row is not None:
            return [LayerBudget(per_row=(counts,)) for counts in self.budget.per_row]
        assert self.budget.total is not None
        low = [int(layer.must_prune().sum()) for layer in self.layers]
        high = [layer.weights.size - int(layer.must_stay().sum()) for layer in self.layers]
        counts = counts_at_one_price(curves, factors, self.budget.total, low, high)
        if now is not None and all(
            abs(a - b) <= _STILL * layer.weights.size for a, b, layer in zip(counts, now, self.layers, strict=True)
        ):
            counts = now
        return [LayerBudget(total=count) for count in counts]

    def _fitted(self, masks: Sequence[BoolArray], budgets: list[LayerBudget]) -> list[BoolArray | None]:
        """Masks with the numbers of new budgets: pruned weights return, or kept ones go, by size times √H_ii."""
        out: list[BoolArray | None] = []
        for layer, mask, budget in zip(self.layers, masks, budgets, strict=True):
            cost = layer.weights**2 * np.diag(layer.hessian) * layer.scale[:, None]
            cost = np.where(mask, cost - 2.0 * cost.max() - 1.0, cost)
            fitted = budget.cheapest([layer], [cost])[0]
            out.append(fitted)
        return out

    def _solve(
        self, budgets: list[LayerBudget], warm: Sequence[BoolArray | None], share: float, number: int
    ) -> list[BoolArray] | None:
        """One round; the masks of all layers, or None if it was stopped."""
        seconds = self._seconds(share)
        options = {**self.options, "seed": self.options.get("seed", 0) + 104_729 * number}
        tasks = [
            SolveTask(k, layer, budgets[k], self.objective, warm[k], seconds[k], options)
            for k, layer in enumerate(self.layers)
        ]
        solved: dict[int, Solved] = {}
        for task, answer in self.engine.run(self._largest_first(tasks), solve_task, self.should_stop):
            if answer is None or answer.mask is None:
                reason = "its worker was killed at every try" if answer is None else answer.error
                logger.warning(f"layer {task.index} was not solved: {reason}")
            else:
                solved[task.index] = answer
        masks, losses, weights = [], [], []
        for k, layer in enumerate(self.layers):
            answer = solved.get(k) or self._without(layer, budgets[k], warm[k])
            assert answer.mask is not None
            masks.append(answer.mask)
            losses.append(answer.objective)
            weights.append(answer.weights)
        known = [w for w in weights if w is not None]
        self.incumbent.offer(sum(losses), masks)
        if len(known) == len(weights):
            self.incumbent.adopt(masks, known)
        self._losses = losses
        if self.budget.total is None and len(solved) == len(self.layers):
            self.bounds = np.maximum(self.bounds, [solved[k].bound or 0.0 for k in range(len(self.layers))])
            self.incumbent.offer_bound(float(self.bounds.sum()))
        return None if len(solved) < len(self.layers) and self.should_stop() else masks

    def _without(self, layer: Layer, budget: LayerBudget, warm: BoolArray | None) -> Solved:
        """The answer for a layer that was not solved: its warm start, or magnitude."""
        mask = budget.cheapest([layer], [np.abs(layer.weights)])[0] if warm is None else warm
        return Solved(
            mask,
            None,
            self._loss_bound(layer, mask) if self.stopped() else loss_of(layer, mask, self.objective),
            None,
        )

    def _seconds(self, share: float) -> list[float | None]:
        """Of each task, so that the round ends in time however the tasks are packed; None without a limit."""
        if self.ends == math.inf:
            return [None] * len(self.layers)
        left = max(0.0, share * (self.ends - time.perf_counter()) - _MARGIN)
        workers = min(self.engine.workers, len(self.layers))
        per_work = left / (self.work.sum() / workers + (1 - 1 / workers) * self.work.max())
        return [max(_LEAST_SECONDS, float(per_work * work)) for work in self.work]
