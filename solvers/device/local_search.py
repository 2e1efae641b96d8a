"""Algorithm 1 on a card, for many starts at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from cbs_opt.device import DeviceError
from cbs_opt.interrupt import checkpoint
from cbs_opt.solvers.device.objective import DeviceObjective, host
from cbs_opt.typing import BoolArray, FloatArray, IntArray

MOST_GROUPS = 64
"""Groups beyond which the CPU is faster: each has launches of its own."""

_CHUNK = 2048  # entries of a row that a program updates together
_LAUNCH = 1 << 27  # entries of Q that one launch may read for each start: some tenths of a second


class DeviceLocalSearch:
    """The swap local search of `cbs_opt.solvers.paper.ls.LocalSearch`; the same masks, in float64.

    Parameters
    ----------
    objective : DeviceObjective
    groups : sequence of int64 arrays
        The free weights of each group, ascending.
    threshold : callable
        ε of a doubled objective.
    rho, tau : int

    Notes
    -----
    Q is formed: 8 Σ b_k² bytes. A step sorts every group once for each start, O(n log n), and reads two rows of Q
    for a swap.
    """

    def __init__(
        self,
        objective: DeviceObjective,
        groups: Sequence[IntArray],
        threshold: Callable[[float], float],
        rho: int,
        tau: int,
    ) -> None:
        self.objective, self.threshold, self.rho, self.tau = objective, threshold, rho, tau
        device, curvature = objective.device, objective.problem.curvature
        self.groups = [torch.tensor(members, device=device) for members in groups]
        sizes = curvature.block_sizes
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes**2)])
        self.q = torch.empty(int(starts[-1]), dtype=torch.float64, device=device)
        for bundle in objective.bundles:
            for k, block in enumerate(bundle.blocks):
                b = bundle.shape[1]
                Q = self.q[starts[block] : starts[block + 1]].view(b, b)
                if objective.factored:
                    torch.mm(bundle.matrices[k], bundle.matrices[k].T, out=Q)
                    Q.diagonal().add_(objective.ridge[curvature.block_slice(block)])
                else:
                    Q.copy_(bundle.matrices[k])
        first = np.repeat(curvature.offsets[:-1], sizes)
        size = np.repeat(sizes, sizes)
        row = np.repeat(starts[:-1], sizes) + (np.arange(curvature.n) - first) * size
        self.row_start = torch.tensor(row, device=device)
        self.most = max(1, _LAUNCH // (2 * int(sizes.max())))
        self.first, self.size = torch.tensor(first, device=device), torch.tensor(size, device=device)
        self.diagonal = torch.tensor(objective.problem.diagonal, device=device)

    @staticmethod
    def memory(sizes: IntArray, starts: int) -> float:
        """Bytes beyond those of the objective."""
        return 8.0 * float((sizes.astype(np.float64) ** 2).sum()) + 80.0 * float(sizes.sum()) * starts

    def walk(
        self,
        starts: torch.Tensor,
        steps: int,
        report: Callable[[FloatArray, Callable[[int], BoolArray], IntArray], bool],
    ) -> int:
        """Improve selections, bool (S, n), which change in place; returns the number of swaps.

        Parameters
        ----------
        starts : bool (S, n)
        steps : int
            At most.
        report : callable
            Called before the first step and after every one with the objectives of the selections still searched,
            a function that gives one of them as bool (n,), and the swaps of each in this step; True ends all.

        Raises
        ------
        DeviceError
            When an objective is not a number.
        """
        x = starts
        values = self._values(x)
        if report(values, partial(_selection, x), np.zeros(len(values), np.int64)):
            return 0
        total = 0
        for _ in range(steps):
            taken = self._step(x, values)
            total += int(taken.sum())
            moved = np.flatnonzero(taken)
            if moved.size < taken.size:
                x, values, taken = x[torch.tensor(moved, device=x.device)], values[moved], taken[moved]
            if moved.size:
                values = self._values(x)
            if report(values, partial(_selection, x), taken) or not moved.size:
                break
        return total

    def _values(self, x: torch.Tensor) -> FloatArray:
        values = host(self.objective.values(x))
        if not np.isfinite(values).all():
            raise DeviceError("an objective of the local search is not a number")
        return values

    def _step(self, x: torch.Tensor, values: FloatArray) -> IntArray:
        """One step of every start, in place; the swaps of each."""
        from cbs_opt.solvers.device.window_kernels import partner_costs, window_swaps

        device, n, S = x.device, int(x.shape[1]), int(x.shape[0])
        s = 2.0 * (self.objective.products(x.to(torch.float64)) + self.objective.c)
        flags = x.to(torch.int8)
        epsilon = torch.tensor([self.threshold(2.0 * float(v)) for v in values], dtype=torch.float64).to(device)
        swaps = torch.zeros(S, dtype=torch.int64, device=device)
        width = 1 << max(1, int(2 * self.rho - 1).bit_length())
        layout = (self.q, self.row_start, self.first, self.size, self.diagonal)
        for members in self.groups:
            size = int(members.numel())
            inside = flags[:, members] == 1
            p = int(inside[0].sum()) if size else 0
            if p in (0, size):
                continue
            # 0.0 turns −0.0 into 0.0, so that ties are ties whatever the sort looks at.
            alpha = torch.where(inside, self.diagonal[members] - s[:, members] + 0.0, torch.inf)
            P = members[torch.argsort(alpha, dim=1, stable=True)[:, :p]]
            cost = torch.empty(S, size, dtype=torch.float64, device=device)
            chunks = -(-size // _CHUNK)
            partner_costs[(S, chunks)](*layout, s, P, cost, n, members, size, p, CHUNK=_CHUNK)
            cost = torch.where(inside, torch.inf, cost + 0.0)
            C = members[torch.argsort(cost, dim=1, stable=True)[:, : size - p]]
            available = torch.ones(S, size - p, dtype=torch.int8, device=device)
            progress = torch.zeros(S, 2, dtype=torch.int32, device=device)
            for _ in range(0, p, self.most):
                checkpoint()
                window_swaps[(S,)](
                    *layout, s, flags, P, C, available, epsilon, swaps, progress, n, p, size - p, self.rho,
                    self.tau, self.most, WIDTH=width, CHUNK=_CHUNK, num_warps=8,
                )  # fmt: skip
                if p <= self.most or not bool(((progress[:, 0] < p) & (progress[:, 1] <= self.tau)).any()):
                    break
        x.copy_(flags == 1)
        return np.asarray(swaps.cpu().numpy())


def _selection(x: torch.Tensor, k: int) -> BoolArray:
    return np.asarray(host(x[k]), dtype=bool)
