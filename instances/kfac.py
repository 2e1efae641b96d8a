"""Kronecker-factored curvature, row by row: H_r = E[g_r²] · (XXᵀ/m + λI).

K-FAC [1]_ takes the Fisher matrix of a layer with inputs x and gradients g at its outputs for E[ggᵀ] ⊗ E[xxᵀ], as
if g and x were independent; with several places, those of a convolution [2]_ or the steps of a sequence, for
(mean of ggᵀ over samples and places) ⊗ (sum of xxᵀ over places, mean over samples). Here the diagonal of ggᵀ is
kept: rows are not coupled, and all rows of a layer share the second factor.

E[g_r²] is a mean over samples. Where few of them say anything about a row, as about a class that hardly one of
them shows, it is uncertain, and often all but zero: such rows would be pruned first, whatever they do for other
samples. The means of rows with the same inputs are therefore drawn towards their own mean, by the share of their
variance over the rows that their sampling errors explain, the linear empirical Bayes estimate [3]_.

.. [1] Martens, Grosse: Optimizing Neural Networks with Kronecker-factored Approximate Curvature, ICML 2015.
.. [2] Grosse, Martens: A Kronecker-factored approximate Fisher matrix for convolution layers, ICML 2016.
.. [3] Efron, Morris: Stein's estimation rule and its competitors, Journal of the American Statistical Association,
   1973.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cbs_opt.instances.output_gradients import RowGradients
from cbs_opt.instances.reconstruction import LayerCovariance
from cbs_opt.typing import FloatArray

logger = logging.getLogger("cbs_opt")

_SMALLEST = 1e-12  # factor of a row relative to the largest of all rows


def factored(
    layers: Sequence[LayerCovariance], gradients: Mapping[str, RowGradients], *, dense: bool = True
) -> tuple[list[LayerCovariance], dict[str, FloatArray]]:
    """The factor of every row, and what is left of its Hessian.

    Parameters
    ----------
    layers : sequence of LayerCovariance
    gradients : mapping of str to RowGradients
        By the names of the layers.
    dense : bool
        Whether nothing of the network is pruned yet: then the log names layers that have no gradient, as others
        may have lost theirs with the layers behind them.

    Returns
    -------
    layers : list of LayerCovariance
        Their `shifts` are those of the Hessians divided by the factor of the row.
    factors : dict of str to float64 (rows,)
        The estimate of E[g_r²], positive. Rows whose outputs the loss does not depend on get 1e-12 of the largest;
        the log says so.
        Tensors that are looked up only have no factor of their own: the largest.
    """
    largest = max((float(g.squares.max(initial=0.0)) for g in gradients.values()), default=0.0)
    if largest == 0.0:
        logger.log(
            logging.WARNING if dense else logging.DEBUG,
            "ALL GRADIENTS ARE ZERO: all rows count the same; check the loss, or take `--fisher sampled` or exact",
        )
        largest = 1.0
        gradients = {name: replace(g, squares=np.ones_like(g.squares)) for name, g in gradients.items()}
    out, factors = [], {}
    for layer in layers:
        g = gradients[layer.name]
        looked_up = not g.places.any()
        squares = np.full_like(g.squares, largest) if looked_up else g.squares.copy()
        if not looked_up:
            for r in layer.ranges:
                part = slice(r.first, r.last)
                squares[part] = shrunken(g.squares[part], g.variances[part])
        without = int((squares == 0).sum())
        if without == squares.size:
            logger.log(
                logging.WARNING if dense else logging.DEBUG,
                f"{layer.name}: the loss has no gradient by its outputs, as behind `detach`, a choice such as "
                "argmax or weights that are zero: its weights are pruned first; --exclude (from Python "
                "`exclude=`) keeps them",
            )
        elif without:
            logger.log(
                logging.INFO if dense else logging.DEBUG,
                f"{layer.name}: the loss does not depend on the outputs of {without} of {squares.size} rows: "
                f"their curvature is set to {_SMALLEST:g} of the largest",
            )
        factors[layer.name] = factor = np.maximum(squares, _SMALLEST * largest)
        shifts = g.shifts / factor
        ranges = tuple(
            r if r.shifts is None else replace(r, shifts=shifts[r.first : r.last]) for r in layer.ranges
        )
        out.append(replace(layer, ranges=ranges))
    return out, factors


def shrunken(means: FloatArray, variances: FloatArray) -> FloatArray:
    """Estimates of expectations from their sample means, drawn towards the mean of these.

    Parameters
    ----------
    means : float64 (rows,)
        At least 0. Zeros stay and take no part: the loss does not depend on such rows.
    variances : float64 (rows,)
        Of the sample means.

    Returns
    -------
    float64 (rows,)
        λ times the mean of all plus 1 − λ times each, λ the mean variance divided by the variance over the rows,
        at most 1.
    """
    out = means.copy()
    used = means > 0
    if used.sum() < 2:
        return out
    values = means[used]
    spread, centre = float(values.var(ddof=1)), float(values.mean())
    share = min(1.0, float(variances[used].mean()) / spread) if spread > 0 else 0.0
    out[used] = share * centre + (1.0 - share) * values
    return out
