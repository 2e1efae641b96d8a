"""Tabu search over all variables of one large block on a card, from kicked copies of a point.

Room: selection; `device_search` uses it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from cbs_opt.device import Card
from cbs_opt.solvers.device.dense import LONGEST_TENURE, DenseTabu
from cbs_opt.solvers.device.lanes import LARGEST
from cbs_opt.solvers.problem.selection_problem import SelectionProblem
from cbs_opt.solvers.selection.device_columns import DeviceColumns, DeviceIncumbent
from cbs_opt.solvers.selection.incumbent import GAIN

_LARGEST_DENSE = 100_000  # variables of a block whose Q is formed
_STARTS = 64
_STEPS = 2048
_KICK = (0, 48)  # exchanges that a start begins with
_NOISE = 0.7  # log-normal, of the costs by which they are chosen
_SHARE = 0.7  # of the free memory for Q and all starts


class Roaming:
    """`DenseTabu` on the only coupled block of a problem.

    Parameters
    ----------
    problem : SelectionProblem
    there : DeviceColumns
    block : int
    card : Card
    generator : torch.Generator
    """

    def __init__(
        self, problem: SelectionProblem, there: DeviceColumns, block: int, card: Card, generator: torch.Generator
    ) -> None:
        self.problem, self.there, self.generator = problem, there, generator
        self.device = card.device
        start = int(problem.columns.starts[block])
        self.n = problem.columns.blocks[block].size
        self.at = np.arange(start, start + self.n)
        self.padded = -(-self.n // 16) * 16  # at which rows are read fastest
        self.q = there.dense(block, self.padded)
        self.linear = np.zeros(self.padded)
        self.linear[: self.n] = problem.linear[self.at]
        emulated = card.torch_name == "cpu"
        self.starts, self.steps = (2, 32) if emulated else (_STARTS, _STEPS)
        self.drift = 0.0

    @staticmethod
    def fits(sizes: list[int], card: Card) -> bool:
        """Whether there is one block, too large for a lane, whose Q fits in float32."""
        if len(sizes) != 1 or not LARGEST < sizes[0] <= _LARGEST_DENSE:
            return False
        return 4.0 * sizes[0] ** 2 + 60.0 * sizes[0] * _STARTS <= _SHARE * card.free_bytes()

    def improve(self, point: DeviceIncumbent, should_stop: Callable[[], bool]) -> int:
        """Some thousand steps of all starts; the point changes if it gains. Returns the steps."""
        y = torch.zeros(self.padded, dtype=torch.bool, device=self.device)
        y[: self.n] = self.there.tensor(point.y[self.at]) > 0.5
        h = self.there.tensor(point.g[self.at] + self.problem.linear[self.at])
        cost = torch.zeros(self.padded, dtype=torch.float32, device=self.device)
        cost[: self.n] = 0.5 * self.there.diagonal[self.there.tensor(self.at)] + torch.where(y[: self.n], -h, h)
        seeds = torch.randint(1, 1 << 62, (self.starts,), generator=self.generator, device=self.device)
        tenure = torch.randint(4, LONGEST_TENURE, (self.starts,), generator=self.generator, device=self.device)
        still = torch.arange(self.padded, device=self.device) >= self.n
        search = DenseTabu(
            self.q, self.there.tensor(self.linear), self._kicked(y, cost), seeds, tenure, self.steps, still
        )
        made = search.run(should_stop)
        self.drift = max(self.drift, search.drift)
        best = search.best[int(search.objectives.argmin()), : self.n]
        found = DeviceIncumbent(self.problem, point.y.copy(), self.there)
        found.move(self.at, best.cpu().numpy().astype(np.float64))
        if found.f < point.f - GAIN * abs(point.f):
            point.y, point.g, point.f = found.y, found.g, found.f
        return made

    def _kicked(self, y: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
        """Copies of a point, bool (S, n); in all but the first some cheap variables have changed places."""
        S, inside = self.starts, torch.arange(self.padded, device=self.device) < self.n
        starts = y.repeat(S, 1)
        noise = torch.randn((S, self.padded), generator=self.generator, device=self.device)
        kick = torch.randint(*_KICK, (S, 1), generator=self.generator, device=self.device)
        kick[0] = 0
        few = min(_KICK[1], int(y.sum()), self.n - int(y.sum()))
        number = torch.arange(few, device=self.device)
        for side in (y, ~y & inside):
            # Costs may be negative: those that gain come first.
            noisy = torch.where(cost > 0, cost * torch.exp(_NOISE * noise), cost * torch.exp(-_NOISE * noise))
            cheap = torch.argsort(torch.where(side, noisy, torch.inf), dim=1)[:, :few]
            starts ^= torch.zeros_like(starts).scatter_(1, cheap, number < kick)
        return starts
