"""All swaps of a pruned and a kept weight on a card, in passes over all pairs.

Room: device; `paper.on_card` uses it. The CPU's version is `cbs_opt.solvers.paper.all_swaps`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from cbs_opt.interrupt import checkpoint
from cbs_opt.solvers.device.local_search import DeviceLocalSearch
from cbs_opt.solvers.device.objective import host
from cbs_opt.typing import BoolArray, FloatArray

_PAIRS = 1 << 24  # looked at together
_TOGETHER = 256  # of the best pairs of a pass that are swapped one after the other
_LONGER = 1 + 1e-9  # for rounding in the bounds of products


class AllPairs:
    """Swaps until none of all pairs within a group gains.

    A pass finds the best partner of every pruned weight. The best of these pairs are then swapped one after the
    other, with gains that follow from the entries of Q among them; gradients are computed anew after each pass.

    Parameters
    ----------
    search : DeviceLocalSearch
        Whose Q and groups are used.
    share : float
        Smallest improvement that counts, relative to the objective.

    Notes
    -----
    A pass reads Q_ij of all pairs that the bound |Q_ij| ≤ √(Q_ii Q_jj) does not exclude.
    """

    def __init__(self, search: DeviceLocalSearch, share: float) -> None:
        self.search, self.share, self.objective = search, share, search.objective
        self.root = _LONGER * search.diagonal.clamp_min(0.0).sqrt()

    def improve(
        self, x: torch.Tensor, should_stop: Callable[[], bool], report: Callable[[float, BoolArray], object]
    ) -> int:
        """Improve a selection, bool (n,), in place; the number of swaps.

        Parameters
        ----------
        x : bool (n,)
        should_stop : callable
            Asked before every pass; True may leave a swap that gains.
        report : callable
            Called with the objective and the selection, bool (n,), after every pass.
        """
        swaps, value = 0, self._value(x)
        while not should_stop():
            least = self.share * max(abs(2.0 * value), 1e-300)
            made = self._pass(x, least)
            if not made:
                break
            swaps += made
            value = self._value(x)
            report(value, np.asarray(host(x), dtype=bool))
        return swaps

    def _value(self, x: torch.Tensor) -> float:
        return float(self.objective.values(x[None])[0])

    def _pass(self, x: torch.Tensor, least: float) -> int:
        """One pass over all pairs, applied to x; the swaps made."""
        s = 2.0 * (self.objective.products(x[None].to(torch.float64))[0] + self.objective.c)
        found = [
            (*pairs, torch.full_like(pairs[1], g))
            for g, members in enumerate(self.search.groups)
            if (pairs := self._pairs(x, s, members, least)) is not None
        ]
        if not found:
            return 0
        gain, left, right, group = (torch.cat(parts) for parts in zip(*found, strict=True))
        best = torch.topk(gain, min(_TOGETHER, int(gain.numel()))).indices
        left, right = left[best], right[best]
        group_of = dict(zip(host(right).astype(int).tolist(), host(group[best]).tolist(), strict=True))
        right = torch.unique(right)
        alpha = host(s[left] - self.search.diagonal[left])
        beta = host(s[right] + self.search.diagonal[right])
        entries = [host(self._entries(*sides)) for sides in ((left, left), (left, right), (right, right))]
        groups = np.array([group_of[j] for j in host(right).astype(int).tolist()])
        allowed = host(group[best])[:, None] == groups
        made = _in_turn(alpha, beta, entries, allowed, least)
        for side, value in ((left, False), (right, True)):
            at = torch.tensor([pair[int(value)] for pair in made], dtype=torch.int64, device=x.device)
            x[side[at]] = value
        return len(made)

    def _pairs(
        self, x: torch.Tensor, s: torch.Tensor, members: torch.Tensor, least: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Gains, pruned weights and their best partners in a group, of pairs that gain more than `least`."""
        diagonal, inside = self.search.diagonal, x[members]
        P, C = members[inside], members[~inside]
        if not P.numel() or not C.numel():
            return None
        alpha, beta = s[P] - diagonal[P], s[C] + diagonal[C]
        hope = alpha - beta.min() + 2.0 * self.root[P] * self.root[C].max()
        P, alpha = P[hope > least], alpha[hope > least]
        size = max(1, _PAIRS // int(C.numel()))
        found = []
        for first in range(0, int(P.numel()), size):
            checkpoint()
            part = slice(first, first + size)
            gain, at = (alpha[part, None] - beta + 2.0 * self._entries(P[part], C)).max(1)
            gains = gain > least
            found.append((gain[gains], P[part][gains], C[at[gains]]))
        parts = [torch.cat(parts) for parts in zip(*found, strict=True)] if found else []
        return (parts[0], parts[1], parts[2]) if parts and parts[0].numel() else None

    def _entries(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Q_ij, float64 (rows, columns); zero between blocks."""
        first = self.search.first
        same = first[rows][:, None] == first[columns]
        at = (self.search.row_start[rows] - first[rows])[:, None] + columns
        return torch.where(same, self.search.q[torch.where(same, at, 0)], 0.0)


def _in_turn(
    alpha: FloatArray,
    beta: FloatArray,
    entries: Sequence[FloatArray],
    allowed: BoolArray,
    least: float,
) -> list[tuple[int, int]]:
    """The best pair again and again, each weight once, while it gains more than `least`.

    alpha (I,), beta (J,): what a swap gains and costs before its own entry of Q; entries: Q within I, between I
    and J, and within J.
    """
    within, between, beyond = entries
    made: list[tuple[int, int]] = []
    while True:
        gains = np.where(allowed, alpha[:, None] - beta + 2.0 * between, -np.inf)
        i, j = divmod(int(np.argmax(gains)), beta.size)
        if not gains[i, j] > least:
            return made
        made.append((i, j))
        alpha = alpha + 2.0 * (between[:, j] - within[:, i])
        beta = beta + 2.0 * (beyond[:, j] - between[i])
        allowed[i], allowed[:, j] = False, False
