"""How many weights a layer would prune at a price, and the one price at which layers meet a common budget.

Room: layers, for `distributed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cbs_opt.solvers.layers.problem import Layer
from cbs_opt.solvers.layers.starts import PricedSweep
from cbs_opt.typing import FloatArray

_PRICES = 28
_SAMPLE = 64  # rows that are swept
_STEPS = 80  # of bisections


@dataclass(frozen=True)
class PriceCurve:
    """Numbers of pruned weights and losses of a layer over the price of a weight.

    Attributes
    ----------
    prices, counts, losses : float64 (P,)
        All increasing. Prices and losses in units of the loss; counts are estimates for the whole layer.
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


def curve_of(layer: Layer, objective: str) -> PriceCurve:
    """The curve of a layer, from a sample of its rows.

    For the joint objective by `PricedSweep` at every price, O(K³) and 28 passes over 64 rows; for fixed weights
    from the costs w² H_ii of single weights.

    Raises
    ------
    numpy.linalg.LinAlgError
        Where S is singular and the objective is joint.
    """
    sample = slice(None, None, max(1, layer.rows // _SAMPLE))
    rows = layer.weights[sample]
    of_all = layer.weights.size / rows.size
    single = 0.5 * layer.scale[sample, None] * rows**2 * np.diag(layer.hessian)
    positive = single[single > 0]
    if positive.size == 0:
        return PriceCurve(np.array([1.0, 2.0]), np.array([0.0, float(layer.weights.size)]), np.zeros(2))
    largest, middle = float(positive.max()), float(np.median(positive))
    prices = np.geomspace(1e-6 * middle, 1.1 * largest, _PRICES)
    counts, losses = [], []
    sweep = PricedSweep(layer) if objective == "joint" else None
    for price in prices:
        costs = single if sweep is None else 0.5 * sweep.costs(2 * price, sample)[0]
        going = costs < price
        counts.append(of_all * float(going.sum()))
        losses.append(of_all * float(costs[going].sum()))
    return PriceCurve(prices, np.maximum.accumulate(counts), np.maximum.accumulate(losses))


def counts_at_one_price(
    curves: Sequence[PriceCurve], factors: FloatArray, total: int, low: Sequence[int], high: Sequence[int]
) -> list[int]:
    """Numbers of weights to prune in each layer, which sum to `total`, at one price.

    factors : (layers,), by which the losses of a layer, and so its prices, differ from those of its curve. low,
    high : what each layer may prune.
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
