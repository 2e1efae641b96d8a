"""Algorithm 2 on a card: many random selections at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cbs_opt.typing import BoolArray, FloatArray, IntArray


@dataclass(frozen=True)
class _Group:
    """Weights under one budget: sorted by magnitude, in B buckets of at most `width` weights."""

    members: torch.Tensor
    p: int
    B: int
    width: int


class DeviceDraws:
    """Random selections: every group is split at random into B buckets, each pruned by magnitude at the same rate.

    The method is that of `cbs_opt.solvers.paper.rmp.Draws`; the random numbers are those of torch on the device.

    Parameters
    ----------
    magnitude : float64 (n,)
    always : bool (n,)
        Pruned in every selection.
    groups : sequence of (int64 (size,), int)
        Weights that are free, and how many of them to prune.
    buckets : int, optional
        B; max(1, min(⌊√size⌋, 1000)) without it.
    seed : int
    device : torch.device
    """

    def __init__(
        self,
        magnitude: FloatArray,
        always: BoolArray,
        groups: Sequence[tuple[IntArray, int]],
        buckets: int | None,
        seed: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self.always = torch.tensor(always, device=device)
        self.generator = torch.Generator(device)
        self.generator.manual_seed(seed)
        self.groups = []
        for members, p in groups:
            size = int(members.size)
            if p and size:
                B = max(1, min(buckets or min(int(np.sqrt(size)), 1000), size))
                order = members[np.argsort(magnitude[members], kind="stable")]
                self.groups.append(_Group(torch.tensor(order, device=device), int(p), B, -(-size // B)))

    def draw(self, count: int) -> torch.Tensor:
        """Selections, bool (count, n); O(n log n) each."""
        pruned = self.always.repeat(count, 1)
        for group in self.groups:
            pruned[:, group.members] = self._pruned(group, count)
        return pruned

    def _pruned(self, group: _Group, count: int) -> torch.Tensor:
        """Which members are pruned, bool (count, size), in the order of magnitude."""
        device, size, B = self.device, int(group.members.numel()), group.B
        keys = torch.rand(count, size, generator=self.generator, device=device)
        # Position s of a random order lies in bucket s B // size.
        permutation = torch.argsort(keys, dim=1)
        bucket = torch.arange(size, device=device) * B // size
        sizes = torch.bincount(bucket, minlength=B)
        quota = (sizes * group.p // size).repeat(count, 1)
        left = group.p - int(quota[0].sum())
        if left:  # what rounding leaves goes to random buckets with room
            lots = torch.rand(count, B, generator=self.generator, device=device)
            lots[quota >= sizes] = 2.0
            chosen = torch.argsort(lots, dim=1)[:, :left]
            quota.scatter_add_(1, chosen, torch.ones_like(chosen))
        # Buckets as rows of equal width; the rank by magnitude is the number of the member, so a sort of integers.
        first = torch.cumsum(sizes, 0) - sizes
        slot = bucket * group.width + torch.arange(size, device=device) - first[bucket]
        table = torch.full((count, B * group.width), size, dtype=torch.int32, device=device)
        table[:, slot] = permutation.to(torch.int32)
        ranked = torch.sort(table.view(count, B, group.width), dim=2).values
        take = torch.arange(group.width, device=device) < quota[:, :, None]
        chosen = torch.where(take, ranked, size).view(count, -1).to(torch.int64)
        out = torch.zeros(count, size + 1, dtype=torch.bool, device=device)
        out.scatter_(1, chosen, True)  # what is not taken falls on the column that is cut off
        return out[:, :size]
