"""The entry point of this package: `solve_layers`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cbs_opt.device import Card, or_on_cpu
from cbs_opt.errors import InstanceError
from cbs_opt.solvers.layers.bound import BoundSearch
from cbs_opt.solvers.layers.incumbent import Incumbent, Report
from cbs_opt.solvers.layers.joint import JointSearch
from cbs_opt.solvers.layers.parallel import RowPool
from cbs_opt.solvers.layers.problem import Layer, LayerBudget, LayerSolution, layer_losses, loss_bound
from cbs_opt.solvers.layers.refit import brief_refit, quick_refit, refit_layer, seconds_of_refit
from cbs_opt.solvers.layers.selection import SelectionSearch
from cbs_opt.solvers.layers.starts import admm, swept_weights
from cbs_opt.solvers.layers.tiled_budget import Band, TiledBudget
from cbs_opt.solvers.layers.tiled_search import TiledSearch, fits_tableaus
from cbs_opt.solvers.layers.tiled_wide import TiledWideSearch
from cbs_opt.solvers.layers.wide import WideSearch
from cbs_opt.solvers.layers.wide_admm import column_norms
from cbs_opt.threads import library_threads
from cbs_opt.typing import BoolArray, FloatArray

logger = logging.getLogger("cbs_opt")

TABLEAU_COLUMNS = 1100
"""Rows up to this long are searched on their own tableau; longer ones are exchanged in bulk."""

_ADMM_COLUMNS = 400  # from here on ADMM is cheaper than the elimination of every row
_FIRST_EXCHANGES = 0.5  # of the time spent so far goes to exchanges in the answer of ADMM
_FEW = 0.15  # of the weights of a row: three iterations of a brief refit are then enough
_FIRST_MOVES = 50
_TENURES = (5, 8, 4, 10)
_SHARED = 0.25  # of the time for bounds goes to one block-diagonal matrix for all rows
_LARGEST_CELL = 12  # of a pattern for which bounds enumerate the masks of a cell; else they count by rows
_PATIENCE = 6  # such steps without a much better bound
_SETTLED = 2e-4  # relative gain of a round that ends a run without a limit of time
_LEAST_ROUNDS = 2  # of such a run
_ON_CARD = 0.25  # of the time that a card has for layers which the CPU goes on with
_MOST_ROUNDS = 5  # of such a run, as every round makes twice the moves of the last one


def solve_layers(
    layers: list[Layer],
    budget: LayerBudget,
    *,
    objective: str = "joint",
    warm_start: list[BoolArray] | None = None,
    report: Report | None = None,
    report_bound: Callable[[float], object] | None = None,
    should_stop: Callable[[], bool] | None = None,
    time_limit: float | None = None,
    threads: int = 1,
    seed: int = 0,
    bound_share: float = 0.0,
    max_rounds: int | None = None,
    refit: bool = True,
    keep_back: Callable[[float], object] | None = None,
    wide: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    card: Card | None = None,
) -> LayerSolution:
    """Prune layers whose rows share Hessians.

    Parameters
    ----------
    layers : list of Layer
    budget : LayerBudget
    objective : {"joint", "selection"}
    warm_start : list of bool (rows, K), optional
        Feasible masks; the answer is never worse.
    report : callable, optional
        Called with (objective, masks) for every better solution, in the calling thread.
    report_bound : callable, optional
        Called with every better lower bound.
    should_stop : callable, optional
        Asked every 20-50 ms; True ends the run, the incumbent is kept.
    time_limit : float, optional
        Seconds.
    threads : int
    seed : int
    bound_share : float
        Share of the time limit that goes to lower bounds, 0 for none; without a limit, of the time of the run.
    max_rounds : int, optional
        Rounds of search over all rows at most; without a limit of time the search ends when a round gains little.
    refit : bool
        Whether to compute the weights of the answer (after the clock); without, they are the masked weights.
    keep_back : callable, optional
        Called with the seconds that an exact refit of the answer takes, where the caller is to do it: the run ends
        so much earlier, after half of its limit at least.
    wide : bool
        Whether to search short rows as long ones, for the joint objective: that needs no compiled kernels.
    clock : callable
        Seconds, monotonic, for the limit and the history; `time.process_time` measures processor seconds.
    card : Card, optional
        Where the joint objective of layers of more than `TABLEAU_COLUMNS` columns is searched; that of others is
        searched there first, and on the CPU from what was found.

    Returns
    -------
    LayerSolution

    Raises
    ------
    InstanceError
        For data, budgets or warm starts that do not fit.
    """
    if objective not in ("joint", "selection"):
        raise InstanceError(f"the objective must be joint or selection, got {objective!r}")
    budget.check(layers)
    if warm_start is not None and not (
        len(warm_start) == len(layers)
        and all(m.shape == la.weights.shape for m, la in zip(warm_start, layers, strict=True))
        and budget.satisfied(warm_start)
    ):
        raise InstanceError("the warm start does not fit the layers and their budget")
    started = clock()
    ends = np.inf if time_limit is None else started + time_limit
    asked = should_stop or (lambda: False)
    run = _Run(layers, budget, Incumbent(layers, report, report_bound, clock), asked, ends, threads, seed, clock)
    run.started, run.keep_back = started, keep_back
    run.bound_share, run.max_rounds, run.card = bound_share, max_rounds, card
    run.used["device"] = "cpu" if card is None else card.name
    run.wide = wide or run.columns > TABLEAU_COLUMNS
    if isinstance(budget, TiledBudget):
        run.bands, run.card = budget.bands(layers), None
        run.wide = run.wide or not fits_tableaus(run.bands, run.columns, threads)
    if objective == "selection":
        if isinstance(budget, TiledBudget):
            raise InstanceError("layers with cross groups are solved for the joint objective only")
        run.selection(warm_start)
    else:
        run.joint(warm_start)
    return run.solution(objective, refit)


class _Run:
    def __init__(
        self,
        layers: list[Layer],
        budget: LayerBudget,
        incumbent: Incumbent,
        asked: Callable[[], bool],
        ends: float,
        threads: int,
        seed: int,
        clock: Callable[[], float],
    ) -> None:
        self.clock = clock
        self.layers, self.budget, self.incumbent = layers, budget, incumbent
        self.asked, self.ends, self.threads, self.seed = asked, ends, threads, seed
        self.started = clock()
        self.bound_share = 0.0
        self.max_rounds: int | None = None
        self.card: Card | None = None
        self.used: dict[str, Any] = {}
        self.round = 0
        self.wide = False
        self.compared = True
        self.columns = max(layer.columns for layer in layers)
        self.keep_back: Callable[[float], object] | None = None
        self.bands: list[Band] = []

    def stop(self) -> bool:
        """Whether the time is over, or the caller says so."""
        return self.clock() >= self.ends or self.asked()

    # Joint ---------------------------------------------------------------------------------------------------

    def joint(self, warm_start: list[BoolArray] | None) -> None:
        """Quick starts, elimination, search and bounds; see `solve_layers`."""
        magnitude = self.budget.cheapest(self.layers, [np.abs(layer.weights) for layer in self.layers])
        pending = [magnitude] if warm_start is None else [magnitude, warm_start]
        if self.card is not None and self._joint_on(self.card, pending):
            return
        if self.wide:
            kind = TiledWideSearch if isinstance(self.budget, TiledBudget) else WideSearch
            wide = kind(
                self.layers, self.budget, self.incumbent, self.stop, lambda: self.ends - self.clock(),
                self.max_rounds, self.clock, self._keep_back,
            )  # fmt: skip
            with library_threads(self.threads):
                self.compared = wide.run(pending)
            return
        self.incumbent.offer(self._zeroed_loss(magnitude), magnitude)  # a first answer at once
        if self.keep_back is not None and np.isfinite(self.ends):
            self._keep_back(seconds_of_refit(self.layers, magnitude, self.clock))
        with RowPool(self.threads, self.stop) as pool:
            self._joint_small(pending, pool)

    def _keep_back(self, seconds: float) -> None:
        """End so much earlier, if the caller evaluates the answer within the limit."""
        if self.keep_back is not None and np.isfinite(self.ends):
            self.keep_back(seconds)
            self.ends -= min(seconds, 0.5 * (self.ends - self.started))

    def _joint_on(self, card: Card, pending: list[list[BoolArray]]) -> bool:
        """The search on a card; False where the CPU is to go on, from what was found as well."""
        from cbs_opt.solvers.layers.device_wide import DeviceWideSearch

        long, ends, failed = self.columns > TABLEAU_COLUMNS, self.ends, list[str]()
        incumbent = self.incumbent
        if not long:  # the CPU computes the losses of what the card found anew, in float64
            incumbent = Incumbent(self.layers, clock=self.clock)
            self.incumbent.offer(self._zeroed_loss(pending[0]), pending[0])
            ends = self.clock() + _ON_CARD * (self.ends - self.clock())
        with or_on_cpu("the layers", self.used, failed):
            for masks in pending:
                incumbent.offer(loss_bound(self.layers, masks), masks)
            search = DeviceWideSearch(
                self.layers, self.budget, incumbent, lambda: self.clock() >= ends or self.stop(),
                lambda: ends - self.clock(), card, self.max_rounds,
            )  # fmt: skip
            compared = search.run(pending)
            if long:
                self.compared = compared
        if not long and incumbent.pruned:
            pending.append(incumbent.pruned)
        return long and not failed

    def _zeroed_loss(self, masks: list[BoolArray]) -> float:
        zeroed = [np.where(mask, 0.0, layer.weights) for layer, mask in zip(self.layers, masks, strict=True)]
        return layer_losses(self.layers, zeroed)

    def _joint_small(self, pending: list[list[BoolArray]], pool: RowPool) -> None:
        search: JointSearch | TiledSearch
        if isinstance(self.budget, TiledBudget):
            search = TiledSearch(
                self.layers, self.budget, self.bands, self.incumbent, pool, self.seed, self.clock
            )  # fmt: skip
        else:
            search = JointSearch(self.layers, self.budget, self.incumbent, pool, self.seed, self.clock)
        try:
            eliminate = self._quick_starts(search, pool)
        except np.linalg.LinAlgError:
            logger.warning("a stored Hessian is not positive definite: starting from magnitude")
            eliminate = True
        for masks in pending:  # also when stopped: never worse than these
            self.incumbent.offer(search.objective_of(masks), masks)
        if pool.stopped():
            return
        if eliminate and isinstance(search, JointSearch):
            search.eliminate()
        search.start_from(self.incumbent.pruned)
        self._search_and_bound(search, pool)

    def _quick_starts(self, search: JointSearch | TiledSearch, pool: RowPool) -> bool:
        """The first answers; whether elimination may find a better one."""
        thresholded = np.inf
        if self.columns >= _ADMM_COLUMNS or isinstance(search, TiledSearch):
            masks = admm(self.layers, self.budget, should_stop=pool.stopped)
            if masks is not None:
                thresholded = self._offer_refitted(search, masks, None, pool)
                if not pool.stopped():  # first exchanges, as long as a part of what ADMM took
                    search.start_from(masks)
                    search.estimate_price()
                    now = self.clock()
                    search.search(10_000, 0, 0, now + _FIRST_EXCHANGES * (now - self.started))
        found = swept_weights(self.layers, self.budget, should_stop=pool.stopped)
        if found is None:
            return False
        masks, weights = found
        kept = sum(int((~mask).sum()) for mask in masks) / sum(layer.rows for layer in self.layers)
        near = 0.0  # a few iterations come near the refit in less time
        for layer, mask, start in zip(self.layers, masks, weights, strict=True):
            near += brief_refit(layer, mask, start, 3 if kept < _FEW * layer.columns else 6)
        self.incumbent.offer(near, masks)
        return self._offer_refitted(search, masks, weights, pool) < thresholded

    def _offer_refitted(
        self,
        search: JointSearch | TiledSearch,
        masks: list[BoolArray],
        starts: list[FloatArray] | None,
        pool: RowPool,
    ) -> float:
        """Offer masks with a quick refit; the loss found."""
        total = 0.0
        for k, (layer, mask) in enumerate(zip(self.layers, masks, strict=True)):
            start = None if starts is None else starts[k]
            losses, exact = quick_refit(layer, mask, start, should_stop=pool.stopped)
            total += float(losses.sum())
            if exact:
                search.remember(k, mask, losses)
        self.incumbent.offer(total, masks)
        return total

    def _search_and_bound(
        self, search: JointSearch | TiledSearch, pool: RowPool, fixed_weights: bool = False
    ) -> None:
        """Search, bounds, and search again, by shares of the time limit."""
        limit = self.ends - self.started
        if self.bound_share <= 0 or not np.isfinite(limit):
            self._rounds(search, pool, self.ends)
            if self.bound_share > 0:  # without a limit the bounds have their share of the time of the search
                spent = self.clock() - self.started
                until = self.clock() + spent * self.bound_share / (1 - self.bound_share)
                self._bounds(pool, until, fixed_weights, search.price)
            return
        first = 0.6 * (1 - self.bound_share) * limit
        self._rounds(search, pool, self.started + first)
        self._bounds(pool, self.started + first + self.bound_share * limit, fixed_weights, search.price)
        self._rounds(search, pool, self.ends)

    def _bounds(self, pool: RowPool, until: float, fixed_weights: bool, price: float) -> None:
        if pool.stopped():
            return
        pairs = zip(self.layers, self.incumbent.pruned, strict=True)
        if fixed_weights:
            weights = [np.where(mask, 0.0, layer.weights) for layer, mask in pairs]
        else:
            weights = [refit_layer(layer, mask) for layer, mask in pairs]
        budget = self.budget
        if budget.pattern is not None and budget.pattern[1] > _LARGEST_CELL:
            n, m = budget.pattern
            budget = LayerBudget(per_row=tuple(np.full(la.rows, n * (la.columns // m)) for la in self.layers))
        search = BoundSearch(self.layers, budget, self.incumbent, weights, pool, fixed=fixed_weights, price=price)
        try:
            if not search.prepare():
                return
        except np.linalg.LinAlgError:
            logger.warning("no bound: a stored Hessian is not positive definite")
            return
        began, best, idle = self.clock(), -np.inf, 0
        shared = began + _SHARED * (until - began)
        while self.clock() < shared and idle < _PATIENCE:  # one B for all rows first, then one for each
            if not search.step():
                return
            idle = idle + 1 if search.value - best < 5e-3 * self.incumbent.objective else 0
            best = max(best, search.value)
        search.refine(lambda: self.clock() >= until)

    def _rounds(self, search: JointSearch | TiledSearch, pool: RowPool, until: float) -> None:
        if search.price == 0.0:
            search.estimate_price()
        before = self.incumbent.objective
        while not pool.stopped() and (self.max_rounds is None or self.round < self.max_rounds):
            number = self.round
            steps = _FIRST_MOVES << min(number - 1, 20) if number else 10_000
            if not search.search(steps, _TENURES[number % len(_TENURES)] if number else 0, number, until):
                return
            self.round += 1
            gained = (before - self.incumbent.objective) / max(before, 1e-300)
            before = self.incumbent.objective
            settled = number >= _MOST_ROUNDS or (number >= _LEAST_ROUNDS and gained < _SETTLED)
            if self.clock() >= until or (settled and not np.isfinite(self.ends)):
                return

    # Selection -----------------------------------------------------------------------------------------------

    def selection(self, warm_start: list[BoolArray] | None) -> None:
        """Wanda's order and the warm start, then greedy paths and exchanges; see `solve_layers`."""
        diagonal = [layer.weights**2 * np.diag(layer.hessian) for layer in self.layers]
        scores = [layer.scale[:, None] * d for layer, d in zip(self.layers, diagonal, strict=True)]
        starts = [self.budget.cheapest(self.layers, scores)]
        starts += [] if warm_start is None else [warm_start]
        starts.append(self.budget.cheapest(self.layers, [np.abs(layer.weights) for layer in self.layers]))
        for masks in starts:
            self.incumbent.offer(self._zeroed_loss(masks), masks)
        with RowPool(self.threads, self.stop) as pool:
            search = SelectionSearch(self.layers, self.budget, self.incumbent, pool, self.seed, self.clock)
            if not search.eliminate():
                return
            search.start_from(self.incumbent.pruned)
            self._search_and_bound(search, pool, fixed_weights=True)

    # Answer --------------------------------------------------------------------------------------------------

    def solution(self, objective: str, refit: bool) -> LayerSolution:
        """The incumbent with its weights and recomputed objective."""
        pruned = self.incumbent.pruned
        starts = self._unscaled()
        weights: list[FloatArray] = []
        for k, (layer, mask) in enumerate(zip(self.layers, pruned, strict=True)):
            if objective == "joint" and refit:
                with library_threads(self.threads):
                    weights.append(refit_layer(layer, mask, None if starts is None else starts[k]))
            elif starts is not None:
                weights.append(starts[k])
            else:
                weights.append(np.where(mask, 0.0, layer.weights))
        value = layer_losses(self.layers, weights) if refit else self.incumbent.objective
        history = tuple(self.incumbent.history)
        return LayerSolution(
            pruned, weights, value, self.incumbent.bound, history, self.compared, refit or starts is not None,
            self.used["device"],
        )  # fmt: skip

    def _unscaled(self) -> list[FloatArray] | None:
        """The weights that the search on long rows has for its incumbent, float32, in the units of the layers."""
        if self.incumbent.weights is None:
            return None
        found = zip(self.layers, self.incumbent.weights, self.incumbent.pruned, strict=True)
        return [np.where(mask, np.float32(0), x / column_norms(la).astype(x.dtype)) for la, x, mask in found]
