"""Quick starts for all rows at once: a priced sweep over the columns, and ADMM with thresholding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.linalg import lapack

from cbs_opt.linalg import inverse_pd
from cbs_opt.solvers.layers.problem import Layer, LayerBudget
from cbs_opt.solvers.layers.start_kernels import decide_block
from cbs_opt.typing import BoolArray, FloatArray

_BLOCK = 64  # columns between two matrix products of a sweep
_SAMPLE = 64  # rows of a layer on which the price is found
_TOLERANCE = 0.01  # relative error of the number pruned at which the price is good enough
_EVERY = 3  # iterations of ADMM between two changes of ρ
_WARM = 24  # iterations before an unchanged support ends ADMM


def _no() -> bool:
    return False


class PricedSweep:
    """One pass over the columns of a layer that prunes every weight whose removal costs less than a price.

    As in SparseGPT, the columns are decided in one fixed order and the columns that come later make up for what is
    removed, so that the rows share one Cholesky factor U of S⁻¹ and a pass costs rows × K². Unlike there, the
    price of a weight is one number for all columns, blocks and rows (which settles the budget), and the columns
    go in increasing order of S_ii, so that the heavy ones are left to make up.

    Raises
    ------
    numpy.linalg.LinAlgError
        Where S is singular.
    """

    def __init__(self, layer: Layer) -> None:
        self.order = np.argsort(np.diag(layer.hessian), kind="stable")
        inverse = inverse_pd(layer.hessian[np.ix_(self.order, self.order)])
        if inverse is None:
            raise np.linalg.LinAlgError("a stored Hessian is singular: a larger damping is needed")
        self.U = np.ascontiguousarray(np.triu(lapack.dpotrf(inverse, lower=0)[0]))
        self.W = np.ascontiguousarray(layer.weights[:, self.order])
        self.scale = layer.scale
        locked = np.zeros(self.W.shape, dtype=np.int8) if layer.locked is None else layer.locked[:, self.order]
        self.locked = np.ascontiguousarray(locked)

    def costs(self, price: float, rows: slice = slice(None)) -> tuple[FloatArray, FloatArray]:
        """Cost of removing each weight when its column comes, and the weights after the pass.

        Costs are scale × doubled loss. Both float64 (rows, K), in the order of the sweep.
        """
        W, scale, locked = self.W[rows].copy(), self.scale[rows].copy(), self.locked[rows].copy()
        K = W.shape[1]
        out = np.empty_like(W)
        for start in range(0, K, _BLOCK):
            stop = min(start + _BLOCK, K)
            errors = np.empty((W.shape[0], stop - start))
            inner = np.ascontiguousarray(self.U[start:stop, start:stop])
            decide_block(W, start, inner, price, scale, locked, out, errors)
            W[:, stop:] -= errors @ self.U[start:stop, stop:]
        return out, W

    def unsorted(self, values: FloatArray) -> FloatArray:
        """Values in the layer's own order of columns, (rows, K)."""
        out = np.empty_like(values)
        out[:, self.order] = values
        return out


def swept_weights(
    layers: list[Layer], budget: LayerBudget, should_stop: Callable[[], bool] = _no
) -> tuple[list[BoolArray], list[FloatArray]] | None:
    """Masks from one pass over each layer, at the price that fits the budget, and their weights; None if stopped.

    The price is found on a sample of rows. With budgets for rows or N:M the price is that of their total number,
    and the weights with the least costs within each group go. The weights are those of the pass and fit the masks;
    they are near the best, but no refit. O(K³) per layer, then rows × K² per pass.
    """
    sweeps = []
    for layer in layers:
        sweeps.append(PricedSweep(layer))
        if should_stop():
            return None
    if budget.total is not None:
        number = budget.total
    elif budget.per_row is not None:
        number = int(sum(int(np.sum(counts)) for counts in budget.per_row))
    else:
        assert budget.pattern is not None
        number = round(sum(layer.weights.size for layer in layers) * budget.pattern[0] / budget.pattern[1])
    samples = [slice(None, None, max(1, layer.rows // _SAMPLE)) for layer in layers]
    share = number / max(1, sum(layer.weights.size for layer in layers))
    weight = np.concatenate(
        [np.full(s.W[p].size, s.W.size / max(1, s.W[p].size)) for s, p in zip(sweeps, samples, strict=True)]
    )
    price = np.inf if share >= 1 else -np.inf
    if 0 < share < 1:
        first = [s.scale[p, None] * (s.W[p] / np.diag(s.U)) ** 2 for s, p in zip(sweeps, samples, strict=True)]
        price = _quantile(np.concatenate([c.ravel() for c in first]), weight, share)
        for _ in range(6):
            costs = np.concatenate([s.costs(price, p)[0].ravel() for s, p in zip(sweeps, samples, strict=True)])
            pruned = float(weight[costs < price].sum() / weight.sum())
            if abs(pruned - share) <= _TOLERANCE * share:
                break
            price = _quantile(costs, weight, share)
            if should_stop():
                return None
    found = [sweep.costs(price) for sweep in sweeps]
    masks = budget.cheapest(layers, [s.unsorted(costs) for s, (costs, _) in zip(sweeps, found, strict=True)])
    weights = [s.unsorted(W) for s, (_, W) in zip(sweeps, found, strict=True)]
    for W, mask in zip(weights, masks, strict=True):
        W[mask] = 0.0
    return masks, weights


def _quantile(values: FloatArray, weight: FloatArray, share: float) -> float:
    order = np.argsort(values)
    reached = np.cumsum(weight[order])
    return float(values[order[min(int(np.searchsorted(reached, share * reached[-1])), values.size - 1)]])


def admm(
    layers: list[Layer],
    budget: LayerBudget,
    kind: Any = np.float32,
    iterations: int = 200,
    rho: float = 0.1,
    should_stop: Callable[[], bool] = _no,
) -> list[BoolArray] | None:
    """Masks by ADMM on unit-diagonal Hessians: least squares by one eigendecomposition, then thresholding.

    The scheme of ALPS (2406.07831, algorithm 1), where ρ grows with the changes of the support; here in float32,
    with the rows' scales in the thresholds, and over several layers under one budget. None if stopped. Memory
    8 numbers per weight; O(K³) per layer, then 4 rows K² operations per iteration.
    """
    state = []
    for layer in layers:
        norm = np.sqrt(np.maximum(np.diag(layer.hessian), 1e-300))
        values, Q = np.linalg.eigh((layer.hessian / norm[:, None] / norm).astype(kind))
        D = (layer.weights * norm).astype(kind)
        rotated = D @ Q * np.maximum(values, 0)  # the right-hand side V G in the eigenbasis
        state.append((np.maximum(values, 0), Q, rotated, D, np.zeros_like(D)))
        if should_stop():
            return None
    weigh = [layer.scale.astype(kind)[:, None] for layer in layers]
    masks = budget.cheapest(layers, [s * D**2 for s, (*_, D, _) in zip(weigh, state, strict=True)])
    for mask, (*_, D, _) in zip(masks, state, strict=True):
        D[mask] = 0
    total = sum(mask.size for mask in masks) - sum(int(mask.sum()) for mask in masks)
    before = [mask.copy() for mask in masks]
    for step in range(iterations):
        for values, Q, rotated, D, dual in state:
            right = (rho * D - dual) @ Q
            right += rotated
            right /= values + kind(rho)
            X = right @ Q.T
            dual += kind(rho) * X  # X + dual/ρ is then dual/ρ
            np.divide(dual, kind(rho), out=D)
            if should_stop():
                return None
        masks = budget.cheapest(layers, [s * D**2 for s, (*_, D, _) in zip(weigh, state, strict=True)])
        for mask, (*_, D, dual) in zip(masks, state, strict=True):
            D[mask] = 0
            dual -= kind(rho) * D
        if (step + 1) % _EVERY == 0:
            changed = sum(int((mask != old).sum()) for mask, old in zip(masks, before, strict=True))
            before = [mask.copy() for mask in masks]
            if changed >= 0.1 * total:
                rho *= 1.3
            elif changed >= 0.005 * total:
                rho *= 1.2
            elif changed:
                rho *= 1.1
            if step + 1 >= _WARM and changed <= 1e-4 * total:
                break
    return masks
