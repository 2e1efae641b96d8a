"""The smallest entries of every row on a card, with a count for each row: by bisection, without sorting."""

from __future__ import annotations

import torch

_LARGEST = 2**31 - 1


def smallest(cost: torch.Tensor, counts: torch.Tensor, locked: torch.Tensor | None = None) -> torch.Tensor:
    """Mask of the `counts` smallest entries of every row; of equal ones the first.

    Parameters
    ----------
    cost : float32 (rows, K)
        Not negative.
    counts : int64 (rows,)
    locked : int8 (rows, K), optional
        1 is chosen first, −1 last.

    Returns
    -------
    bool (rows, K)

    Notes
    -----
    The bits of such numbers are ordered like integers: 32 passes over the entries find the threshold of every row,
    one more shares out what equals it.
    """
    keys = cost.clamp_min(0.0).contiguous().view(torch.int32)
    if locked is not None:
        keys = torch.where(locked > 0, -1, torch.where(locked < 0, _LARGEST, keys)).to(torch.int32)
    counts = counts.to(torch.int64)
    low = torch.full_like(counts, -2)  # fewer than `counts` keys are at most `low`
    high = torch.full_like(counts, _LARGEST)  # at least `counts` are at most `high`
    for _ in range(33):
        middle = (low + high) // 2
        enough = (keys <= middle[:, None].to(torch.int32)).sum(1) >= counts
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, middle)
    threshold = high[:, None].to(torch.int32)
    below = keys < threshold
    equal = keys == threshold
    left = (counts - below.sum(1))[:, None]
    return below | (equal & (equal.cumsum(1) <= left))
