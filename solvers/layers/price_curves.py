"""How many weights a layer would prune at a price.

Room: layers, for `distributed`.
"""

from __future__ import annotations

import numpy as np

from cbs_opt.price_curves import PriceCurve, curve_of_costs, flat_curve, price_range
from cbs_opt.solvers.layers.problem import Layer
from cbs_opt.solvers.layers.starts import PricedSweep

_SAMPLE = 64  # rows that are swept


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
    single = 0.5 * layer.scale[sample, None] * rows**2 * np.diag(layer.hessian)
    prices = price_range(single)
    if prices is None:
        return flat_curve(layer.weights.size)
    sweep = PricedSweep(layer) if objective == "joint" else None
    costs = [single if sweep is None else 0.5 * sweep.costs(2 * price, sample)[0] for price in prices]
    return curve_of_costs(prices, costs, rows.size / layer.weights.size)
