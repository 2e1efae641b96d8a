"""The selection search on a card: hardening and tabu search of many cores and many starts of each at once.

Room: selection; `search` uses it where a card was chosen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from cbs_opt.device import Card, Work, choose, swap_on_cpu
from cbs_opt.monitor import Monitor
from cbs_opt.solver import Context
from cbs_opt.solvers.device.lanes import LARGEST, Engine, Lanes, engine_for, padded_size
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.selection.device_columns import DeviceColumns, DeviceIncumbent, columns_bytes
from cbs_opt.solvers.selection.device_cores import CoreSearch, fitted
from cbs_opt.solvers.selection.device_relaxation import DeviceRelaxation
from cbs_opt.solvers.selection.device_roaming import Roaming
from cbs_opt.solvers.selection.incumbent import GAIN, Incumbent, candidate_swaps
from cbs_opt.solvers.selection.parameters import SearchParameters
from cbs_opt.solvers.selection.repair import trade
from cbs_opt.typing import FloatArray, IntArray

logger = logging.getLogger("cbs_opt")

_PATH_ITERATIONS = 200  # of the relaxation at each weight of a path
_TIGHT_ITERATIONS = 300  # between two bounds
_PATIENT_VISITS = 40  # after which a bound that hardly rises is settled
_HARDEN = tuple(float(t) for t in np.geomspace(0.01, 1.2, 12))
_HARDEN_ITERATIONS = 30
_HARDENED = 16  # points at a time, from one point of the relaxation
_SPREAD = 1.2  # log-normal, of the concave weights of the last of them
_BOUND_EVERY = 4  # visits
_STARTS = 64
_LANES = 2048  # that fill a card
_REPLICAS = 16  # cores of one block at a time, at most
_CORE = LARGEST  # variables of a core of a larger block
_SWAPS = 60  # over all variables, after a visit
_NOISE = 0.7  # log-normal, of what cores are chosen by
_BYTES_OF_POINT = 2000  # that a point takes for each variable while it hardens
_SLOPE = 1e-3  # concave weight of the slopes of the relaxation by which they are chosen


def card_for(problem: SelectionProblem, context: Context) -> Card | None:
    """The card, where the search on one is possible and pays; the log says why not."""
    if context.device == "cpu":
        return None
    sizes = [size for size in problem.component_sizes if size > 1]
    limit = min(context.monitor.remaining, 60.0)
    core = min(max(sizes, default=1), _CORE)
    size = columns_bytes(problem.columns)
    lanes = min(len(sizes) * _STARTS, _LANES) if len(sizes) > 1 else _REPLICAS * _STARTS
    work = Work(
        what=f"search in {len(sizes)} block{'s' * (len(sizes) != 1)} of up to {max(sizes, default=0)} weights",
        upload=size,
        memory=2.0 * size
        + 8.0 * _LANES * padded_size(core) * 12
        + 16.0 * _LANES // _STARTS * padded_size(core) ** 2,
        swaps=limit * context.workers / swap_on_cpu(core),  # what the cores do in the time there is
        weights=core,
        lanes=lanes,
        triton=True,
    )
    if not _blocks_lie_in_groups(problem):
        logger.info(f"{work.what}: on the CPU, as several groups share a block")
        return None
    return choose(context.device, work, context.workers)


def _blocks_lie_in_groups(problem: SelectionProblem) -> bool:
    """Whether every coupled block lies in one group."""
    starts = problem.columns.starts
    return all(
        bool((problem.group[starts[k] : starts[k + 1]] == problem.group[starts[k]]).all())
        for k, component in enumerate(problem.components)
        if component.coupled
    )


@dataclass(frozen=True)
class Relaxed:
    """A point of the relaxation.

    Attributes
    ----------
    x : float64 (r,)
    distance : float64 (r,)
        Of every slope from the threshold of its group; 0 for fractional variables.
    start : float64 (r,)
        Its rounding.
    """

    x: FloatArray
    distance: FloatArray
    start: FloatArray


class DeviceSearch:
    """Cores of all blocks, many starts of each, in one launch; each block keeps its number of pruned weights.

    A visit takes a core of every coupled block (the whole block where it is small; several cores of each where
    there are few blocks) and searches all of them at once (`CoreSearch`). The best point of every block is taken
    if it gains. Trades between blocks, swaps over all variables, and tabu search over all of them where there is
    one block (`Roaming`) follow. Where there is one block every second visit starts from the rounded relaxation.

    Parameters
    ----------
    problem : SelectionProblem
    parameters : SearchParameters
    monitor : Monitor
    offer : callable
        Takes an `Incumbent`.
    seed : int
    card : Card
    engine : Engine, optional
    """

    def __init__(
        self,
        problem: SelectionProblem,
        parameters: SearchParameters,
        monitor: Monitor,
        offer: Callable[[Incumbent], None],
        seed: int,
        card: Card,
        engine: Engine | None = None,
    ) -> None:
        self.problem, self.monitor, self.offer = problem, monitor, offer
        self.there = DeviceColumns(problem.columns, card)
        self.device = card.device
        self.generator = generator = torch.Generator(self.device)
        generator.manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        self.relaxed: Relaxed | None = None
        self.relaxation: DeviceRelaxation | None = None
        self.visits = 0
        self.coupled = [k for k, component in enumerate(problem.components) if component.coupled]
        sizes = problem.component_sizes
        largest = max(sizes, default=1)
        whole = largest <= LARGEST
        self.core = largest if whole else _CORE
        self.replicas = 1 if whole else max(1, min(_REPLICAS, _LANES // (_STARTS * max(len(sizes), 1))))
        per_block = 8 * padded_size(self.core) * (3 * padded_size(self.core) + 12 * _STARTS) * self.replicas
        self.blocks_at_a_time = max(1, card.free_bytes() // (2 * per_block))
        emulated = card.torch_name == "cpu"
        many = max(_STARTS, min(16 * _STARTS, _LANES // max(len(sizes) * self.replicas, 1)))
        self.starts = 4 if emulated else many
        room = card.free_bytes() // (_BYTES_OF_POINT * max(problem.n, 1))
        self.points = max(1, min(4 if emulated else _HARDENED, room))
        self.cores = CoreSearch(engine or engine_for(card), self.starts, parameters.stall, generator)
        self.roaming: Roaming | None = None
        if Roaming.fits(sizes, card):
            self.roaming = Roaming(problem, self.there, self.coupled[0], card, generator)

    @property
    def drift(self) -> float:
        """The largest relative difference so far between an objective kept up and the recomputed one."""
        return max(self.cores.drift, 0.0 if self.roaming is None else self.roaming.drift)

    def start_from(self, x: FloatArray) -> None:
        """Take a point of the relaxation, float64 (r,)."""
        there, problem = self.there, self.problem
        slope = there.product(there.tensor(x)).cpu().numpy() + problem.linear
        slope += _SLOPE * problem.columns.diagonal * (0.5 - x)
        distance = np.abs(slope - problem.threshold(slope))
        distance[(x > 0) & (x < 1)] = 0.0
        self.relaxed = Relaxed(x.copy(), distance, problem.smallest(-x))

    def path(self, weights: tuple[float, ...]) -> None:
        """Follow concave weights down to a relaxation on the card, and harden what is found at its ends."""
        stop = self.monitor.should_stop
        relaxation = self.relaxation = DeviceRelaxation(self.problem, self.there)
        for number, t in enumerate(weights):
            relaxation.run(t, _PATH_ITERATIONS, 1e-6, stop)
            if stop():
                return
            if number in (0, len(weights) - 1):
                self._harden(relaxation)
        self.start_from(relaxation.numpy())
        self.monitor.report_bound(self.problem.certified_bound(relaxation.numpy()))

    def _harden(self, relaxation: DeviceRelaxation) -> None:
        """Offer the best of what the point of a relaxation hardens to, with different concave weights."""
        stop, many = self.monitor.should_stop, relaxation.scattered(self.points, _SPREAD, self.generator)
        for t in _HARDEN:
            many.run(t, _HARDEN_ITERATIONS, 1e-7, stop)
            if stop():
                break
        found = [self.incumbent(self.problem.smallest(-x)) for x in many.x.cpu().numpy()]
        point = min(found, key=lambda point: point.f)
        self.offer(point.copy())
        if not stop():
            trade(point, stop, rounds=3)
            candidate_swaps(point, stop, limit=_SWAPS)
            self.offer(point)

    def tighten(self) -> bool:
        """More iterations of the relaxation of `path`, and its bound; True when that settles."""
        if self.relaxation is None:
            return True
        before = self.monitor.bound
        made = self.relaxation.run(0.0, _TIGHT_ITERATIONS, 1e-9, self.monitor.should_stop)
        x = self.relaxation.numpy()
        self.monitor.report_bound(self.problem.certified_bound(x))
        gained = (self.monitor.bound or 0.0) - (before or 0.0)
        stale = self.visits > _PATIENT_VISITS and gained <= 1e-4 * abs(self.monitor.objective or 0.0)
        return made < _TIGHT_ITERATIONS or stale

    def incumbent(self, y: FloatArray) -> DeviceIncumbent:
        """A point whose gradients come from the card."""
        return DeviceIncumbent(self.problem, y, self.there)

    def search(
        self,
        point: Callable[[], Incumbent],
        improved: Callable[[float | None], bool],
        polish: Callable[[], bool],
        tighten: Callable[[], bool],
        patience: int | None,
    ) -> None:
        """Visits from the incumbent until told to stop.

        Parameters
        ----------
        point : callable
            The incumbent.
        improved : callable
            Whether the objective is better than it was.
        polish : callable
            Tries what else there is after `patience` visits without a gain; where it fails the search ends.
        tighten : callable
            Improves the bound, on the CPU; True when it is settled.
        patience : int or None
            None for no end.
        """
        idle, settled = 0, False
        while not (self.monitor.should_stop() or self.monitor.closed):
            before = self.monitor.objective
            self.visit(point())
            idle = 0 if improved(before) else idle + 1
            if not settled and self.visits % _BOUND_EVERY == 0:
                settled = tighten()
            if patience is not None and idle >= patience:
                if not polish():
                    break
                idle = 0

    # Cores ---------------------------------------------------------------------------------------------------

    def visit(self, point: Incumbent) -> DeviceIncumbent:
        """One visit of all blocks from a point; the point that it leads to, which is offered."""
        self.visits += 1
        stop = self.monitor.should_stop
        fresh = self.relaxed is not None and len(self.coupled) == 1 and self.visits % 2 == 1
        better = self.incumbent(self.relaxed.start if fresh and self.relaxed is not None else point.y)
        h = better.g + self.problem.linear
        price = self.problem.threshold(h)
        order = self.rng.permutation(self.coupled).tolist()
        for first in range(0, len(order), self.blocks_at_a_time):
            chunk = order[first : first + self.blocks_at_a_time]
            cores = [(k, self._choose(k, better, h, price, r)) for k in chunk for r in range(self.replicas)]
            found = self._search(cores, better)
            if found:
                better.move(np.concatenate([at for at, _ in found]), np.concatenate([y for _, y in found]))
                self.offer(better.copy())
            self.monitor.advance(len(cores) * self.starts)
            if stop():
                return better
        if self.roaming is not None:
            self.monitor.advance(self.roaming.improve(better, stop))
        if len(self.coupled) > 1:
            trade(better, stop, rounds=3)
        if self.core < max(self.problem.component_sizes, default=0):
            candidate_swaps(better, stop, limit=_SWAPS)
        self.offer(better.copy())
        return better

    def _choose(self, k: int, point: Incumbent, h: FloatArray, price: FloatArray, replica: int) -> IntArray:
        """Variables of a core of block k, local and ascending: those that are nearest to a change, with noise.

        By their slopes in the relaxation, or by what changing each alone costs.
        """
        part = slice(int(self.problem.columns.starts[k]), int(self.problem.columns.starts[k + 1]))
        size = part.stop - part.start
        if size <= self.core:
            return np.arange(size)
        half, y = 0.5 * self.problem.columns.diagonal[part], point.y[part]
        noise = np.exp(_NOISE * (replica > 0 or self.visits > 2) * self.rng.standard_normal(size))
        if self.relaxed is not None and (self.visits + replica) % 2 == 1:
            return np.sort(np.argsort(self.relaxed.distance[part] * noise, kind="stable")[: self.core])
        score = np.where(y > 0, half - (h - price)[part], half + (h - price)[part]) * noise
        inside, outside = np.flatnonzero(y > 0), np.flatnonzero(y == 0)
        few = min(outside.size, max(self.core // 2, self.core - inside.size))
        chosen = [
            side[np.argsort(score[side], kind="stable")[:count]]
            for side, count in ((outside, few), (inside, self.core - few))
        ]
        return np.sort(np.concatenate(chosen))

    def _search(self, cores: list[tuple[int, IntArray]], point: Incumbent) -> list[tuple[IntArray, FloatArray]]:
        """The best values found for cores, where they gain: variables and values; one core of a block at most."""
        P, starts = padded_size(max(local.size for _, local in cores)), self.problem.columns.starts
        index = [int(starts[k]) + local for k, local in cores]
        y, h, x = (np.zeros((len(cores), P)) for _ in range(3))
        for b, at in enumerate(index):
            y[b, : at.size], h[b, : at.size] = point.y[at], point.g[at] + self.problem.linear[at]
            x[b, : at.size] = 0.0 if self.relaxed is None else self.relaxed.x[at]
        q = self.there.core_matrices(cores, P)
        now = self.there.tensor(y)
        linear = self.there.tensor(h) - torch.bmm(q, now[:, :, None])[:, :, 0]
        lanes = Lanes(q, linear, torch.tensor([at.size for at in index], device=self.device))
        loose = None
        if self.relaxed is not None:
            loose = fitted(self.there.tensor(x), lanes.inside[:, 0], now.sum(1))
        tolerance = 1e-6 * abs(point.f)
        best, gains = self.cores.search(lanes, now, loose, tolerance, self.monitor.should_stop)
        points, gain = best.cpu().numpy(), gains.cpu().numpy()
        out: list[tuple[IntArray, FloatArray]] = []
        for k in sorted({k for k, _ in cores}):
            b = max((b for b, (other, _) in enumerate(cores) if other == k), key=lambda b: (gain[b], -b))
            if gain[b] > GAIN * abs(point.f):
                out.append((index[b], points[b, : index[b].size].astype(np.float64)))
        return out
