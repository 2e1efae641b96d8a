"""How many weights a part of a problem would prune at a price, and the price at which parts meet a common budget.

Room: the core, for `blockwise` and for the layers of `solvers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cbs_opt.typing import FloatArray

_PRICES = 28
_STEPS = 80  # of bisections


@dataclass(frozen=True)
class PriceCurve:
    """Numbers of pruned weights and losses of a part over the price of a weight.

    Attributes
    ----------
    prices, counts, losses : float64 (P,)
        All increasing. Prices and losses in units of the loss; counts are estimates for the whole part.
    """

    prices: FloatArray
    counts: FloatArray
    losses: FloatArray

    def count_at(self, price: float) -> float:
        """Weights that are pruned at a price."""
        return float(np.interp(np.log(max(price, 1e-300)), np.log(self.prices), self.counts))

    def loss_at(self, count: float) -> float:
        """The loss with so many weights pruned."""
        return float(np.interp(count, self.counts, self.losses))


def price_range(costs: FloatArray) -> FloatArray | None:
    """Prices for a curve, float64 (P,), from the costs of single weights; None where all cost nothing."""
    positive = costs[costs > 0]
    if positive.size == 0:
        return None
    return np.geomspace(1e-6 * float(np.median(positive)), 1.1 * float(positive.max()), _PRICES)


def curve_of_costs(prices: FloatArray, costs: Sequence[FloatArray], share: float = 1.0) -> PriceCurve:
    """The curve of weights that cost so much at each price; `share` is that of the weights which `costs` holds."""
    counts, losses = [], []
    for price, found in zip(prices, costs, strict=True):
        going = found < price
        counts.append(float(going.sum()) / share)
        losses.append(float(found[going].sum()) / share)
    return PriceCurve(prices, np.maximum.accumulate(counts), np.maximum.accumulate(losses))


def flat_curve(weights: int) -> PriceCurve:
    """The curve of weights that cost nothing."""
    return PriceCurve(np.array([1.0, 2.0]), np.array([0.0, float(weights)]), np.zeros(2))


def counts_at_one_price(
    curves: Sequence[PriceCurve], factors: FloatArray, total: int, low: Sequence[int], high: Sequence[int]
) -> list[int]:
    """Numbers of weights to prune in each part, which sum to `total`, at one price.

    factors : (parts,), by which the losses of a part, and so its prices, differ from those of its curve. low,
    high : what each part may prune.
    """
    least = min(float(c.prices[0] * f) for c, f in zip(curves, factors, strict=True)) / 2
    most = max(float(c.prices[-1] * f) for c, f in zip(curves, factors, strict=True)) * 2

    def wanted(price: float) -> FloatArray:
        found = [c.count_at(price / f) for c, f in zip(curves, factors, strict=True)]
        return np.clip(found, low, high)

    for _ in range(_STEPS):
        price = float(np.sqrt(least * most))
        if wanted(price).sum() < total:
            least = price
        else:
            most = price
    below, above = wanted(least), wanted(most)
    span = float((above - below).sum())
    share = 0.0 if span <= 0 else float(np.clip((total - below.sum()) / span, 0, 1))
    target = below + share * (above - below)
    counts = np.clip(np.floor(target + 1e-9), low, high).astype(np.int64)
    order = np.argsort(counts - target, kind="stable")  # largest remainders first
    missing = total - int(counts.sum())
    while missing:
        step = 1 if missing > 0 else -1
        room = [k for k in order if (counts[k] < high[k] if step > 0 else counts[k] > low[k])]
        each = max(1, abs(missing) // max(1, len(room)))
        for k in room:
            free = int(high[k] - counts[k]) if step > 0 else int(counts[k] - low[k])
            moved = min(each, free, abs(missing))
            counts[k] += step * moved
            missing -= step * moved
    return [int(count) for count in counts]
