"""The selection search on a card: the relaxation, then hardening and tabu search of many cores and starts at once.

Room: selection; `search` uses it where a card was chosen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch

from cbs_opt.device import Card, Work, choose
from cbs_opt.monitor import Monitor
from cbs_opt.solver import Context
from cbs_opt.solvers.device.dense import LONGEST_TENURE, DenseTabu
from cbs_opt.solvers.device.lanes import LARGEST, Engine, Lanes, engine_for, padded_size
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.selection.device_columns import DeviceColumns, DeviceIncumbent, columns_bytes
from cbs_opt.solvers.selection.device_relaxation import MOST_GROUPS, DeviceRelaxation
from cbs_opt.solvers.selection.incumbent import GAIN, Incumbent, candidate_swaps
from cbs_opt.solvers.selection.parameters import SearchParameters
from cbs_opt.solvers.selection.repair import trade
from cbs_opt.typing import FloatArray, IntArray

logger = logging.getLogger("cbs_opt")

_PATH_ITERATIONS = 200  # of the relaxation at each weight of the path
_TIGHT_ITERATIONS = 400  # between two bounds
_BOUND_EVERY = 4  # visits: a bound takes a product with all gradients in float64 on the CPU
_HARDEN_ITERATIONS = 30
_HARDEN = tuple(float(t) for t in np.geomspace(0.003, 1.2, 18))
_STARTS = 64
_LANES = 2048  # that fill a card
_REPLICAS = 16  # cores of one block at a time, at most
_LARGEST_DENSE = 100_000  # variables of a block whose Q is formed
_ROAM_STEPS = 2048
_KICK = (0, 48)  # exchanges that a start of the search over all variables begins with
_CORE = 512  # variables of a core of a larger block
_MELT = (5e-3, 0.3)
_NOISE = (0.3, 1.5)
_TENURE = (4, 16)
_RATIO = 1.6
_LAST_WEIGHT = 1.2
_DESCENT_STEPS = 2000  # of a launch
_TABU_STEPS = 2000  # of a launch
_TABU_CALLS = 25
_DOUBLE = 256  # variables of a core up to which a lane works in float64


def card_for(problem: SelectionProblem, context: Context) -> Card | None:
    """The card, where the search on one is possible and pays; the log says why not."""
    if context.device == "cpu":
        return None
    sizes = [size for size in problem.component_sizes if size > 1]
    limit = min(context.monitor.remaining, 60.0)
    core = min(max(sizes, default=1), _CORE)
    size = columns_bytes(problem.columns)
    lanes = min(len(sizes) * _STARTS, _LANES) if len(sizes) > 1 else _REPLICAS * _STARTS
    # What the cores of the CPU do in the time there is, and how long a card takes for as many swaps.
    here = (5e-7 + 1e-9 * core) / context.workers
    there = 4e-6 * max(1.0, core / 256) / min(lanes, 1000)
    work = Work(
        what=f"search in {len(sizes)} block{'s' * (len(sizes) != 1)} of up to {max(sizes, default=0)} weights",
        upload=size,
        memory=2.0 * size
        + 8.0 * _LANES * padded_size(core) * 12
        + 16.0 * _LANES // _STARTS * padded_size(core) ** 2,
        cpu_seconds=limit,
        card_seconds=limit / here * there,
        triton=True,
    )
    if problem.budget.size > MOST_GROUPS:
        logger.info(f"{work.what}: on the CPU, as a card takes at most {MOST_GROUPS} groups")
        return None
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


class DeviceSearch:
    """Cores of all blocks, many starts of each, in one launch; each block keeps its number of pruned weights.

    A visit takes a core of every coupled block (the whole block where it is small; several cores of each where
    there are few blocks), melts the incumbent with random concave weights, hardens it, and runs drop/add tabu
    search. The best start of every block is taken if it gains, recomputed in float64. Trades between blocks and
    swaps over all variables follow.

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

    Attributes
    ----------
    drift : float
        The largest relative difference so far between an objective kept up in a lane and the recomputed one.
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
        self.problem, self.parameters, self.monitor, self.offer = problem, parameters, monitor, offer
        self.there = DeviceColumns(problem.columns, card)
        self.device = card.device
        self.engine = engine or engine_for(card)
        self.generator = torch.Generator(self.device)
        self.generator.manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        self.relaxed = DeviceRelaxation(problem, self.there)
        self.tight: DeviceRelaxation | None = None
        self.settled = False
        self.drift = 0.0
        self.visits = 0
        self.coupled = [k for k, component in enumerate(problem.components) if component.coupled]
        sizes = problem.component_sizes
        largest = max(sizes, default=1)
        whole = largest <= LARGEST
        self.core = largest if whole else min(_CORE, max(parameters.core, 2))
        self.replicas = 1 if whole else max(1, min(_REPLICAS, _LANES // (_STARTS * max(len(sizes), 1))))
        self.dense: torch.Tensor | None = None
        self.roams = self._has_room_to_roam(card, sizes)
        self.blocks_at_a_time = max(1, card.free_bytes() // (16 * padded_size(self.core) ** 2 * self.replicas * 4))
        emulated = card.torch_name == "cpu"
        self.roam_steps = 32 if emulated else _ROAM_STEPS
        self.starts = (
            2 if emulated else max(_STARTS, min(16 * _STARTS, _LANES // max(len(sizes) * self.replicas, 1)))
        )

    def incumbent(self, y: FloatArray) -> DeviceIncumbent:
        """A point whose gradients come from the card."""
        return DeviceIncumbent(self.problem, y, self.there)

    # Relaxation ----------------------------------------------------------------------------------------------

    def path(self, weights: tuple[float, ...]) -> None:
        """Follow the concave weights down, harden at the start and at the end, and report the bound."""
        stop = self.monitor.should_stop
        for number, t in enumerate(weights):
            self.relaxed.run(t, _PATH_ITERATIONS, 1e-6, stop)
            if stop():
                return
            if number in (0, len(weights) - 1):
                self._harden_all()
        self.monitor.report_bound(self.problem.certified_bound(self.relaxed.numpy()))

    def _harden_all(self) -> None:
        x = self.relaxed.x
        for t in _HARDEN:
            self.relaxed.run(t, _HARDEN_ITERATIONS, 1e-7, self.monitor.should_stop)
            if self.monitor.should_stop():
                break
        point = self.incumbent(self.problem.smallest(-self.relaxed.numpy()))
        self.relaxed.x = x
        if not self.monitor.should_stop():
            trade(point, self.monitor.should_stop)
            candidate_swaps(point, self.monitor.should_stop)
        self.offer(point)

    def tighten(self) -> None:
        """More iterations of the plain relaxation, and its bound."""
        if self.settled or self.visits % _BOUND_EVERY != 1:
            return
        before = self.monitor.bound
        made = self.relaxed.run(0.0, _TIGHT_ITERATIONS, 1e-8, self.monitor.should_stop)
        self.monitor.report_bound(self.problem.certified_bound(self.relaxed.numpy()))
        gained = (self.monitor.bound or 0.0) - (before or 0.0)
        self.settled = made < _TIGHT_ITERATIONS or gained <= 1e-5 * abs(self.monitor.objective or 0.0)

    # Cores ---------------------------------------------------------------------------------------------------

    def visit(self, point: Incumbent) -> DeviceIncumbent:
        """One visit of all blocks from a point; the point that it leads to, which is offered."""
        self.visits += 1
        better = self.incumbent(point.y)
        h = better.g + self.problem.linear
        price = self.problem.threshold(h)
        order = self.rng.permutation(self.coupled).tolist()
        for first in range(0, len(order), self.blocks_at_a_time):
            chunk = order[first : first + self.blocks_at_a_time]
            cores = [(k, self._choose(k, better, h, price)) for k in chunk for _ in range(self.replicas)]
            found = self._search(cores, better)
            if found:
                index = np.concatenate([at for at, _ in found])
                values = np.concatenate([y for _, y in found])
                better.move(index, values)
                self.offer(better.copy())
            self.monitor.advance(len(cores) * self.starts)
            if self.monitor.should_stop():
                return better
        if self.roams and not self.monitor.should_stop():
            self._roam(better)
        if len(self.coupled) > 1:
            trade(better, self.monitor.should_stop, rounds=3)
        if self.core < max(self.problem.component_sizes, default=0):
            candidate_swaps(better, self.monitor.should_stop, limit=20)
        self.offer(better.copy())
        return better

    def _has_room_to_roam(self, card: Card, sizes: list[int]) -> bool:
        """Whether Q of the only block, too large for a lane, fits in float32 beside what else is there."""
        fits = len(sizes) == 1 and LARGEST < sizes[0] <= _LARGEST_DENSE
        return fits and 4.0 * sizes[0] ** 2 + 60.0 * sizes[0] * _STARTS <= 0.7 * card.free_bytes()

    def _roam(self, point: DeviceIncumbent) -> None:
        """Tabu search over the only block, from kicked copies of a point; changes it where it gains."""
        start = int(self.problem.columns.starts[self.coupled[0]])
        at = np.arange(start, start + self.problem.columns.blocks[self.coupled[0]].size)
        n = at.size
        padded = -(-n // 16) * 16
        if self.dense is None:
            self.dense = self.there.dense(self.coupled[0], padded)
        linear = np.zeros(padded)
        linear[:n] = self.problem.linear[at]
        y = self.there.tensor(np.concatenate([point.y[at], np.zeros(padded - n)])) > 0.5
        h = self.there.tensor(point.g[at] + self.problem.linear[at])
        cost = torch.zeros(padded, dtype=torch.float32, device=self.device)
        cost[:n] = 0.5 * self.there.diagonal[start : start + n] + torch.where(y[:n], -h, h)
        S = min(self.starts, _STARTS)
        starts = y.repeat(S, 1)
        noise = torch.randn((S, padded), generator=self.generator, device=self.device)
        kick = torch.randint(*_KICK, (S, 1), generator=self.generator, device=self.device)
        kick[0] = 0
        for side in (y, ~y):
            allowed = side & (torch.arange(padded, device=self.device) < n)
            noisy = torch.where(allowed, cost * torch.exp(0.7 * noise), torch.inf)
            most = min(_KICK[1], int(allowed.sum()))
            cheap = torch.argsort(noisy, dim=1)[:, :most]
            few = kick.clamp_max(min(most, int(y.sum()), n - int(y.sum())))
            flip = torch.zeros_like(starts).scatter_(1, cheap, torch.arange(most, device=self.device) < few)
            starts ^= flip
        seeds = torch.randint(1, 1 << 62, (S,), generator=self.generator, device=self.device)
        tenure = torch.randint(4, LONGEST_TENURE, (S,), generator=self.generator, device=self.device)
        still = torch.arange(padded, device=self.device) >= n
        search = DenseTabu(
            self.dense, self.there.tensor(linear), starts, seeds, tenure, steps=self.roam_steps, still=still
        )
        self.monitor.advance(search.run(self.monitor.should_stop))
        self.drift = max(self.drift, search.drift)
        best = int(search.objectives.argmin())
        found = self.incumbent(point.y)
        found.move(at, search.best[best, :n].cpu().numpy().astype(np.float64))
        if found.f < point.f - GAIN * abs(point.f):
            point.y, point.g, point.f = found.y, found.g, found.f

    def _choose(self, k: int, point: Incumbent, h: FloatArray, price: FloatArray) -> IntArray:
        """Variables of a core of block k, local and ascending: those whose change costs least, with noise."""
        part = slice(int(self.problem.columns.starts[k]), int(self.problem.columns.starts[k + 1]))
        size = part.stop - part.start
        if size <= self.core:
            return np.arange(size)
        half, y = 0.5 * self.problem.columns.diagonal[part], point.y[part]
        score = np.where(y > 0, half - (h - price)[part], half + (h - price)[part])
        score = score * np.exp(0.7 * self.rng.standard_normal(size))
        inside, outside = np.flatnonzero(y > 0), np.flatnonzero(y == 0)
        few = min(outside.size, max(self.core // 2, self.core - inside.size))
        chosen = [
            side[np.argpartition(score[side], count - 1)[:count]] if 0 < count < side.size else side[:count]
            for side, count in ((outside, few), (inside, self.core - few))
        ]
        return np.sort(np.concatenate(chosen))

    def _search(self, cores: list[tuple[int, IntArray]], point: Incumbent) -> list[tuple[IntArray, FloatArray]]:
        """The best values found for cores, where they gain: variables and values; one core of a block at most."""
        P, starts = padded_size(max(local.size for _, local in cores)), self.problem.columns.starts
        index = [int(starts[k]) + local for k, local in cores]
        y, h = (np.zeros((len(cores), P)) for _ in range(2))
        for b, at in enumerate(index):
            y[b, : at.size], h[b, : at.size] = point.y[at], point.g[at] + self.problem.linear[at]
        q = self.there.core_matrices(cores, P)
        now = self.there.tensor(y)
        linear = self.there.tensor(h) - torch.bmm(q, now[:, :, None])[:, :, 0]
        sizes = torch.tensor([at.size for at in index], device=self.device)
        exact = Lanes(q, linear, sizes)
        lanes = exact if P <= _DOUBLE else Lanes(q.to(torch.float32), linear.to(torch.float32), sizes)
        begin = exact.values(now[:, None, :])  # (B, 1)
        best = self._tabu(lanes, self._melted(lanes, now, begin), now)
        if best is None:
            return []
        gains = (begin - exact.values(best)).cpu().numpy()
        threshold = GAIN * abs(point.f)
        out: list[tuple[IntArray, FloatArray]] = []
        for k in sorted({k for k, _ in cores}):
            mine = [b for b, (other, _) in enumerate(cores) if other == k]
            gain, b, s = max((float(gains[b].max()), -b, -int(gains[b].argmax())) for b in mine)
            if gain > threshold:
                at = index[-b]
                out.append((at, best[-b, -s, : at.size].cpu().numpy().astype(np.float64)))
        return out

    def _uniform(self, shape: tuple[int, ...], limits: tuple[float, float], dtype: torch.dtype) -> torch.Tensor:
        part = torch.rand(shape, generator=self.generator, dtype=dtype, device=self.device)
        return limits[0] + (limits[1] - limits[0]) * part

    def _melted(self, lanes: Lanes, now: torch.Tensor, begin: torch.Tensor) -> torch.Tensor:
        """Binary starts, int8 (B, S, P): the point itself, and what it hardens to from random concave weights."""
        B, P, S, dtype = now.shape[0], now.shape[1], self.starts, lanes.q.dtype
        count = now.sum(1).round().to(torch.int64)
        x = now[:, None, :].expand(B, S, P).to(dtype).contiguous()
        spread = self._uniform((B, S, 1), _NOISE, dtype)
        noise = torch.randn((B, S, P), generator=self.generator, dtype=dtype, device=self.device)
        weight = lanes.diagonal[:, None, :] * torch.exp(spread * noise)
        low, high = np.log(_MELT[0]), np.log(_MELT[1])
        t = torch.exp(self._uniform((B, S, 1), (low, high), dtype))
        cost = begin - lanes.values(torch.zeros_like(now)[:, None, :])
        tolerance = (1e-6 * cost.abs().clamp_min(1e-300)).expand(B, S).to(dtype).contiguous()
        while not self.monitor.should_stop():
            shift = (t * weight).contiguous()
            h = torch.where(lanes.inside, lanes.gradients(x) + shift * (0.5 - x), 0.0).contiguous()
            self.engine.descend(lanes, x, h, shift, _DESCENT_STEPS, tolerance)
            if bool((t >= _LAST_WEIGHT).all()):
                break
            t = (t * _RATIO).clamp_max(_LAST_WEIGHT)
        out = lanes.round(x, count)
        out[:, 0] = now.to(torch.int8)
        return out

    def _tabu(self, lanes: Lanes, y: torch.Tensor, now: torch.Tensor) -> torch.Tensor | None:
        """The best points of tabu search from starts, int8 (B, S, P); None when stopped before the first."""
        if self.monitor.should_stop():
            return None
        B, S = int(y.shape[0]), int(y.shape[1])
        seeds = torch.randint(1, 1 << 62, (B, S), generator=self.generator, device=self.device)
        tenure = torch.randint(*_TENURE, (B, S), generator=self.generator, device=self.device, dtype=torch.int32)
        state = lanes.tabu_state(y, seeds)
        for _ in range(_TABU_CALLS):
            self.engine.tabu(lanes, state, _TABU_STEPS, self.parameters.stall, tenure)
            self.drift = max(self.drift, lanes.refresh(state))
            if self.monitor.should_stop() or bool((state.idle >= self.parameters.stall).all()):
                break
        return state.best
