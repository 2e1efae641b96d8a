"""The best selection heuristic of the package: relaxation, concave continuation on cores, tabu swaps, a bound."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from cbs_opt.device import Card, is_wanted, or_on_cpu
from cbs_opt.instance import Instance
from cbs_opt.registry import register
from cbs_opt.result import Status
from cbs_opt.solver import Capabilities, Context, Solver
from cbs_opt.solvers.kernels import loading
from cbs_opt.solvers.kernels.warm_up import warm_up_products
from cbs_opt.solvers.layers.layered_instance import LayeredInstance, check_engine, layered_instance
from cbs_opt.solvers.problem.selection_problem import SelectionProblem, Storage
from cbs_opt.solvers.selection.breeding import EXPONENT, Breeding
from cbs_opt.solvers.selection.incumbent import GAIN, CorePoint, Incumbent, candidate_swaps
from cbs_opt.solvers.selection.parameters import SearchParameters
from cbs_opt.solvers.selection.relaxation import Relaxation
from cbs_opt.solvers.selection.swaps import improve_by_all_swaps
from cbs_opt.solvers.selection.sweep_search import SweepSearch, is_large, is_split
from cbs_opt.solvers.selection.tile_exchange import search_tiles
from cbs_opt.solvers.trees import prove
from cbs_opt.typing import BoolArray

logger = logging.getLogger("cbs_opt")

PATH = (0.1, 0.03, 0.01, 3e-3, 1e-3)
"""Concave weights of the path that leads to the relaxation from which cores and starts are taken."""

_EARLY = 0.01  # weight on the path at which a first point is hardened
_PATH_TOLERANCE = 1e-4
_PATH_ROUNDS = 24  # at most; fewer where the blocks are small
_DEEPEN_ROUNDS = 24  # further rounds after every epoch until the path has converged
_DEEPEN_ROUNDS_LARGE = 4
_STALE_BOUNDS = 5
_BOUND_GAIN = 1e-4  # of the objective: a bound that rises by less is stale
_BOUND_ROUNDS = 10  # of the plain relaxation after every epoch until it has converged
_UNPOLISHED = 20  # cycles without a gain after which all swaps are tried
_VISITS_WITHOUT_GAIN = 8  # on a card, after which the search ends where nothing else limits it
_HARDENINGS = 3  # of a large problem by sweeps, with rounds of the relaxation between them


@register("search")
class Search(Solver):
    """Relaxation, concave continuation, tabu; an iteration is a cycle.

    A cycle *melts* a binary point, or the middle of two (relaxes it with a small weight on the concave term of
    `Relaxation`, with random weights per variable), *hardens* it (that weight grows until the point is binary),
    rounds, and repairs by tabu search and swaps. It works on a core: the variables on which good points differ,
    and those closest to their threshold in the relaxation. Cycles on one core form an epoch; an improvement is
    repaired by swaps over all variables with a recomputed gradient. See `Breeding`.
    Between epochs the relaxation is continued, and gives a lower bound. A single component of up to 250 weights
    (100 without a time limit) is handed to branch and bound after two epochs, or eight from 160 weights on; its
    nodes then count as iterations. So are many such components under one budget, if their tables take at most
    half of the time.
    """

    summary = "relaxation, concave continuation on cores, tabu swaps; with a lower bound"
    supports = Capabilities(
        cross_groups=True, bound=True, device=True, engines=True, warm_start=True, not_worse_than_magnitude=True
    )
    parameters_type = SearchParameters
    parameters: SearchParameters

    def prepare(self, instance: Instance, context: Context) -> None:
        """Compile, presolve, build columns; or find out that the rows of layers share Hessians."""
        self._layered = self._layers(instance, context)
        check_engine(context, self._layered)
        if instance.budget.cross_groups is not None:
            if context.device == "cuda":
                logger.warning("search: on the CPU, as cross groups have no search on a card")
            loading.request("selection")
            return
        if self._layered is not None:
            loading.request("layers_selection")
            return
        loading.request("selection")
        warm_up_products(instance.curvature.as_factor() is not None)
        given = self.parameters
        storage = Storage(given.dense_bytes, given.double_bytes, given.threaded_gradients)
        self._problem = SelectionProblem(instance, context.threads, storage)
        if self._problem.threaded:
            loading.wait("sweeps", should_stop=context.monitor.should_stop)
        elif is_large(self._problem, given.large):  # loading them takes most of a second
            loading.request("sweeps")
        self._prover: prove.Prover | None = None
        if self._is_provable(context):
            self._prover = prove.Prover(self._problem)
            loading.request(*self._prover.kernels)
        self._card: Card | None = None
        if (context.device == "cuda" or self._prover is None) and is_wanted(context.device, instance.n):
            from cbs_opt.solvers.selection.device_search import card_for

            self._card = card_for(self._problem, context)

    def run(self, instance: Instance, context: Context) -> Status:
        """Search until told to stop, or until nothing improves any more."""
        if instance.budget.cross_groups is not None:
            return search_tiles(instance, context)
        if self._layered is not None:
            return self._layered.run(context, self.parameters.bound_share)
        monitor, problem = context.monitor, self._problem
        run = _Run(problem, self.parameters, context)
        if self._card is not None and not run.is_trivial():
            with or_on_cpu("the search", context.extras):
                run.search_on(self._card, context)
                return Status.OPTIMAL if monitor.closed else Status.CONVERGED
        # A tree of more weights is longer at work before it meets its best leaf; tables bring their selections.
        before_proof = 8 if len(problem.component_sizes) == 1 and problem.n >= 160 else 2
        run.search(epochs=None if self._prover is None else before_proof)
        if self._prover is None or monitor.should_stop() or monitor.closed:
            return Status.OPTIMAL if monitor.closed else Status.CONVERGED
        return prove.prove_within(self._prover, context, run.resume)

    def _layers(self, instance: Instance, context: Context) -> LayeredInstance | None:
        """The layers of an instance whose rows share Hessians, unless it is small enough to be proven."""
        sizes, groups = instance.curvature.block_sizes.tolist(), int((instance.budget.per_group > 0).sum())
        provable = prove.is_provable(sizes, groups, self.parameters.proof, context.monitor.stop)
        if provable and context.engine is None:
            return None
        return layered_instance(instance, "selection")

    def _is_provable(self, context: Context) -> bool:
        """Whether branch and bound proves the optimum of such problems in seconds."""
        problem, stop, largest = self._problem, context.monitor.stop, self.parameters.proof
        if stop.time_limit is None:
            largest = min(largest, prove.WITHOUT_LIMIT)
        sizes = problem.component_sizes
        if len(sizes) == 1:
            return problem.n <= largest
        groups = int((problem.budget > 0).sum())
        return prove.is_provable(sizes, groups, largest, stop)


class _Run:
    """The state of one search."""

    def __init__(self, problem: SelectionProblem, parameters: SearchParameters, context: Context) -> None:
        self.problem, self.parameters = problem, parameters
        self.split = is_split(problem, parameters.large, parameters.many_blocks, parameters.small_block)
        self.monitor = context.monitor
        self.rng = context.rng()
        self.breeding = Breeding(problem, parameters, self.monitor, self.rng, lambda: self.point, self._offer)
        cheapest = problem.cheapest()
        self.point = Incumbent(problem, cheapest)
        self.polished: Incumbent | None = None
        self._reported: BoolArray | None = None
        self._relaxed: Relaxation | None = None
        self._tight: Relaxation | None = None
        self._settled = self._tightened = False
        self._epoch = self._stale = 0
        self._deepen = _DEEPEN_ROUNDS
        self._report()
        instance = problem.instance
        magnitude = instance.budget.cheapest(np.abs(instance.weights), instance.fixed)
        self._offer(Incumbent(problem, problem.restrict(magnitude)))
        if context.warm_start is not None:
            self._offer(Incumbent(problem, problem.restrict(context.warm_start)))
        self.patience = parameters.patience
        if self.patience is None and not self.monitor.stop.limits_work:
            self.patience = 150

    def _report(self) -> None:
        if self.monitor.report(self.point.loss(), self.problem.expand(self.point.y)):
            self._reported = self.monitor.pruned

    def _offer(self, other: Incumbent) -> None:
        """Take another point as the incumbent if it is better."""
        if other.f < self.point.f - GAIN * abs(self.point.f):
            self.point = other
            self._report()

    def _improved(self, before: float | None) -> bool:
        """Whether the incumbent got better by more than rounding."""
        now, rounding = self.monitor.objective, 1e-15 * self.problem.scale
        return before is None or (now is not None and now < before - GAIN * abs(before) - rounding)

    def _take_over(self) -> None:
        """Take over a better selection that something else has reported, such as a proof."""
        pruned = self.monitor.pruned
        if pruned is not None and pruned is not self._reported:
            self._reported = pruned
            self._offer(Incumbent(self.problem, self.problem.restrict(pruned)))

    def resume(self, until: float) -> None:
        """Take over a better incumbent, and go on until the clock shows `until`; polish only, if that is never."""
        monitor = self.monitor
        self._take_over()
        if not np.isfinite(until):
            self._polish()
        elif self._relaxed is not None:
            self._epochs(self._relaxed, lambda: monitor.elapsed > until)

    def search(self, epochs: int | None = None) -> None:
        """Path, then epochs, as many as are asked for."""
        problem, monitor = self.problem, self.monitor
        if self.is_trivial():
            monitor.report_bound(problem.certified_bound(self.point.y))
            return
        if monitor.should_stop():
            return
        large = is_large(problem, self.parameters.large)
        if not self._wait("selection", *("sweeps",) * (self.split or large)):
            return
        if self.split:
            self._search_blocks()
            return
        relaxed = self._sweep() if large else self._path()
        if monitor.should_stop():
            return
        monitor.report_bound(relaxed.bound())
        self._relaxed = relaxed
        self._deepen = _DEEPEN_ROUNDS_LARGE if large else _DEEPEN_ROUNDS
        self._epochs(relaxed, lambda: epochs is not None and self._epoch >= epochs)

    def _epochs(self, relaxed: Relaxation, enough: Callable[[], bool]) -> None:
        """Epochs of cycles on cores, with rounds of the relaxation between them."""
        problem, monitor = self.problem, self.monitor
        start = Incumbent(problem, problem.smallest(-relaxed.x))
        idle = 0
        while not (monitor.should_stop() or monitor.closed or enough()):
            self._take_over()
            fresh = self._epoch % 2 == 0
            before, cycles = monitor.objective, monitor.iterations
            # Sweeps have hardened a large problem as a whole: a rounding of the relaxation is far behind that.
            base = start if fresh and self._deepen == _DEEPEN_ROUNDS else self.point
            self.breeding.epoch(relaxed, PATH[-1], base, fresh, first=self._epoch == 0)
            idle = 0 if self._improved(before) else idle + monitor.iterations - cycles
            self._epoch += 1
            if idle >= _UNPOLISHED:
                self._polish()
            if not self._settled:
                self._settled = self._solve(relaxed, PATH[-1], _PATH_TOLERANCE, self._deepen) < self._deepen
                start = Incumbent(problem, problem.smallest(-relaxed.x))
            if self._epoch >= 2:
                self._tighten(relaxed)
            if self.patience is not None and idle >= self.patience and self._tightened:
                if not self._polish():
                    return
                idle = 0

    def _tighten(self, relaxed: Relaxation) -> None:
        """Rounds of the plain relaxation, for the bound."""
        if self._tightened:
            return
        monitor = self.monitor
        if self._tight is None:
            self._tight = relaxed.copy()
        done = self._solve(self._tight, 0.0, 1e-7, _BOUND_ROUNDS) < _BOUND_ROUNDS
        old = monitor.bound if monitor.bound is not None else -np.inf
        monitor.report_bound(self._tight.bound())
        now = monitor.bound if monitor.bound is not None else -np.inf
        self._stale = 0 if now - old > _BOUND_GAIN * abs(monitor.objective or 0.0) else self._stale + 1
        self._tightened = done or self._stale >= _STALE_BOUNDS  # badly scaled problems may never converge

    def is_trivial(self) -> bool:
        """Whether there is nothing to choose."""
        return self.problem.n == 0 or not self.problem.budget.any()

    def search_on(self, card: Card, context: Context) -> None:
        """The path, then visits of all blocks on a card while the bound is improved.

        The path of a large problem is followed on the card; working sets on the CPU take less time on others.
        """
        from cbs_opt.solvers.selection.device_search import DeviceSearch

        monitor, seed = self.monitor, int(self.rng.integers(2**62))
        large = is_large(self.problem, self.parameters.large)
        context.extras["device"] = card.name
        if monitor.should_stop() or not (large or self._wait("selection")):
            return
        found = DeviceSearch(self.problem, self.parameters, monitor, self._offer, seed, card)
        tight = None if large else self._path()
        if tight is None:
            found.path(PATH)
        else:
            found.start_from(tight.x)
            monitor.report_bound(tight.bound())

        def tighten() -> bool:
            if tight is None:
                return found.tighten()
            rounds = self._solve(tight, 0.0, 1e-7, _BOUND_ROUNDS)
            monitor.report_bound(tight.bound())
            return rounds < _BOUND_ROUNDS

        patience = self.parameters.patience or (None if monitor.stop.limits_work else _VISITS_WITHOUT_GAIN)
        found.search(lambda: self.point, self._improved, self._polish, tighten, patience)
        context.extras["drift"] = found.drift
        drift = f"objectives drifted by at most {found.drift:.1e} between two refreshes"
        logger.info(f"{found.visits} visits of {found.starts} starts on {card.name}; {drift}")

    def _polish(self) -> bool:
        """Make the incumbent optimal for all swaps, not only for those of candidates; whether that gained."""
        if self.polished is self.point:
            return False
        point = self.point.copy()
        improve_by_all_swaps(point, self.monitor.should_stop)
        before = self.point
        self._offer(point)
        if not self.monitor.should_stop():
            self.polished = self.point
        return self.point is not before

    def _wait(self, *kernels: str) -> bool:
        """Wait for kernels; False when told to stop before they are there.

        Meanwhile swaps that need none improve the first selection. It counts only where the run ends here: what a
        seed leads to must not depend on whether there was a wait.
        """
        monitor = self.monitor
        if loading.is_loaded(*kernels):
            return loading.wait(*kernels, should_stop=monitor.should_stop)
        point = self.point.copy()
        candidate_swaps(point, lambda: loading.is_loaded(*kernels) or monitor.should_stop(), limit=10**6)
        value = self.problem.objective(point.y)
        logger.info(f"a selection of loss {value:.6e} stands, by swaps without compiled kernels")
        if loading.wait(*kernels, should_stop=monitor.should_stop):
            return True
        monitor.report(value, self.problem.expand(point.y))
        return False

    def _sweeps(self) -> SweepSearch:
        seed = int(self.rng.integers(2**62))
        return SweepSearch(self.problem, self.monitor, self._offer, seed, finely=self.split)

    def _sweep(self) -> Relaxation:
        """The path by sweeps over all variables; working sets with Newton steps only at its end."""
        sweeps = self._sweeps()
        sweeps.path(PATH)
        relaxed = sweeps.relaxation()
        for _ in range(_HARDENINGS):
            if self.monitor.should_stop():
                break
            self.monitor.report_bound(relaxed.bound())
            self._solve(relaxed, PATH[-1], _PATH_TOLERANCE, 2)
            if not self.monitor.should_stop():
                sweeps.harden_from(relaxed.x)
        return relaxed

    def _search_blocks(self) -> None:
        """Sweeps, then cores of all blocks, while the bound is improved."""
        sweeps, monitor, parameters = self._sweeps(), self.monitor, self.parameters
        sweeps.path(PATH)
        idle = 0
        while not monitor.should_stop():
            before, cycles = monitor.objective, monitor.iterations
            sweeps.tighten()
            if monitor.closed:
                return
            sweeps.visit_blocks(self.point, parameters)
            idle = 0 if self._improved(before) else idle + monitor.iterations - cycles
            if self.patience is not None and idle >= self.patience * sweeps.blocks:
                if not self._polish():
                    return
                idle = 0

    def _solve(self, relaxed: Relaxation, t: float, tolerance: float, rounds: int) -> int:
        return relaxed.solve(
            t,
            size=self.parameters.working_set,
            tolerance=tolerance,
            rounds=rounds,
            should_stop=self.monitor.should_stop,
        )

    def _path(self) -> Relaxation:
        """Follow the concave weights down from the diagonal start, rounding at every one."""
        problem, monitor = self.problem, self.monitor
        relaxed = Relaxation(problem)
        longest = int(np.diff(problem.columns.starts).max())
        rounds = min(4 + -(-longest // (4 * self.parameters.working_set)), _PATH_ROUNDS)
        for t in PATH:
            self._solve(relaxed, t, _PATH_TOLERANCE, rounds)
            rounded = Incumbent(problem, problem.smallest(-relaxed.x))
            if t == _EARLY and not monitor.should_stop():
                local = CorePoint(rounded, self.breeding.choose_core(relaxed, t, min(300, self.parameters.core)))
                x = local.fit(relaxed.x[local.core.index])
                ratio, tolerance = self.breeding.manner.ratio, self.breeding.tolerance(local.core.n)
                y = local.harden(x, local.weights(EXPONENT), t, ratio, tolerance, monitor.should_stop)
                rounded.move(local.core.index, y)
                candidate_swaps(rounded, monitor.should_stop)
            self._offer(rounded)
            if monitor.should_stop():
                break
        return relaxed
