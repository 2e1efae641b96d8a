"""Select and update together: swap search on the joint loss itself."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cbs_opt.errors import UsageError
from cbs_opt.instance import Instance
from cbs_opt.losses import joint_loss
from cbs_opt.registry import register
from cbs_opt.result import Status
from cbs_opt.solver import Capabilities, Context, Parameters, Solver, option
from cbs_opt.solvers import backward
from cbs_opt.solvers.joint_bound import improve_bound
from cbs_opt.solvers.joint_large import exchange_in_bulk
from cbs_opt.solvers.joint_moves import JointMoves
from cbs_opt.solvers.tableau import Tableau
from cbs_opt.solvers.warm_up import compiling
from cbs_opt.typing import BoolArray
from cbs_opt.update import best_update

_GAIN = 1e-9  # smallest improvement that counts, relative to the loss
_REFACTOR = 200  # moves between two fresh factorisations


@dataclass(frozen=True)
class JointParameters(Parameters):
    """Tabu search after the descent."""

    tenure: int = option(10, "moves for which a weight that moved may not move again; a few more at random")
    patience: int | None = option(
        None, "moves without improvement after which the search ends; 400 without a limit on time or iterations"
    )
    restart: int = option(60, "moves without improvement after which the search goes back to the best, shaken")
    bound_steps: int = option(200, "steps of the ascent to a lower bound, once a local optimum is found")
    stage: float = option(0.1, "share of a large block's weights that backward elimination removes at once")

    def __post_init__(self) -> None:
        if self.bound_steps < 0:
            raise UsageError(f"`bound_steps` must not be negative, got {self.bound_steps}")
        for name in ("tenure", "patience", "restart"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        backward.BackwardParameters(self.stage)


@register("joint")
class JointSearch(Solver):
    """Minimise the joint loss: backward elimination, best-swap descent, tabu search; an iteration is a move.

    A move returns one pruned weight and removes one kept weight of the same group, in one block or in two, and
    every price is the exact joint loss, with all other weights updated.
    """

    summary = "swap search on the loss after the update: backward elimination, descent, tabu"
    supports = Capabilities(objectives=frozenset({"joint"}), bound=True, warm_start=True)
    parameters_type = JointParameters
    parameters: JointParameters

    def check_supports(self, instance: Instance, context: Context) -> None:
        """Refuse a singular Hessian."""
        super().check_supports(instance, context)
        backward.check_regular(instance)

    def prepare(self, instance: Instance, context: Context) -> None:
        """Compile."""
        with compiling():
            backward.warm_up()
            warm_up()

    def run(self, instance: Instance, context: Context) -> Status:
        """Start, descend, and search until told to stop."""
        monitor = context.monitor
        pruned = context.warm_start
        if pruned is None:
            pruned = backward.eliminate(instance, self.parameters.stage, monitor.should_stop, context.threads)
        monitor.report(joint_loss(instance, pruned), pruned)
        if monitor.should_stop():
            return Status.CONVERGED
        pruned = exchange_in_bulk(instance, pruned, monitor)
        threads = context.threads or os.cpu_count() or 1
        with ThreadPoolExecutor(threads) as pool:
            while not monitor.should_stop():
                # The core of a large block is chosen anew as long as that helps.
                moves = JointMoves(instance, pruned, pool if threads > 1 else None, threads)
                context.extras["blocks_without_swaps"] = len(moves.skipped)
                before = moves.doubled
                pruned = self._search(moves, context)
                context.extras["drift"] = max(context.extras.get("drift", 0.0), moves.drift)
                whole = sum(index.size for index in moves.weights_of) == instance.n
                if whole or not moves.tableaux or joint_loss(instance, pruned) * 2 > before - _GAIN * abs(before):
                    break
        return Status.OPTIMAL if monitor.closed else Status.CONVERGED

    def _bound(self, moves: JointMoves, context: Context) -> None:
        """Spend a sixth of the remaining time, and ten seconds at most, on a lower bound."""
        monitor, pruned = context.monitor, moves.pruned()
        displacement = best_update(moves.instance, pruned) - moves.instance.weights
        seconds = min(10.0, monitor.remaining / 6)
        improve_bound(
            moves.instance, displacement, moves.doubled / 2, monitor, self.parameters.bound_steps, seconds
        )

    def _search(self, moves: JointMoves, context: Context) -> BoolArray:
        """Best-swap descent, then tabu search; returns the best selection."""
        monitor, rng = context.monitor, context.rng()
        patience = self.parameters.patience
        if patience is None and not monitor.stop.limits_work:
            patience = 400
        best, best_doubled = moves.pruned(), moves.doubled
        tabu: deque[tuple[int, int, int]] = deque()  # (free again at move, block, weight), in order
        count = idle = 0
        descending = True
        while not monitor.should_stop():
            move = moves.best_move()
            worth = move is not None and move.change < -_GAIN * abs(moves.doubled)
            if descending and not worth:
                moves.refactor()  # a local optimum is declared on fresh numbers only
                move = moves.best_move()
                descending = move is not None and move.change < -_GAIN * abs(moves.doubled)
                if not descending:
                    self._bound(moves, context)
                    if monitor.closed:
                        break
            if move is None and not tabu:
                break
            count += 1
            monitor.advance()
            if move is not None:
                moved = moves.apply(move)
                if not descending:
                    until = count + self.parameters.tenure + int(rng.integers(5))
                    for block, weight in moved:
                        moves.forbid(block, weight, True)
                        tabu.append((until, block, weight))
            if moves.doubled < best_doubled - _GAIN * abs(best_doubled):
                best, best_doubled, idle = moves.pruned(), moves.doubled, 0
                monitor.report(best_doubled / 2.0, best)
            else:
                idle += 1
            while tabu and (tabu[0][0] <= count or move is None):
                _, block, weight = tabu.popleft()
                moves.forbid(block, weight, False)
            if patience is not None and idle >= patience:
                break
            if count % _REFACTOR == 0:
                moves.refactor()
            if idle and idle % self.parameters.restart == 0:
                while tabu:
                    _, block, weight = tabu.popleft()
                    moves.forbid(block, weight, False)
                moves.go_to(best)
                _shake(moves, rng, 3 + int(rng.integers(8)))
        return best


def _shake(moves: JointMoves, rng: np.random.Generator, swaps: int) -> None:
    """Make random cheap swaps: a kept weight among the cheapest third, the best partner in a random tenth."""
    for _ in range(swaps):
        tableau: Tableau = moves.tableaux[int(rng.integers(len(moves.tableaux)))]
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
    moves.refactor()


def warm_up() -> None:
    """Compile the kernels of the tableau."""
    H = np.diag([1.0, 2.0, 3.0, 4.0])
    kept, free = np.array([True, False, True, False]), np.ones(4, dtype=bool)
    for group in (np.zeros(4, dtype=np.int64), np.array([0, 0, 1, 1])):
        tableau = Tableau(H, np.ones(4), 1.0, kept, group, free)
        r, s, _ = tableau.best_swap()
        tableau.swap(r, s)
