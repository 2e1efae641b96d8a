"""Select and update together: swap search on the joint loss itself."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from cbs_opt.errors import CbsError, SolverError, UsageError
from cbs_opt.instance import Instance
from cbs_opt.interrupt import interruptible
from cbs_opt.losses import joint_loss
from cbs_opt.registry import register
from cbs_opt.result import Status
from cbs_opt.solver import Capabilities, Context, Parameters, Solver, option
from cbs_opt.solvers.joint import backward
from cbs_opt.solvers.joint.breeding import LARGEST, DenseJoint, JointBreeding
from cbs_opt.solvers.joint.bulk_exchange import exchange_in_bulk
from cbs_opt.solvers.joint.lagrangian_bound import improve_bound
from cbs_opt.solvers.joint.moves import KEPT_LIMIT, JointMoves
from cbs_opt.solvers.joint.rank_deficient import check_well_posed, is_rank_deficient, search_singular
from cbs_opt.solvers.joint.tableau import Tableau
from cbs_opt.solvers.joint.tile_exchange import search_tiles
from cbs_opt.solvers.kernels import loading
from cbs_opt.solvers.layers.layered_instance import LayeredInstance, check_engine, layered_instance
from cbs_opt.solvers.problem.joint_problem import JointProblem
from cbs_opt.solvers.trees import prove
from cbs_opt.typing import BoolArray
from cbs_opt.update import best_update

logger = logging.getLogger("cbs_opt")

QUICK = 20
"""Moves of small problems that take as long as one of others."""

_GAIN = 1e-9  # smallest improvement that counts, relative to the loss
_PATIENCE = 400  # moves without improvement after which a search without a limit ends
_PATIENCE_BEFORE_PROOF = 3000  # the same at most on the small problems that are proven next
_PROVEN_SOONER = 100  # selections that are enumerated in the time of a move, cautiously
_FIRST_SHARE = 0.3  # of the time limit, for the search before the first proof
_REFACTOR = 200  # moves between two fresh factorisations; more where the drift is small, up to sixteen times
_WORTH_A_WORD = 1e-6  # relative error of the loss
_SMALL_DRIFT, _LARGE_DRIFT = 1e-10, 1e-8  # relative errors that a fresh factorisation finds


@dataclass(frozen=True)
class JointParameters(Parameters):
    """Tabu search after the descent."""

    tenure: int = option(10, "moves for which a weight that moved may not move again; a few more at random")
    patience: int | None = option(
        None, "moves without improvement after which the search ends; 400 without a limit, 3000 before a proof"
    )
    restart: int = option(60, "moves without improvement before a restart from the perturbed incumbent")
    bound_steps: int = option(200, "steps of the ascent to a lower bound, once a local optimum is found")
    proof: int = option(100, "weights of a block up to which branch and bound takes over; 0 for never")
    stage: float = option(0.1, "share of a large block's weights that backward elimination removes at once")
    bound_share: float = option(0.25, "share of the time limit for bounds, where rows share one Hessian")

    def __post_init__(self) -> None:
        for name in ("bound_steps", "proof"):
            if getattr(self, name) < 0:
                raise UsageError(f"`{name}` must not be negative, got {getattr(self, name)}")
        for name in ("tenure", "patience", "restart"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.bound_share < 1:
            raise UsageError(f"`bound_share` must be at least 0 and less than 1, got {self.bound_share}")
        backward.BackwardParameters(self.stage)


_MARGIN = 1.5  # of the time that the evaluation of a selection takes
_AT_ONCE = 2e8  # operations of one joint loss up to which a first selection is reported before any search


@register("joint")
class JointSearch(Solver):
    """Minimise the joint loss: backward elimination, best-swap descent, tabu search; an iteration is a move.

    A move returns one pruned weight and removes one kept weight of the same group, in one block or in two, and
    every price is the exact joint loss, with all other weights updated.
    """

    summary = "swap search on the loss after the update: backward elimination, descent, tabu"
    supports = Capabilities(
        objectives=frozenset({"joint"}),
        cross_groups=True,
        bound=True,
        device=True,
        engines=True,
        warm_start=True,
        not_worse_than_magnitude=True,
    )
    parameters_type = JointParameters
    parameters: JointParameters

    def check_supports(self, instance: Instance, context: Context) -> None:
        """Refuse a singular Hessian with too many kept weights."""
        super().check_supports(instance, context)
        if is_rank_deficient(instance):
            check_well_posed(instance, self.name)
            if instance.budget.cross_groups is not None:
                raise SolverError(
                    f"solver '{self.name}' cannot take cross groups with a singular Hessian: a positive damping "
                    "is needed"
                )

    def prepare(self, instance: Instance, context: Context) -> None:
        """Compile; find out whether the rows of layers share Hessians."""
        self._prover: prove.Prover | None = None
        self._layered: LayeredInstance | None = None
        self._singular = is_rank_deficient(instance)
        if self._singular:
            loading.request("joint")
            return
        crossed = instance.budget.cross_groups is not None
        sizes, groups = instance.curvature.block_sizes.tolist(), int((instance.budget.per_group > 0).sum())
        provable = not crossed and prove.is_provable(sizes, groups, self.parameters.proof, context.monitor.stop)
        limit = context.monitor.stop.time_limit
        # While kernels compile, the search over layers is the one that gets ahead without them.
        cold = limit is not None and loading.seconds_to_compile("joint", "joint_tree", "joint_tables") > limit
        if context.engine is not None or not provable or cold:
            self._layered = layered_instance(instance, "joint")
        check_engine(context, self._layered)
        if self._layered is not None:
            loading.request("layers_joint")
            return
        if context.device == "cuda":
            logger.warning("joint: the search runs on the CPU, as no blocks share a Hessian; the update on a card")
        if crossed:
            return
        loading.request("joint")
        if provable:
            # The search itself reports what is wrong with an instance, and keeps its incumbent.
            with suppress(CbsError, np.linalg.LinAlgError):
                self._prover = prove.Prover(JointProblem(instance))
                loading.request(*self._prover.kernels)

    def run(self, instance: Instance, context: Context) -> Status:
        """Start, descend, and search until told to stop."""
        monitor = context.monitor
        if self._singular:
            return search_singular(instance, context, self._eliminated, self._search_copy)
        if self._layered is not None:
            return self._layered.run(context, self.parameters.bound_share if self.parameters.bound_steps else 0.0)
        if instance.budget.cross_groups is not None:
            return search_tiles(instance, context, self.parameters.bound_steps)
        pruned = context.warm_start
        if pruned is None and float((instance.curvature.block_sizes.astype(np.float64) ** 3).sum()) <= _AT_ONCE:
            score = instance.weights**2 / instance.curvature.inverse_diagonal()
            first = instance.budget.cheapest(score, instance.fixed)
            monitor.report(joint_loss(instance, first), first)
        magnitude = instance.budget.cheapest(np.abs(instance.weights), instance.fixed)
        began = monitor.elapsed
        for first in (magnitude,) if pruned is None else (pruned, magnitude):
            monitor.report(joint_loss(instance, first), first)
        evaluation = (monitor.elapsed - began) / (1 if pruned is None else 2)
        monitor.keep_back(evaluation)
        if not loading.wait("joint", should_stop=monitor.should_stop):
            return Status.CONVERGED

        def remaining() -> float:
            """Seconds that the elimination may take, so that there is time left to evaluate what it finds."""
            return monitor.remaining - _MARGIN * evaluation

        if pruned is None:
            stage, workers = self.parameters.stage, context.workers

            def told() -> bool:
                return remaining() <= 0 or monitor.should_stop()

            with interruptible(told):
                pruned = backward.eliminate(instance, stage, told, workers, remaining)
            monitor.report(joint_loss(instance, pruned), pruned)
        if monitor.should_stop():
            return Status.CONVERGED
        # After backward elimination single swaps are better and faster if there is a tableau.
        assert monitor.pruned is not None
        pruned = monitor.pruned
        least = KEPT_LIMIT if context.warm_start is None else 0
        pruned = exchange_in_bulk(instance, pruned, monitor, least, monitor.objective)
        threads = context.workers
        self._rng, self._bounded = context.rng(), False
        with ThreadPoolExecutor(threads) as pool:

            def search(until: float | None) -> bool:
                """Search from the incumbent on one core; whether another core may hold something better."""
                assert monitor.pruned is not None
                moves = JointMoves(instance, monitor.pruned, pool if threads > 1 else None, threads)
                context.extras["blocks_without_swaps"] = len(moves.skipped)
                before = moves.doubled
                value = 2 * joint_loss(instance, self._search(moves, context, until))
                self._note_drift(moves, value, context)
                whole = sum(index.size for index in moves.weights_of) == instance.n
                return not whole and bool(moves.tableaux) and value <= before - _GAIN * abs(before)

            if not np.array_equal(pruned, monitor.pruned):
                monitor.report(joint_loss(instance, pruned), pruned)
            go_on: Callable[[float | None], bool] = search
            if _is_small(instance):
                go_on = self._breed(instance, context)
            if self._prover is None:
                # The core of a large block is chosen again as long as this improves the loss.
                while not monitor.should_stop() and go_on(None):
                    pass
            elif not monitor.should_stop():
                limit = monitor.stop.time_limit
                go_on(None if limit is None else _FIRST_SHARE * limit)
                if not (monitor.should_stop() or monitor.closed):
                    return prove.prove_within(self._prover, context, go_on)
        return Status.OPTIMAL if monitor.closed else Status.CONVERGED

    def _breed(self, instance: Instance, context: Context) -> Callable[[float | None], bool]:
        """A search for small problems: descent to where no swap gains, then `JointBreeding`."""
        monitor, breeding = context.monitor, None

        def descend() -> JointMoves:
            assert monitor.pruned is not None
            moves = JointMoves(instance, monitor.pruned)
            best = self._search(moves, context, None, descent=True)
            self._note_drift(moves, 2 * joint_loss(instance, best), context)
            return moves

        def search(until: float | None) -> bool:
            nonlocal breeding
            patience = self.parameters.patience
            if patience is None and not monitor.stop.limits_work:
                patience = QUICK * _PATIENCE
            if patience is None and self._prover is not None and not self._bounded:
                patience = QUICK * _patience_before_proof(instance)
            moves = descend()
            if monitor.should_stop() or monitor.closed:
                return False
            breeding = breeding or JointBreeding(DenseJoint(moves), monitor, self._rng, self.parameters.tenure)
            index = breeding.problem.index

            def offer(found: BoolArray, doubled: float) -> None:
                pruned = moves.outside.copy()
                pruned[index] = found
                value = joint_loss(instance, pruned)
                drift = abs(doubled - 2 * value) / max(abs(2 * value), 1e-300)
                context.extras["drift"] = max(context.extras["drift"], float(drift))
                monitor.report(value, pruned)

            limit = np.inf if until is None else until
            breeding.run(moves.pruned()[index], moves.doubled, patience, limit, offer)
            if not monitor.should_stop():
                descend()
            return False

        return search

    def _eliminated(self, copy: Instance, context: Context) -> BoolArray:
        """Backward elimination of the damped copy of a singular instance."""
        monitor = context.monitor
        if not loading.wait("joint", should_stop=monitor.should_stop):
            return copy.budget.cheapest(np.abs(copy.weights), copy.fixed)
        return backward.eliminate(
            copy, self.parameters.stage, monitor.should_stop, context.workers, lambda: monitor.remaining
        )

    def _search_copy(self, copy: Instance, context: Context) -> None:
        """Descent and tabu search on the damped copy; its bounds would not hold."""
        inner = JointSearch(dataclasses.asdict(self.parameters) | {"bound_steps": 0, "proof": 0})
        inner.check_supports(copy, context)
        inner.prepare(copy, context)
        inner.run(copy, context)

    def _note_drift(self, moves: JointMoves, value: float, context: Context) -> None:
        """Keep the largest relative error of the doubled loss, and warn if it is not small.

        `value` is the doubled loss of the best selection by the evaluator.
        """
        error = max(moves.drift, abs(self._best_doubled - value) / max(abs(value), 1e-300))
        drift = context.extras["drift"] = max(context.extras.get("drift", 0.0), float(error))
        if drift > _WORTH_A_WORD:
            logger.warning(
                f"joint: rounding moved the loss by {drift:.1g}, relative, between two factorisations: "
                f"the Hessian is ill-conditioned, and a larger damping would help"
            )

    def _bound(self, moves: JointMoves, context: Context) -> None:
        """Spend a sixth of the remaining time, and ten seconds at most, on a lower bound."""
        monitor, pruned = context.monitor, moves.pruned()
        displacement = best_update(moves.instance, pruned) - moves.instance.weights
        seconds = min(10.0, monitor.remaining / 6)
        improve_bound(
            moves.instance, displacement, moves.doubled / 2, monitor, self.parameters.bound_steps, seconds
        )

    def _search(
        self, moves: JointMoves, context: Context, until: float | None, descent: bool = False
    ) -> BoolArray:
        """Best-swap descent, then tabu search, at most until the clock shows `until`; returns the best selection.

        With `descent` alone it ends where no swap gains, and `moves` is there.

        It ends by itself only where no swap gains, tabu or not.
        """
        monitor, rng = context.monitor, self._rng
        patience = self.parameters.patience
        if patience is None and (not monitor.stop.limits_work or (self._prover is not None and not self._bounded)):
            patience = _PATIENCE if self._prover is None else _patience_before_proof(moves.instance)
        settled = np.inf  # the value at which every swap was tried last
        best, best_doubled = moves.pruned(), moves.doubled
        tabu: deque[tuple[int, int, int]] = deque()  # (free again at move, block, weight), in order
        count = idle = since = 0
        interval = _REFACTOR
        descending, at_best = True, True
        while not monitor.should_stop():
            if until is not None and monitor.elapsed > until:
                break
            move = moves.best_move()
            worth = move is not None and move.change < -_GAIN * abs(moves.doubled)
            if descending and not worth:
                moves.refactor()  # a local optimum is declared only after recomputation
                move = moves.best_move()
                descending = move is not None and move.change < -_GAIN * abs(moves.doubled)
                if not descending and not self._bounded:
                    self._bounded = True
                    self._bound(moves, context)
                    if monitor.closed:
                        break
                if descent and not descending:
                    break
            if move is None and not tabu:
                break
            count += 1
            since += 1
            monitor.advance()
            if move is not None:
                if at_best and not worth:
                    moves.save()
                    at_best = False
                moved = moves.apply(move)
                if not descending:
                    free_at = count + self.parameters.tenure + int(rng.integers(5))
                    for block, weight in moved:
                        moves.forbid(block, weight, True)
                        tabu.append((free_at, block, weight))
            if moves.doubled < best_doubled - _GAIN * abs(best_doubled):
                best, best_doubled, idle, at_best = moves.pruned(), moves.doubled, 0, True
                monitor.report(best_doubled / 2.0, best)
            else:
                idle += 1
            while tabu and (tabu[0][0] <= count or move is None):
                _, block, weight = tabu.popleft()
                moves.forbid(block, weight, False)
            if patience is not None and idle >= patience:
                if settled == best_doubled:
                    break
                settled, descending = best_doubled, True
                while tabu:
                    _, block, weight = tabu.popleft()
                    moves.forbid(block, weight, False)
                if not at_best:
                    moves.go_back()
                    at_best = True
                continue
            if since >= interval:
                error, since = moves.refactor(), 0
                if error < _SMALL_DRIFT:
                    interval = min(2 * interval, 16 * _REFACTOR)
                elif error > _LARGE_DRIFT:
                    interval = max(interval // 2, 20)
            if idle and idle % self.parameters.restart == 0:
                while tabu:
                    _, block, weight = tabu.popleft()
                    moves.forbid(block, weight, False)
                moves.go_back()
                _shake(moves, rng, 3 + int(rng.integers(8)))
                at_best = False
        self._best_doubled = best_doubled
        return best


def _is_small(instance: Instance) -> bool:
    """Whether all open weights fit into one dense tableau."""
    fixed = 0 if instance.fixed is None else int((instance.fixed == 1).sum())
    return instance.n - fixed <= LARGEST


def _patience_before_proof(instance: Instance) -> int:
    """Moves without improvement before the proof, which takes less time than many moves where it counts little."""
    sizes, pruned = instance.budget.group_sizes(instance.n), instance.budget.per_group
    logarithm = sum(
        math.lgamma(n + 1) - math.lgamma(p + 1) - math.lgamma(n - p + 1)
        for n, p in zip(sizes.tolist(), pruned.tolist(), strict=True)
    )
    most = math.log(_PATIENCE_BEFORE_PROOF * _PROVEN_SOONER)
    return max(20, int(math.exp(min(logarithm, most)) / _PROVEN_SOONER))


def _shake(moves: JointMoves, rng: np.random.Generator, swaps: int) -> None:
    """Make random cheap swaps: a kept weight among the cheapest third, the best partner in a random tenth."""
    coupled = [k for k, tableau in enumerate(moves.tableaux) if isinstance(tableau, Tableau)]
    choices = coupled or range(len(moves.tableaux))
    for _ in range(swaps):
        k = choices[int(rng.integers(len(choices)))]
        tableau = moves.tableaux[k]
        if tableau.S.size == 0 or tableau.P.size == 0:
            continue
        costs = tableau.removal_costs()
        cheap = np.argsort(costs, kind="stable")[: max(1, costs.size // 3)]
        s = int(rng.choice(cheap))
        gains = tableau.return_gains()
        gains = np.where(tableau.group[tableau.P] == tableau.group[tableau.S[s]], gains, -np.inf)
        gains[rng.random(gains.size) > 0.1] = -np.inf
        r = int(np.argmax(gains))
        if costs[s] < 1e299 and gains[r] > -1e299:
            tableau.swap(r, s)
            moves.forget(k)
