"""The relaxation of the selection problem on a card: accelerated projected gradients, scaled by the diagonal.

Room: selection; the solver `relax` uses it where a card was chosen, and the search on large problems. Where Q is
badly conditioned the working sets of the CPU need less time: the search takes that of smaller problems from there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import numpy as np
import torch

from cbs_opt.device import Card, DeviceError, Work, choose
from cbs_opt.result import Status
from cbs_opt.solver import Context
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.selection.device_columns import DeviceColumns, DeviceIncumbent, columns_bytes
from cbs_opt.solvers.selection.incumbent import candidate_swaps
from cbs_opt.typing import FloatArray

logger = logging.getLogger("cbs_opt")

MOST_GROUPS = 64
"""Groups up to which this is offered: a projection costs a product of groups and variables."""

_POWER_STEPS = 20
_SAFETY = 1.05
_PRICES = 16  # tried at once in a projection
_CUTS = 7  # rounds of that, after one around the last price
_FLOOR = 1e-9  # of the largest Q_ii: no metric below it
_AT_A_TIME = 200  # iterations between two bounds of the solver `relax`
_EXPECTED = 5000.0  # iterations in all, for the cost model
_CHECK = 10  # iterations between two looks at the progress and the clock


class DeviceRelaxation:
    """min ½ xᵀQx + cᵀx + t/2 Σ Q_ii x_i (1 − x_i), 0 ≤ x ≤ 1, with given group sums.

    Steps of FISTA (Beck, Teboulle 2009) with restarts where the objective rises, in the metric D = L diag(Q) with
    D ⪰ Q, so that badly scaled variables move as fast as others. The concave term only lowers the curvature. Its
    answer is a point; the bound is computed from it elsewhere, in float64.

    Parameters
    ----------
    problem : SelectionProblem
    there : DeviceColumns

    Attributes
    ----------
    x : float64 (r,)
        On the card.
    iterations : int
    """

    def __init__(self, problem: SelectionProblem, there: DeviceColumns) -> None:
        self.problem, self.there = problem, there
        self.linear = there.tensor(problem.linear)
        self.budget = there.tensor(problem.budget.astype(np.float64))
        groups = int(problem.budget.size)
        if groups > 1:
            self.member = torch.zeros(groups, problem.n, dtype=torch.float64, device=there.device)
            self.member[there.tensor(problem.group), torch.arange(problem.n, device=there.device)] = 1.0
        self.group = there.tensor(problem.group)
        self.groups = groups
        self.x = there.tensor(problem.cheapest())
        self.momentum, self.weight = (self.x, 1.0), 0.0
        self.iterations = 0
        self.price = torch.zeros(self.groups, dtype=torch.float64, device=there.device)
        # Uncoupled variables have a linear cost only: any small curvature lets them go to the right bound.
        diagonal = there.diagonal
        floor = max(_FLOOR * float(diagonal.max()) if problem.n else 0.0, 1e-300)
        self.metric = diagonal.clamp_min(floor)
        self.metric = self.metric * self._largest_eigenvalue()

    def _largest_eigenvalue(self) -> float:
        """Of D^{-1/2} Q D^{-1/2}, by power steps and a margin."""
        if self.problem.n == 0:
            return 1.0
        root = self.metric.rsqrt()
        generator = torch.Generator().manual_seed(0)
        v = torch.rand(self.problem.n, generator=generator, dtype=torch.float64).to(self.x.device) + 0.1
        value = 1.0
        for _ in range(_POWER_STEPS):
            v = v / v.norm()
            v = root * self.there.product(root * v)
            value = float(v.norm())
            if value == 0.0:
                return 1.0
        return max(_SAFETY * value, 1.0)

    def value(self) -> float:
        """The relaxed objective at x, in the units of presolve."""
        return float(0.5 * self.x @ self.there.product(self.x) + self.linear @ self.x)

    def numpy(self) -> FloatArray:
        """X, float64 (r,), in the memory of the computer."""
        return np.array(self.x.cpu().numpy())

    def run(self, t: float, iterations: int, tolerance: float, should_stop: Callable[[], bool]) -> int:
        """At most so many steps; fewer where `_CHECK` steps gain less than `tolerance` of the objective.

        Raises
        ------
        DeviceError
            When the objective is not a number.
        """
        if self.problem.n == 0:
            return 0
        x, (z, theta) = self.x, self.momentum if self.weight == t else (self.x, 1.0)
        self.weight = t
        product_x = self.there.product(x)
        product_z = product_x if z is x else self.there.product(z)
        diagonal = self.there.diagonal
        last = self._objective(x, product_x, t)
        for made in range(1, iterations + 1):
            slope = product_z + self.linear + t * diagonal * (0.5 - z)
            new = self.project(z - slope / self.metric)
            product_new = self.there.product(new)
            following = 0.5 * (1.0 + math.sqrt(1.0 + 4.0 * theta * theta))
            push = (theta - 1.0) / following
            z = new + push * (new - x)
            product_z = product_new + push * (product_new - product_x)
            x, product_x, theta = new, product_new, following
            self.iterations += 1
            if made % _CHECK == 0 or made == iterations:
                value = self._objective(x, product_x, t)
                if not math.isfinite(value):
                    raise DeviceError("the relaxed objective is not a number")
                if value > last:  # momentum carried too far: begin again from here
                    z, product_z, theta = x, product_x, 1.0
                self.x, self.momentum = x, (z, theta)
                if should_stop():
                    return made
                if 0 <= last - value <= tolerance * max(abs(value), 1e-300):
                    return made
                last = value
        return iterations

    def _objective(self, x: torch.Tensor, product: torch.Tensor, t: float) -> float:
        concave = 0.5 * t * (self.there.diagonal * x * (1.0 - x)).sum()
        return float(0.5 * x @ product + self.linear @ x + concave)

    def project(self, z: torch.Tensor) -> torch.Tensor:
        """The nearest point in the metric D with the right group sums: clip(z + μ / D), one μ for each group.

        μ is cut out of a bracket by many prices at once, first by steps of 10 around the last one; between two of
        them the sum is nearly linear, and a last interpolation leaves little.
        """
        low = self._bracket(-z * self.metric, "amin")
        high = self._bracket((1.0 - z) * self.metric, "amax")
        share = torch.linspace(0.0, 1.0, _PRICES, dtype=torch.float64, device=z.device)
        powers = 0.1 ** torch.arange(_PRICES // 2 - 1, dtype=torch.float64, device=z.device)
        rows = torch.arange(self.groups, device=z.device)
        under = over = self.budget
        for cut in range(1 + _CUTS):
            price = low[:, None] + (high - low)[:, None] * share  # (G, prices)
            if cut == 0:
                around = (high - low)[:, None] * powers
                last = self.price[:, None]
                ends = (low[:, None], last - around, last + around.flip(1), high[:, None])
                price = torch.minimum(torch.maximum(torch.cat(ends, 1), low[:, None]), high[:, None])
            sums = self._sums(z, price)
            below = (sums < self.budget[:, None]).sum(1).clamp(1, _PRICES - 1)
            low, high = price[rows, below - 1], price[rows, below]
            under, over = sums[rows, below - 1], sums[rows, below]
        part = ((self.budget - under) / (over - under).clamp_min(1e-300)).clamp(0.0, 1.0)
        self.price = price = low + part * (high - low)
        return (z + price[self.group] / self.metric).clamp(0.0, 1.0)

    def _bracket(self, values: torch.Tensor, reduction: str) -> torch.Tensor:
        """The least or largest value of every group, float64 (G,); 0 for an empty one."""
        if self.groups == 1:
            return (values.amin() if reduction == "amin" else values.amax()).view(1)
        out = torch.zeros(self.groups, dtype=torch.float64, device=values.device)
        return out.scatter_reduce(0, self.group, values, reduction, include_self=False)

    def _sums(self, z: torch.Tensor, price: torch.Tensor) -> torch.Tensor:
        """Group sums at prices (G, k): float64 (G, k)."""
        moved = (z[:, None] + price[self.group] / self.metric[:, None]).clamp(0.0, 1.0)
        return moved.sum(0, keepdim=True) if self.groups == 1 else self.member @ moved


def card_for(problem: SelectionProblem, context: Context) -> Card | None:
    """The card on which the relaxation is solved, if any; the log says why not."""
    size = columns_bytes(problem.columns)
    work = Work(
        what=f"the relaxation of {problem.n} weights",
        moved=2.0 * size * _EXPECTED,
        upload=size,
        launches=60.0 * _EXPECTED,
        memory=size + 600.0 * problem.n,
        cpu_seconds=size * 100.0 / 1e10,  # working sets touch few columns
    )
    if problem.budget.size > MOST_GROUPS:
        logger.info(f"{work.what}: on the CPU, as a card takes at most {MOST_GROUPS} groups")
        return None
    return choose(context.device, work, context.workers)


def relax_on(card: Card, problem: SelectionProblem, context: Context, tolerance: float) -> Status:
    """The solver `relax` on a card: bounds and roundings every few hundred iterations."""
    monitor = context.monitor
    there = DeviceColumns(problem.columns, card)
    relaxed = DeviceRelaxation(problem, there)
    context.extras["device"] = card.name
    point = DeviceIncumbent(problem, problem.cheapest(), there)
    monitor.report(point.loss(), problem.expand(point.y))
    while not monitor.should_stop():
        made = relaxed.run(0.0, _AT_A_TIME, 0.01 * tolerance, monitor.should_stop)
        monitor.advance(made)
        x = relaxed.numpy()
        monitor.report_bound(problem.certified_bound(x))
        point = DeviceIncumbent(problem, problem.smallest(-x), there)
        monitor.report(point.loss(), problem.expand(point.y))
        if made < _AT_A_TIME:
            break
    x = relaxed.numpy()
    context.extras["rounding"] = point.loss()
    candidate_swaps(point, monitor.should_stop)
    monitor.report(point.loss(), problem.expand(point.y))
    context.extras["fractional"] = int(np.count_nonzero((x > 1e-6) & (x < 1 - 1e-6)))
    context.extras["relaxed_objective"] = problem.from_units(relaxed.value())
    context.extras["steps"] = relaxed.iterations
    return Status.OPTIMAL if monitor.closed else Status.CONVERGED
