"""The relaxation of the selection problem on a card: accelerated projected gradients, scaled by the diagonal.

Room: selection; the solver `relax` uses it where a card was chosen, and the search on large problems. Where Q is
badly conditioned the working sets of the CPU need less time: the search takes that of smaller problems from there.
"""

from __future__ import annotations

import copy
import logging
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
    """min ½ xᵀQx + cᵀx + t/2 Σ d_i x_i (1 − x_i), 0 ≤ x ≤ 1, with given group sums, from one or many points.

    d_i is Q_ii, or weights of each point's own (`scattered`); products of many points are products of matrices.
    Steps of FISTA (Beck, Teboulle 2009) with restarts where the objective rises, in the metric D = L diag(Q) with
    D ⪰ Q, so that badly scaled variables move as fast as others. The concave term only lowers the curvature. Its
    answer is a point; the bound is computed from it elsewhere, in float64.

    Parameters
    ----------
    problem : SelectionProblem
    there : DeviceColumns

    Attributes
    ----------
    x : float64 (R, r)
        R points, on the card; one at first.
    concave : float64 (R, r)
        d.
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
        self.x = there.tensor(problem.cheapest())[None]
        self.concave = there.diagonal[None]
        self.weight: float | None = None  # t of the momentum
        self.momentum: tuple[torch.Tensor, torch.Tensor] = (self.x, torch.ones_like(self.x[:, :1]))
        self.iterations = 0
        self.price = torch.zeros(1, self.groups, dtype=torch.float64, device=there.device)
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

    def scattered(self, points: int, noise: float, generator: torch.Generator) -> DeviceRelaxation:
        """The same from `points` copies of the first point, whose concave weights have log-normal noise.

        The first copy has none, the last one noise of this spread.
        """
        other = copy.copy(self)
        other.x, other.price = self.x[:1].repeat(points, 1), self.price[:1].repeat(points, 1)
        random = torch.randn(other.x.shape, generator=generator, dtype=torch.float64, device=other.x.device)
        random *= torch.linspace(0.0, noise, points, dtype=torch.float64, device=other.x.device)[:, None]
        other.concave, other.weight, other.iterations = self.there.diagonal * torch.exp(random), None, 0
        return other

    def value(self) -> float:
        """The relaxed objective at the first point, in the units of presolve."""
        x = self.x[0]
        return float(0.5 * x @ self.there.product(x) + self.linear @ x)

    def numpy(self) -> FloatArray:
        """The first point, float64 (r,), in the memory of the computer."""
        return np.array(self.x[0].cpu().numpy())

    def run(self, t: float, iterations: int, tolerance: float, should_stop: Callable[[], bool]) -> int:
        """At most so many steps; fewer where `_CHECK` steps gain less than `tolerance` of every objective.

        Raises
        ------
        DeviceError
            When the objective is not a number.
        """
        if self.problem.n == 0:
            return 0
        x = self.x
        z, theta = self.momentum if self.weight == t else (x, torch.ones_like(x[:, :1]))
        self.weight = t
        product_x = self.there.product(x)
        product_z = product_x if z is x else self.there.product(z)
        last = self._objective(x, product_x, t)
        for made in range(1, iterations + 1):
            slope = product_z + self.linear + t * self.concave * (0.5 - z)
            new = self.project(z - slope / self.metric)
            product_new = self.there.product(new)
            following = 0.5 * (1.0 + (1.0 + 4.0 * theta * theta).sqrt())
            push = (theta - 1.0) / following
            z = new + push * (new - x)
            product_z = product_new + push * (product_new - product_x)
            x, product_x, theta = new, product_new, following
            self.iterations += 1
            if made % _CHECK == 0 or made == iterations:
                value = self._objective(x, product_x, t)
                if not np.isfinite(value).all():
                    raise DeviceError("the relaxed objective is not a number")
                if (value > last).any():  # momentum carried too far: begin again from here
                    worse = torch.tensor(value > last, device=x.device)[:, None]
                    z, product_z = torch.where(worse, x, z), torch.where(worse, product_x, product_z)
                    theta = torch.where(worse, 1.0, theta)
                self.x, self.momentum = x, (z, theta)
                if should_stop():
                    return made
                gain, enough = last - value, tolerance * np.maximum(np.abs(value), 1e-300)
                if ((gain >= 0) & (gain <= enough)).all():
                    return made
                last = value
        return iterations

    def _objective(self, x: torch.Tensor, product: torch.Tensor, t: float) -> FloatArray:
        """Of every point, float64 (R,)."""
        value = (x * (0.5 * product + self.linear + 0.5 * t * self.concave * (1.0 - x))).sum(1)
        return np.array(value.cpu().numpy())

    def project(self, z: torch.Tensor) -> torch.Tensor:
        """The nearest points in the metric D with the right group sums: clip(z + μ / D), one μ for each group.

        μ is cut out of a bracket by many prices at once, first by steps of 10 around the last one; between two of
        them the sum is nearly linear, and a last interpolation leaves little.
        """
        low = self._bracket(-z * self.metric, "amin")
        high = self._bracket((1.0 - z) * self.metric, "amax")
        share = torch.linspace(0.0, 1.0, _PRICES, dtype=torch.float64, device=z.device)
        powers = 0.1 ** torch.arange(_PRICES // 2 - 1, dtype=torch.float64, device=z.device)
        under = over = self.budget.expand(z.shape[0], -1)
        for cut in range(1 + _CUTS):
            price = low[..., None] + (high - low)[..., None] * share  # (R, G, prices)
            if cut == 0:
                around = (high - low)[..., None] * powers
                last = self.price[..., None]
                ends = (low[..., None], last - around, last + around.flip(2), high[..., None])
                price = torch.minimum(torch.maximum(torch.cat(ends, 2), low[..., None]), high[..., None])
            sums = self._sums(z, price)
            above = (sums < self.budget[:, None]).sum(2, keepdim=True).clamp(1, _PRICES - 1)
            low, high = (price.gather(2, at)[..., 0] for at in (above - 1, above))
            under, over = (sums.gather(2, at)[..., 0] for at in (above - 1, above))
        part = ((self.budget - under) / (over - under).clamp_min(1e-300)).clamp(0.0, 1.0)
        self.price = price = low + part * (high - low)
        return (z + price[:, self.group] / self.metric).clamp(0.0, 1.0)

    def _bracket(self, values: torch.Tensor, reduction: str) -> torch.Tensor:
        """The least or largest value of every group, float64 (R, G); 0 for an empty one."""
        if self.groups == 1:
            return values.amin(1, keepdim=True) if reduction == "amin" else values.amax(1, keepdim=True)
        out = torch.zeros(values.shape[0], self.groups, dtype=torch.float64, device=values.device)
        return out.scatter_reduce(1, self.group.expand(values.shape), values, reduction, include_self=False)

    def _sums(self, z: torch.Tensor, price: torch.Tensor) -> torch.Tensor:
        """Group sums at prices (R, G, k): float64 (R, G, k)."""
        moved = (z[..., None] + price[:, self.group] / self.metric[:, None]).clamp(0.0, 1.0)
        return moved.sum(1, keepdim=True) if self.groups == 1 else self.member @ moved


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
