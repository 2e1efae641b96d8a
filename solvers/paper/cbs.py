"""The method of the paper: randomized magnitude pruning, then swap local search from the best draws."""

from __future__ import annotations

from dataclasses import dataclass

from cbs_opt.errors import UsageError
from cbs_opt.instance import Instance
from cbs_opt.registry import register
from cbs_opt.result import Status
from cbs_opt.solver import Capabilities, Context, Parameters, Solver, option
from cbs_opt.solvers.paper.all_swaps import GAIN, improve_by_all_pairs
from cbs_opt.solvers.paper.batch_evaluator import BatchEvaluator
from cbs_opt.solvers.paper.ls import LocalSearch, LocalSearchParameters
from cbs_opt.solvers.paper.rmp import Draws, RmpParameters, evaluate_draws


@dataclass(frozen=True)
class CbsParameters(Parameters):
    """The parameters of both algorithms; ε is relative unless `epsilon` is set."""

    draws: int = option(50, "selections drawn by RMP")
    buckets: int | None = option(None, "buckets per draw; as for rmp when not set")
    starts: int = option(3, "best draws that the local search starts from")
    epsilon: float | None = option(None, "smallest gain of a swap, absolute, on the doubled objective")
    epsilon_relative: float | None = option(
        None, "smallest gain relative to the doubled objective; 1e-6 when neither is set"
    )
    rho: int = option(10, "half width of the window of partners")
    tau: int = option(20, "failures after which a step ends")
    steps: int = option(50, "steps of each local search at most")

    def __post_init__(self) -> None:
        if self.starts < 1:
            raise UsageError(f"`starts` must be at least 1, got {self.starts}")
        self.rmp()
        self.local_search()

    def rmp(self) -> RmpParameters:
        """The parameters of RMP."""
        return RmpParameters(self.draws, self.buckets)

    def local_search(self) -> LocalSearchParameters:
        """The parameters of the local search."""
        relative = self.epsilon_relative
        if relative is None and self.epsilon is None:
            relative = 1e-6
        return LocalSearchParameters(self.epsilon, relative, self.rho, self.tau, self.steps)


@register("cbs")
class CombinatorialBrainSurgeon(Solver):
    """CBS-S of the paper: RMP, then local search from its best draws, and from a warm start where there is one.

    Where no ε is given, swaps over all pairs follow, so that none improves the result. CBS-U, the update of the
    kept weights, follows in `cbs_opt.solve` if it is requested. An iteration is a draw or a step of the local
    search.
    """

    summary = "the paper's method: RMP, local search from the best draws; CBS-U with --update"
    supports = Capabilities(batched=True, warm_start=True, not_worse_than_magnitude=True)
    parameters_type = CbsParameters
    parameters: CbsParameters

    def prepare(self, instance: Instance, context: Context) -> None:
        """Transfer the curvature to the device."""
        self._evaluator = BatchEvaluator(instance, context, self.parameters.draws)
        self._search = LocalSearch(instance, self.parameters.local_search())
        self._on_card = None
        if self._evaluator.on_card is not None:
            from cbs_opt.solvers.paper.on_card import local_search

            self._on_card = local_search(self._search, context, self.parameters.starts, self._evaluator.on_card)

    def run(self, instance: Instance, context: Context) -> Status:
        """Draw, then search from the best draws."""
        if context.warm_start is not None:  # known before any limit can end the run
            context.monitor.report(self._evaluator.problem.value(context.warm_start), context.warm_start)
        draws = Draws(instance, self.parameters.rmp())
        selections, _ = evaluate_draws(draws, self._evaluator, context, self.parameters.starts)
        starts = list(selections)
        if context.warm_start is not None:
            starts.insert(0, context.warm_start)
        swaps = 0
        if self._on_card is not None and not context.monitor.should_stop():
            from cbs_opt.solvers.paper.on_card import walk_all

            swaps, starts = walk_all(self._search, self._on_card, starts, context), []
        for start in starts:
            if context.monitor.should_stop():
                break
            swaps += self._search.walk(start, context)
        monitor, given = context.monitor, self.parameters
        if given.epsilon is None and given.epsilon_relative is None and monitor.pruned is not None:
            made = None
            if self._on_card is not None:
                from cbs_opt.solvers.paper.on_card import improve_by_all_pairs_on

                made = improve_by_all_pairs_on(self._on_card, monitor.pruned, GAIN, context)
            if made is None:
                made = improve_by_all_pairs(self._search, monitor.pruned, monitor)
            swaps += made
        context.extras["swaps"] = swaps
        return Status.CONVERGED
