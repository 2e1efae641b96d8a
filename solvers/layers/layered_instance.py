"""Conversion of instances whose blocks share stored Hessians to layers, and of masks to selections."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbs_opt.budget import Budget
from cbs_opt.curvature.base import SharedRows
from cbs_opt.device import Card, Work, choose, is_wanted
from cbs_opt.errors import InstanceError, SolverError
from cbs_opt.instance import Instance
from cbs_opt.losses import selection_loss
from cbs_opt.result import Status
from cbs_opt.solver import Context
from cbs_opt.solvers.kernels import loading
from cbs_opt.solvers.layers.distributed import solve_distributed
from cbs_opt.solvers.layers.problem import Layer, LayerBudget, LayerSolution
from cbs_opt.solvers.layers.solve import TABLEAU_COLUMNS, solve_layers
from cbs_opt.solvers.layers.tiled_budget import TiledBudget, tiled_budget
from cbs_opt.solvers.problem.decided import decide
from cbs_opt.typing import BoolArray, FloatArray, IntArray

logger = logging.getLogger("cbs_opt")

_SHORTEST_ON_CARD = 64  # columns: shorter rows are searched on the CPU before a card has begun


@dataclass(frozen=True, eq=False)
class LayeredInstance:
    """The layers of an instance.

    Attributes
    ----------
    instance : Instance
    objective : str
    layers : list of Layer
    budget : LayerBudget
    index : list of int64 (rows, K)
        The weights of each layer among all n.
    offset : float
        Loss of the instance less that of the layers: −½ gᵀH⁻¹g with a first-order term, for the joint objective.
    """

    instance: Instance
    objective: str
    layers: list[Layer]
    budget: LayerBudget
    index: list[IntArray]
    offset: float

    def card_for(self, context: Context) -> Card | None:
        """The card on which the layers are searched, if any; the log says why not."""
        if not is_wanted(context.device, self.instance.n):
            return None
        if self.instance.budget.cross_groups is not None:
            say = logger.warning if context.device == "cuda" else logger.info
            say("layers with cross groups, as of transposable N:M patterns: on the CPU")
            return None
        rows, columns = (max(getattr(layer, name) for layer in self.layers) for name in ("rows", "columns"))
        many = "1 layer" if len(self.layers) == 1 else f"{len(self.layers)} layers"
        what = f"{many} of up to {rows} × {columns} weights"
        if self.objective != "joint" or columns < _SHORTEST_ON_CARD:
            reason = "the selection objective" if self.objective != "joint" else "rows this short"
            say = logger.warning if context.device == "cuda" else logger.info
            say(f"{what}: on the CPU, which searches {reason} on its own tables")
            return None
        from cbs_opt.solvers.layers.device_wide import cost_on_cpu, memory_of

        memory = memory_of(self.layers)
        work = Work(
            what=what, flops32=cost_on_cpu(self.layers), moved=200.0 * memory, upload=0.5 * memory, launches=1e4,
            memory=memory,
        )  # fmt: skip
        return choose(context.device, work, context.workers)

    def expand(self, masks: list[BoolArray]) -> BoolArray:
        """The selection, bool (n,), of masks of the layers."""
        pruned = np.zeros(self.instance.n, dtype=bool)
        for at, mask in zip(self.index, masks, strict=True):
            pruned[at] = mask
        return pruned

    def _spread(self, weights: list[FloatArray]) -> NDArray[Any]:
        """Weights of the layers as one array, float32 (n,)."""
        out = np.zeros(self.instance.n, dtype=np.float32)
        for at, W in zip(self.index, weights, strict=True):
            out[at] = W
        return out

    def restrict(self, pruned: BoolArray) -> list[BoolArray]:
        """Masks of the layers of a selection, bool (n,)."""
        return [pruned[at] for at in self.index]

    def run(self, context: Context, bound_share: float) -> Status:
        """Solve, reporting to the monitor of `context`; an iteration is a better selection found.

        Parameters
        ----------
        context : Context
        bound_share : float
            Share of the time limit for lower bounds; 0 for none.
        """
        monitor = context.monitor

        def report(objective: float, masks: list[BoolArray]) -> None:
            monitor.advance()
            if self.objective == "joint" and monitor.objective is None:  # as long as the evaluation will take
                monitor.keep_back(monitor.elapsed - began)
            monitor.report(self.offset + objective, self.expand(masks), exact=False)

        def report_bound(bound: float) -> None:
            monitor.report_bound(self.offset + bound - 1e-13 * abs(self.offset))

        report_bound(0.0)
        began = monitor.elapsed
        options: dict[str, Any] = {
            "objective": self.objective,
            "report": report,
            "report_bound": report_bound,
            "should_stop": monitor.should_stop,
            "seed": context.seed,
            "bound_share": bound_share,
            "max_rounds": monitor.stop.max_iterations,
        }
        card = None if context.engine is not None else self.card_for(context)
        unit, known = f"layers_{self.objective}", context.warm_start
        if self._needs_kernels and not loading.is_loaded(unit):
            known = self._while_compiling(unit, context, options)
            if not loading.wait(unit, should_stop=monitor.should_stop):
                return Status.CONVERGED
        if monitor.remaining <= 0:
            return Status.CONVERGED
        began = monitor.elapsed
        options["warm_start"] = None if known is None else self.restrict(known)
        options["time_limit"] = monitor.remaining if np.isfinite(monitor.remaining) else None
        if context.engine is None:
            solution = solve_layers(
                self.layers, self.budget, threads=context.workers, refit=False, card=card,
                keep_back=monitor.keep_back, **options,
            )  # fmt: skip
        else:
            solution = solve_distributed(
                self.layers,
                self.budget,
                context.engine,
                threads=context.threads or 1,
                **options,
            )
        context.extras["device"] = solution.device
        self._hand_over(solution, context)
        monitor.should_stop()  # the rows keep the limit by themselves: let the monitor note which rule ended them
        return Status.OPTIMAL if monitor.closed else Status.CONVERGED

    @property
    def _needs_kernels(self) -> bool:
        """Whether the search uses compiled kernels; that of long rows does not."""
        return self.objective == "selection" or max(la.columns for la in self.layers) <= TABLEAU_COLUMNS

    def _while_compiling(self, unit: str, context: Context, options: dict[str, Any]) -> BoolArray | None:
        """What can be found without kernels until they are compiled; the warm start of what follows.

        Within a time limit and for the joint objective: the search for long rows. Else only a first selection, so
        that a run without a time limit does not depend on how long the compilation takes.
        """
        monitor, first = context.monitor, context.warm_start
        if first is None:
            first = self.instance.budget.cheapest(np.abs(self.instance.weights), self.instance.fixed)
        monitor.report(selection_loss(self.instance, first), first, exact=False)
        limited = np.isfinite(monitor.remaining) and not monitor.stop.limits_iterations
        if self.objective == "selection" or not limited or context.engine is not None:
            return context.warm_start
        solution = solve_layers(
            self.layers,
            self.budget,
            threads=context.workers,
            refit=False,
            wide=True,
            warm_start=self.restrict(first),
            time_limit=monitor.remaining,
            **{**options, "should_stop": lambda: loading.is_loaded(unit) or monitor.should_stop()},
        )
        self._hand_over(solution, context)
        return self.expand(solution.pruned)

    def _hand_over(self, solution: LayerSolution, context: Context) -> None:
        """Weights for the evaluator, and which selections the incumbent is known to be no worse than."""
        monitor = context.monitor
        if solution.near and self.objective == "joint":
            pruned = self.expand(solution.pruned)
            if monitor.pruned is not None and np.array_equal(monitor.pruned, pruned):  # else of another incumbent
                monitor.weights = self._spread(solution.weights)
        if solution.compared:
            for known in self._known(context):
                monitor.note(known)

    def _known(self, context: Context) -> list[BoolArray]:
        """The selections that `solve_layers` starts from: magnitude, and the warm start."""
        weights = [np.abs(layer.weights) for layer in self.layers]
        masks = self.expand(self.budget.cheapest(self.layers, weights))
        return [masks] if context.warm_start is None else [masks, context.warm_start]


def check_engine(context: Context, layered: LayeredInstance | None) -> None:
    """Refuse an engine where there are no layers to give to its workers; raises `SolverError`."""
    if context.engine is not None and layered is not None and isinstance(layered.budget, TiledBudget):
        raise SolverError(
            "an engine divides layers with one partition of the weights into groups: this instance has cross "
            "groups, as of a transposable N:M pattern; leave the engine out"
        )
    if context.engine is not None and layered is None:
        raise SolverError(
            "an engine divides an instance by layers whose rows share a Hessian, with one budget, a budget for "
            "each row, or N:M: this instance has no such form; leave the engine out"
        )


def layered_instance(instance: Instance, objective: str) -> LayeredInstance | None:
    """The layers of an instance whose blocks share stored Hessians, or None where it has no such form.

    The budget must be one number, one for each row, or N:M along the rows, or, for the joint objective, have cross
    groups that tie rows together; a first-order term is possible for the joint objective only, where it moves the
    point from which the weights are measured. O(Σ K³) with such a term.
    """
    crossed = instance.budget.cross_groups is not None
    shared = instance.curvature.shared_rows()
    if shared is None or (objective == "selection" and (instance.linear is not None or crossed)):
        return None
    index = [rows.index for rows in shared]
    budget = _budget(instance.budget, index)
    if crossed:
        budget = tiled_budget(instance.budget, budget, index)
    if budget is None:
        return None
    fixed, _, _ = decide(instance)
    layers, offset = [], 0.0
    for rows in shared:
        weights = instance.weights[rows.index]
        if instance.linear is not None:
            move = _newton_step(rows, instance.linear[rows.index])
            weights = weights - move
            offset -= 0.5 * float((instance.linear[rows.index] * move).sum())
        locked = fixed[rows.index]
        layers.append(Layer(weights, rows.hessian, rows.scale, locked if locked.any() else None))
    return LayeredInstance(instance, objective, layers, budget, [rows.index for rows in shared], offset)


def _newton_step(rows: SharedRows, g: FloatArray) -> FloatArray:
    """H⁻¹g of each row, float64 (rows, K)."""
    from scipy.linalg import cho_factor, cho_solve

    try:
        factor = cho_factor(rows.hessian)
    except np.linalg.LinAlgError:
        raise InstanceError(
            "a stored Hessian is singular, so that the first-order term has no best update: a positive damping is "
            "needed"
        ) from None
    return np.asarray(cho_solve(factor, g.T).T / rows.scale[:, None])


def _budget(budget: Budget, index: list[IntArray]) -> LayerBudget | None:
    """The budget of an instance for layers with these weights, or None where it has another form."""
    if budget.groups is None or budget.group_budgets is None:
        return LayerBudget(total=budget.total)
    columns = {at.shape[1] for at in index}
    if budget.cell is not None and all(width % budget.cell[1] == 0 for width in columns):  # in order: no search
        n, m = budget.cell
        if columns != {m}:
            return LayerBudget(pattern=(n, m))
        return LayerBudget(per_row=tuple(np.full(at.shape[0], n) for at in index))
    groups, counts = np.asarray(budget.groups), np.asarray(budget.group_budgets)
    sizes = np.bincount(groups, minlength=counts.size)
    of_rows = [groups[at] for at in index]
    heads = np.concatenate([of[:, 0] for of in of_rows])
    if all((of == of[:, :1]).all() for of in of_rows) and np.unique(heads).size == heads.size:
        return LayerBudget(per_row=tuple(counts[of[:, 0]] for of in of_rows))
    m, n = int(sizes[groups[0]]), int(counts[groups[0]])
    used = sizes > 0
    if (sizes[used] != m).any() or (counts[used] != n).any():
        return None
    for of in of_rows:
        if of.shape[1] % m or (of.reshape(of.shape[0], -1, m) != of[:, ::m, None]).any():
            return None
    return LayerBudget(pattern=(n, m))
