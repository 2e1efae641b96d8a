"""External samplers on the selection problem: tabu search and simulated annealing of dwave-samplers on a QUBO.

The budget becomes a penalty, E(y) = ½yᵀQy + cᵀy + A(Σy − p)², and a sample is repaired to the budget by greedy
drops or additions. Both samplers see Q divided by the mean price of a pruned weight in the magnitude selection, so
that A, the temperatures and the rounding inside do not depend on the scale of the weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from cbs_opt import Instance
from cbs_opt.bench.anytime import Anytime
from cbs_opt.errors import CbsError
from cbs_opt.selection import SelectionObjective
from cbs_opt.typing import BoolArray, FloatArray

PEERS = {"dwave-tabu": "tabu", "dwave-annealing": "annealing"}
"""Names of the samplers in tables and pictures."""

MOST_WEIGHTS = 5000
"""Instances up to this size are handed to the samplers, with all n² terms."""

PENALTY = 3.0
"""A, in units of the mean price of a pruned weight; of 0.1, 0.3, 1, 3, 10, 30 the best on the digits MLP at .9."""

HOTTEST, COLDEST = 0.1, 1e-4
"""Temperatures of the annealing, in the same units; a geometric schedule."""

_FIRST_SWEEPS = 16
_MOST_GROWTH = 16.0


class MissingPeerError(CbsError):
    """A peer that is not installed, or that cannot take the instance."""


class Samplers:
    """The binary quadratic model of an instance, ready for the samplers of dwave-samplers.

    Parameters
    ----------
    instance : Instance
        One budget, nothing fixed, at most `MOST_WEIGHTS` weights.
    """

    def __init__(self, instance: Instance) -> None:
        if instance.n > MOST_WEIGHTS:
            raise MissingPeerError(f"dwave-samplers: {instance.n} weights, the dense QUBO takes {MOST_WEIGHTS}")
        if instance.budget.groups is not None or instance.fixed is not None:
            raise MissingPeerError(
                "dwave-samplers: the penalty stands for one budget, without `groups` or `fixed`"
            )
        try:
            import dimod
            from dwave.samplers import SimulatedAnnealingSampler, TabuSampler
        except ModuleNotFoundError:
            raise MissingPeerError(
                'dwave-samplers is not installed, its rows are skipped: pip install "cbs-opt[peers]"'
            ) from None
        problem = SelectionObjective(instance)
        n, p = instance.n, instance.budget.total
        Q = np.zeros((n, n))
        for k in range(instance.curvature.number_of_blocks):
            part = instance.curvature.block_slice(k)
            Q[part, part] = problem.block(k)
        magnitude = instance.budget.cheapest(np.abs(instance.weights))
        unit = abs(problem.value(magnitude)) / max(p, 1)
        self.Q, self.c, self.p = Q / (unit or 1.0), problem.c / (unit or 1.0), p
        penalised = np.triu(self.Q + 2.0 * PENALTY, 1)
        linear = 0.5 * self.Q.diagonal() + self.c + PENALTY * (1.0 - 2.0 * p)
        rows, columns = np.nonzero(penalised)
        self.model = dimod.BinaryQuadraticModel.from_numpy_vectors(
            linear, (rows, columns, penalised[rows, columns]), PENALTY * float(p) ** 2, dimod.BINARY
        )
        self._annealing, self._tabu = SimulatedAnnealingSampler(), TabuSampler()
        self._start = magnitude.astype(np.int8)

    def tabu(self, seconds: float, seed: int) -> BoolArray:
        """The repaired result of tabu search from the magnitude selection, for so many seconds; bool (n,)."""
        found = self._tabu.sample(
            self.model,
            initial_states=dict(enumerate(self._start.tolist())),
            timeout=round(1000 * seconds),
            seed=seed,
        )
        return self.repair(_first_sample(found))

    def annealing(self, sweeps: int, seed: int) -> tuple[BoolArray, float]:
        """The repaired result of one annealing, bool (n,), and processor seconds, conversions included."""
        started = time.process_time()
        found = self._anneal(sweeps, seed)
        seconds = time.process_time() - started
        return self.repair(_first_sample(found)), seconds

    def _anneal(self, sweeps: int, seed: int) -> Any:
        return self._annealing.sample(
            self.model,
            num_sweeps=sweeps,
            beta_range=(1.0 / HOTTEST, 1.0 / COLDEST),
            beta_schedule_type="geometric",
            initial_states=dict(enumerate(self._start.tolist())),
            num_reads=1,
            seed=seed,
        )

    def repair(self, y: BoolArray) -> BoolArray:
        """Drop or add, one at a time, the weight that makes the objective least, until the budget is met."""
        y = y.copy()
        h: FloatArray = self.Q @ y + self.c
        half = 0.5 * self.Q.diagonal()
        while (count := int(y.sum())) != self.p:
            drop = count > self.p
            price = np.where(y, half - h, np.inf) if drop else np.where(y, np.inf, half + h)
            i = int(np.argmin(price))
            y[i] = not drop
            h += -self.Q[i] if drop else self.Q[i]
        return y


def _first_sample(found: Any) -> BoolArray:
    first = found.first.sample
    return np.array([first[i] for i in range(len(first))], dtype=bool)


def run_sampler(samplers: Samplers, name: str, times: Sequence[float], seed: int) -> Anytime:
    """What a sampler has at each of the times, had it been asked for that time alone; the best so far stays.

    Tabu search runs once for each time. Annealings run with more and more sweeps, the last so that it fills the
    longest time; each counts by the processor seconds that it took more than one of a single sweep, which leaves
    the conversions of the model out. Making the model and the repair are not counted.

    Parameters
    ----------
    samplers : Samplers
    name : {"tabu", "annealing"}
    times : sequence of float
        Seconds; the samplers have no incumbent before their end.
    seed : int
    """
    taken, longest = Anytime(), max(times)
    best = np.inf

    def offer(seconds: float, pruned: BoolArray) -> None:
        nonlocal best
        y = pruned.astype(np.float64)
        value = float(0.5 * y @ samplers.Q @ y + samplers.c @ y)
        if value < best:
            best = value
            taken.seconds.append(seconds)
            taken.selections.append(pruned)
            taken.bounds.append(None)

    def offer_again(seconds: float) -> None:
        taken.seconds.append(min(seconds, longest) if seconds < 1.1 * longest else seconds)
        taken.selections.append(taken.selections[-1])
        taken.bounds.append(None)

    if name == "tabu":
        for limit in sorted(times):
            offer(limit, samplers.tabu(limit, seed))
        return taken
    _, setup = samplers.annealing(1, seed)
    sweeps, seconds = _FIRST_SWEEPS, 0.0
    while True:
        pruned, spent = samplers.annealing(sweeps, seed)
        seconds = max(spent - setup, 1e-3)
        # Within a tenth of the limit counts as within it: sweeps cannot be stopped by the clock.
        offer(min(seconds, longest) if seconds < 1.1 * longest else seconds, pruned)
        if seconds > 0.7 * longest:
            if seconds > taken.seconds[-1]:  # it ended now, and the best is an earlier one
                offer_again(seconds)
            return taken
        sweeps = int(sweeps * min(longest / seconds, _MOST_GROWTH))
