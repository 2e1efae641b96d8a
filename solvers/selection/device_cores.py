"""Cycles on many cores at once, on a card: melt, harden, tabu search, from many starts of each core.

Room: selection; `device_search` uses it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from cbs_opt.solvers.device.lanes import Engine, Lanes

_CYCLES = 4
_MELT = (5e-3, 0.3)  # concave weight after melting a binary point, log-uniform
_START = (1e-3, 3e-2)  # and of a start from the relaxation
_NOISE = (0.3, 1.8)  # log-normal spread of the random concave weights, uniform
_TENURE = (4, 16)
_RATIO = 1.6
_LAST_WEIGHT = 1.2
_DESCENT_STEPS = 2000  # of a launch
_TABU_STEPS = 2000  # of a launch
_TABU_CALLS = 25
_LANE_STEPS = 2000 * 4096 * 1024  # steps times lanes times variables of a launch, at most: some tenths of a second
_LEAST_STEPS = 64


class CoreSearch:
    """Searches cores with fixed numbers of ones; a lane is a core and a start.

    In the first cycle one start of each core is its point as it is; of the others half melt that point, and half
    harden from the relaxation. In later cycles half melt the best point of their core, half their own last one.

    Parameters
    ----------
    engine : Engine
    starts : int
    stall : int
        Tabu steps without improvement that end a cycle.
    generator : torch.Generator

    Attributes
    ----------
    drift : float
        The largest relative difference so far between an objective kept up in a lane and the recomputed one.
    """

    def __init__(self, engine: Engine, starts: int, stall: int, generator: torch.Generator) -> None:
        self.engine, self.starts, self.stall, self.generator = engine, starts, stall, generator
        self.drift = 0.0

    def search(
        self,
        lanes: Lanes,
        now: torch.Tensor,
        loose: torch.Tensor | None,
        tolerance: float,
        should_stop: Callable[[], bool],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best point of every core, int8 (B, P), and by how much it is better, float64 (B,).

        Parameters
        ----------
        lanes : Lanes
            In float64.
        now : float64 (B, P)
            Binary.
        loose : float64 (B, P), optional
            Points of the relaxation with the same sums.
        tolerance : float
            Violation of optimality at which a descent ends.
        should_stop : callable
        """
        P, dtype, S, B = lanes.padded, lanes.q.dtype, self.starts, int(now.shape[0])
        begin = lanes.values(now[:, None, :])[:, 0]
        best, value = now.to(torch.int8), begin.clone()
        x = now[:, None, :].expand(B, S, P).to(dtype).contiguous()
        t = self._log_uniform((B, S, 1), _MELT, dtype)
        if loose is not None and S > 2:
            x[:, 2::2] = loose[:, None, :].to(dtype)
            t[:, 2::2] = self._log_uniform((B, len(range(2, S, 2)), 1), _START, dtype)
        count = now.sum(1).round().to(torch.int64)
        for cycle in range(_CYCLES):
            y = lanes.round(self._hardened(lanes, x, t, tolerance, should_stop), count)
            if cycle == 0:
                y[:, 0] = now.to(torch.int8)
            if should_stop():
                break
            found = self._tabu(lanes, y, should_stop)
            values = lanes.values(found)
            least, at = values.min(1)
            better = least < value
            best = torch.where(better[:, None], found[torch.arange(B, device=at.device), at], best)
            value = torch.minimum(value, least)
            if should_stop() or (cycle and not bool(better.any())):
                break
            x = found.to(dtype)
            x[:, ::2] = best[:, None, :].to(dtype)
            t = self._log_uniform((B, S, 1), _MELT, dtype)
        return best, begin - value

    def _log_uniform(self, shape: tuple[int, ...], limits: tuple[float, float], kind: torch.dtype) -> torch.Tensor:
        low, high = (float(np.log(limit)) for limit in limits)
        return torch.exp(self._uniform(shape, (low, high), kind))

    def _uniform(self, shape: tuple[int, ...], limits: tuple[float, float], dtype: torch.dtype) -> torch.Tensor:
        part = torch.rand(shape, generator=self.generator, dtype=dtype, device=self.generator.device)
        return limits[0] + (limits[1] - limits[0]) * part

    def _hardened(
        self, lanes: Lanes, x: torch.Tensor, t: torch.Tensor, tolerance: float, should_stop: Callable[[], bool]
    ) -> torch.Tensor:
        """Points (B, S, P) after concave continuation from weights t (B, S, 1), nearly binary."""
        B, S, P = (int(size) for size in x.shape)
        spread = self._uniform((B, S, 1), _NOISE, x.dtype)
        noise = torch.randn((B, S, P), generator=self.generator, dtype=x.dtype, device=x.device)
        weight = lanes.diagonal[:, None, :] * torch.exp(spread * noise)
        least = torch.full((B, S), max(tolerance, 1e-300), dtype=x.dtype, device=x.device)
        steps = _steps_of_launch(_DESCENT_STEPS, B * S * P)
        while not should_stop():
            shift = (t * weight).contiguous()
            h = torch.where(lanes.inside, lanes.gradients(x) + shift * (0.5 - x), 0.0).contiguous()
            for _ in range(-(-_DESCENT_STEPS // steps)):
                done = self.engine.descend(lanes, x, h, shift, steps, least)
                if steps == _DESCENT_STEPS or should_stop() or not bool((done >= steps).any()):
                    break
            if bool((t >= _LAST_WEIGHT).all()):
                break
            t = (t * _RATIO).clamp_max(_LAST_WEIGHT)
        return x

    def _tabu(self, lanes: Lanes, y: torch.Tensor, should_stop: Callable[[], bool]) -> torch.Tensor:
        """The best points of tabu search from starts, int8 (B, S, P)."""
        B, S = int(y.shape[0]), int(y.shape[1])
        seeds = torch.randint(1, 1 << 62, (B, S), generator=self.generator, device=y.device)
        tenure = torch.randint(*_TENURE, (B, S), generator=self.generator, device=y.device).to(torch.int32)
        state = lanes.tabu_state(y, seeds)
        steps = _steps_of_launch(_TABU_STEPS, B * S * lanes.padded)
        for _ in range(-(-_TABU_CALLS * _TABU_STEPS // steps)):
            self.engine.tabu(lanes, state, steps, self.stall, tenure)
            self.drift = max(self.drift, lanes.refresh(state))
            if should_stop() or bool((state.idle >= self.stall).all()):
                break
        return state.best


def _steps_of_launch(most: int, size: int) -> int:
    """Steps after which lanes of so many variables in all are asked for limits again."""
    return max(_LEAST_STEPS, min(most, _LANE_STEPS // max(size, 1)))


def fitted(x: torch.Tensor, inside: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Points (B, P) shifted by one number each, within [0, 1], so that their sums are `count`; zero outside."""
    low, high = torch.full_like(count, -1.0), torch.full_like(count, 1.0)
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = torch.where(inside, (x + middle[:, None]).clamp(0.0, 1.0), 0.0).sum(1) < count
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(inside, (x + high[:, None]).clamp(0.0, 1.0), 0.0)
