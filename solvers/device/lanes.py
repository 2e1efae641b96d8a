"""Many searches on dense blocks at once: a lane is a block and a start.

The two inner loops, `tabu_swaps` and `pair_descent`, have three versions behind one interface, `Engine`: NumPy
(the reference), numba (the CPU) and Triton (the card). All else is torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from cbs_opt.device import Card, DeviceError

LARGEST = 1024
"""Weights of a block at most: what fits into the registers of one program."""

_SMALLEST = 32


@dataclass
class TabuState:
    """Where the tabu search of every lane stands.

    Attributes
    ----------
    y, best : int8 (B, S, P)
    h : (B, S, P)
        The gradient Qy + c.
    release : int32 (B, S, P)
        The clock from which on a weight may move again.
    f, f_best : (B, S)
    idle : int32 (B, S)
        Steps since the best point.
    rng : int64 (B, S)
    clock : int
    """

    y: torch.Tensor
    best: torch.Tensor
    h: torch.Tensor
    release: torch.Tensor
    f: torch.Tensor
    f_best: torch.Tensor
    idle: torch.Tensor
    rng: torch.Tensor
    clock: int = 0


class Lanes:
    """Dense blocks on a device, padded to one size, with their linear terms.

    Parameters
    ----------
    q : (B, P, P)
        Symmetric; zero outside of the blocks. float32 or float64.
    linear : (B, P)
    sizes : int64 (B,)

    Attributes
    ----------
    inside : bool (B, 1, P)
        Which entries are weights.
    """

    def __init__(self, q: torch.Tensor, linear: torch.Tensor, sizes: torch.Tensor) -> None:
        self.q, self.linear, self.sizes = q.contiguous(), linear, sizes.to(torch.int32)
        self.diagonal = q.diagonal(dim1=1, dim2=2).contiguous()
        self.inside = (torch.arange(q.shape[1], device=q.device) < sizes[:, None])[:, None, :]

    @property
    def padded(self) -> int:
        """P."""
        return int(self.q.shape[1])

    def values(self, y: torch.Tensor) -> torch.Tensor:
        """½ yᵀQy + cᵀy, float64 (B, S), of points (B, S, P); products in float64."""
        z, q = y.to(torch.float64), self.q.to(torch.float64)
        return 0.5 * (torch.bmm(z, q) * z).sum(2) + (z * self.linear[:, None, :].to(torch.float64)).sum(2)

    def gradients(self, y: torch.Tensor) -> torch.Tensor:
        """Qy + c, (B, S, P), in the type of Q."""
        z = y.to(self.q.dtype)
        return torch.baddbmm(self.linear[:, None, :].to(self.q.dtype), z, self.q)

    def tabu_state(self, y: torch.Tensor, rng: torch.Tensor) -> TabuState:
        """The state at the start from binary points, (B, S, P)."""
        y = y.to(torch.int8).contiguous()
        f = self.values(y).to(self.q.dtype)
        never = torch.iinfo(torch.int32).max
        release = torch.where(self.inside, 0, never).to(torch.int32).expand(y.shape).contiguous()
        idle = torch.zeros(y.shape[:2], dtype=torch.int32, device=y.device)
        return TabuState(y, y.clone(), self.gradients(y), release, f, f.clone(), idle, rng.clone())

    def refresh(self, state: TabuState) -> float:
        """Recompute gradients and objectives from scratch; returns by how much, relative, they had drifted.

        Raises
        ------
        DeviceError
            When an objective is not a number.
        """
        f, best = self.values(state.y), self.values(state.best)
        if not bool(torch.isfinite(state.f).all() & torch.isfinite(best).all()):
            raise DeviceError("an objective of the tabu search is not a number")
        size = best.abs().clamp_min(1e-300)
        drift = float(((state.f_best.to(torch.float64) - best).abs() / size).max())
        state.f, state.f_best = f.to(self.q.dtype), best.to(self.q.dtype)
        state.h = self.gradients(state.y)
        return drift

    def round(self, x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Binary points, int8 (B, S, P), with the `count` (B,) largest of every lane; ties by index."""
        keys = torch.where(self.inside, -x, torch.inf)
        order = torch.argsort(keys, dim=2, stable=True)
        rank = torch.arange(self.padded, device=x.device)
        out = torch.zeros(x.shape, dtype=torch.int8, device=x.device)
        take = (rank < count[:, None])[:, None, :].expand(x.shape).to(torch.int8)
        return out.scatter_(2, order, take)


def padded_size(largest: int) -> int:
    """The power of two, at least 32, to which blocks of at most so many weights are padded."""
    return max(_SMALLEST, 1 << max(largest - 1, 0).bit_length())


class Engine(Protocol):
    """The inner loops on lanes; both change their arguments in place."""

    def tabu(self, lanes: Lanes, state: TabuState, steps: int, stall: int, tenure: torch.Tensor) -> None:
        """At most `steps` tabu steps of every lane that has not stalled; `tenure` int32 (B, S)."""

    def descend(
        self,
        lanes: Lanes,
        x: torch.Tensor,
        h: torch.Tensor,
        shift: torch.Tensor,
        steps: int,
        tolerance: torch.Tensor,
    ) -> torch.Tensor:
        """Pairwise descent of x (B, S, P) with the gradient h; the steps taken, int32 (B, S)."""


class CpuEngine:
    """The loops of `selection_numba`, or of `selection_numpy`, one lane after the other.

    Parameters
    ----------
    kernels : module
    """

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels

    @staticmethod
    def _layout(lanes: Lanes, b: int) -> tuple[tuple[Any, ...], int]:
        n = int(lanes.sizes[b])
        q = np.ascontiguousarray(lanes.q[b, :n, :n].cpu().numpy().astype(np.float64)).ravel()
        ends, one = np.array([0, n]), np.array([0, 1])
        return (q, np.array([0, n * n]), ends, one, ends, np.zeros(1, dtype=np.int64), 1), n

    def tabu(self, lanes: Lanes, state: TabuState, steps: int, stall: int, tenure: torch.Tensor) -> None:
        """See `Engine`."""
        half = 0.5 * lanes.diagonal.cpu().numpy().astype(np.float64)
        for b in range(state.y.shape[0]):
            layout, n = self._layout(lanes, b)
            for s in range(state.y.shape[1]):
                y, best, h, release = (
                    np.array(array[b, s, :n].cpu().numpy())
                    for array in (state.y, state.best, state.h.to(torch.float64), state.release.to(torch.int64))
                )
                f, f_best, _, rng, idle = self.kernels.tabu_swaps(
                    *layout, half[b, :n].copy(), y, h, float(state.f[b, s]), best, float(state.f_best[b, s]),
                    release, state.clock, steps, stall, int(tenure[b, s]),
                    np.uint64(int(state.rng[b, s]) % (1 << 64)), int(state.idle[b, s]),
                )  # fmt: skip
                for name, value in (("y", y), ("best", best), ("h", h), ("release", release)):
                    array = getattr(state, name)
                    array[b, s, :n] = torch.from_numpy(value).to(array.dtype)
                state.f[b, s], state.f_best[b, s], state.idle[b, s] = float(f), float(f_best), int(idle)
                state.rng[b, s] = int(np.uint64(rng).astype(np.int64))
        state.clock += steps

    def descend(
        self,
        lanes: Lanes,
        x: torch.Tensor,
        h: torch.Tensor,
        shift: torch.Tensor,
        steps: int,
        tolerance: torch.Tensor,
    ) -> torch.Tensor:
        """See `Engine`."""
        done = torch.zeros(x.shape[:2], dtype=torch.int32)
        diagonal = lanes.diagonal.cpu().numpy().astype(np.float64)
        for b in range(x.shape[0]):
            layout, n = self._layout(lanes, b)
            for s in range(x.shape[1]):
                mine, slope, t = (
                    np.array(array[b, s, :n].to(torch.float64).cpu().numpy()) for array in (x, h, shift)
                )
                done[b, s] = int(
                    self.kernels.pair_descent(
                        *layout, diagonal[b, :n] - t, t, mine, slope, steps, float(tolerance[b, s])
                    )
                )
                x[b, s, :n], h[b, s, :n] = (torch.from_numpy(a).to(x.dtype) for a in (mine, slope))
        return done.to(x.device)


def engine_for(card: Card) -> Engine:
    """The Triton kernels, or those of numba where a card is emulated: the interpreter is slow."""
    if card.torch_name != "cpu":
        return TritonEngine()
    from cbs_opt.solvers.kernels import selection_numba

    return CpuEngine(selection_numba)


class TritonEngine:
    """One program for each lane."""

    @staticmethod
    def _options(lanes: Lanes) -> dict[str, Any]:
        """Of a launch. In float64 no product is fused with a sum, so that the card rounds as the CPU does."""
        options: dict[str, Any] = {"num_warps": 1 if lanes.padded <= 256 else 4}
        if lanes.q.device.type != "cpu" and lanes.q.dtype == torch.float64:
            options["enable_fp_fusion"] = False
        return options

    def tabu(self, lanes: Lanes, state: TabuState, steps: int, stall: int, tenure: torch.Tensor) -> None:
        """See `Engine`."""
        from cbs_opt.solvers.device.block_kernels import tabu_swaps

        B, S, P = (int(size) for size in state.y.shape)
        active = (state.idle < stall).to(torch.int8)
        tabu_swaps[(B * S,)](
            lanes.q, 0.5 * lanes.diagonal, state.y, state.h, state.release, state.best, state.f, state.f_best,
            state.idle, state.rng, tenure, active, state.clock, steps, stall, S, P=P, **self._options(lanes),
        )  # fmt: skip
        state.clock += steps

    def descend(
        self,
        lanes: Lanes,
        x: torch.Tensor,
        h: torch.Tensor,
        shift: torch.Tensor,
        steps: int,
        tolerance: torch.Tensor,
    ) -> torch.Tensor:
        """See `Engine`."""
        from cbs_opt.solvers.device.block_kernels import pair_descent

        B, S, P = (int(size) for size in x.shape)
        done = torch.zeros(B, S, dtype=torch.int32, device=x.device)
        curvature = lanes.diagonal[:, None, :] - shift
        pair_descent[(B * S,)](
            lanes.q, curvature, shift, x, h, lanes.sizes, tolerance, done, steps, S, P=P, **self._options(lanes)
        )
        return done
