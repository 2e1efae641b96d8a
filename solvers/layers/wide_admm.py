"""ADMM for layers with many columns: one product with an explicit inverse per iteration, in pieces.

Room: layers, for `wide`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbs_opt.interrupt import checkpoint
from cbs_opt.linalg import cholesky_lower, inverse_of_cholesky
from cbs_opt.solvers.layers.problem import Layer, LayerBudget
from cbs_opt.typing import BoolArray, FloatArray

MOST_ITERATIONS = 2000
"""Of a run of ADMM."""

_WARM = 24  # iterations before an unchanged support ends the run
_FIRST_OFFER = 12  # iterations before which masks are not worth a loss
RHO = 0.1
"""The first ρ, from magnitude."""

AGAIN = 0.4
"""Of the last ρ, in a run from where the last one ended."""

_RHO_FROM = 0.2  # the first ρ from a good mask
_CHANGES, _INVERSE = 8, 1.3  # of ρ in a run, and products of as many rows as columns that one takes, roughly
_ROWS = 256  # of a product between two checkpoints

Single = NDArray[Any]
"""float32 arrays."""


class WideLayer:
    """A layer in single precision, with columns scaled to a unit diagonal of S.

    Parameters
    ----------
    layer : Layer

    Attributes
    ----------
    S : float32 (K, K)
        Unit diagonal.
    W : float32 (rows, K)
        Weights times √S_ii.
    B : float32 (rows, K)
        W S.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.norm = column_norms(layer)
        inverse = (1.0 / self.norm).astype(np.float32)
        self.S: Single = layer.hessian.astype(np.float32)
        self.S *= inverse[:, None]
        self.S *= inverse
        self.S[np.diag_indices(layer.columns)] = 1.0
        self.W: Single = (layer.weights * self.norm).astype(np.float32)
        self.B: Single = self.product(self.W)
        self.scale: Single = layer.scale.astype(np.float32)[:, None]

    def product(self, X: Single) -> Single:
        """X S, float32 (rows, K), with a checkpoint every few rows."""
        return rows_times(X, self.S)

    def losses(self, X: Single, rows: Any = slice(None)) -> FloatArray:
        """Doubled losses of scaled weights X of some rows, less the scale of the row, float64 (rows,)."""
        change = X - self.W[rows]
        return np.asarray(np.einsum("rk,rk->r", change, self.product(change), dtype=np.float64))


def is_settled(step: int, changed: int, kept: int) -> bool:
    """Whether a run of ADMM ends: after some iterations, where few of the `kept` weights change."""
    return step >= _WARM and changed <= 1e-4 * kept


def growth(changed: int, kept: int) -> float:
    """The factor by which ρ grows where the support changed in so many of the `kept` weights."""
    return 1.3 if changed >= 0.1 * kept else 1.2 if changed >= 0.005 * kept else 1.1 if changed else 1.0


def column_norms(layer: Layer) -> FloatArray:
    """√S_ii, positive, float64 (K,)."""
    return np.asarray(np.sqrt(np.maximum(np.diag(layer.hessian), 1e-300)))


def rows_times(X: Single, S: Single) -> Single:
    """X S in pieces of rows, with a checkpoint before each."""
    out = np.empty_like(X)
    for first in range(0, X.shape[0], _ROWS):
        checkpoint()
        np.matmul(X[first : first + _ROWS], S, out=out[first : first + _ROWS])
    return out


class WideAdmm:
    """Least squares with a penalty ρ, then thresholding to the budget, over all layers.

    The splitting is that of ALPS (2406.07831, algorithm 1): X = argmin ½ tr (X − W) S (X − W)ᵀ
    + ρ/2 ‖X − D + U‖², D = X + U thresholded, U ← U + X − D, with ρ growing as long as the support changes.
    Differences: (S + ρI)⁻¹ is formed by a Cholesky factorisation at every change of ρ, so that an iteration is one
    product instead of two, and no eigendecomposition is needed; ρ is held for more than three iterations if there
    is time, which leads to better masks, and lowered again for further runs; all layers share one budget; single
    precision.

    Parameters
    ----------
    layers : list of WideLayer
    budget : LayerBudget
    offer : callable
        Receives the objective of the thresholded weights, an upper bound of that of the masks, the masks, and
        these weights, scaled.
    clock : callable

    Notes
    -----
    rows · K² multiplications per iteration and K³ per change of ρ; 5 numbers per weight and 3 matrices (K, K).
    """

    def __init__(
        self,
        layers: list[WideLayer],
        budget: LayerBudget,
        offer: Callable[[float, list[BoolArray], list[Single]], object],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.layers, self.budget, self.offer, self.clock = layers, budget, offer, clock
        self.iterations = self.changes = 0
        self.seconds = self.seconds_of_changes = 0.0  # of all runs, and of the changes of ρ among that
        self._last_changes, self._seconds_of_start = _CHANGES, 0.0
        self._state: tuple[list[BoolArray], list[Single], list[Single], float]

    def run(self, hold: int, rho: float = RHO) -> tuple[list[BoolArray], list[Single]]:
        """Masks and their weights, scaled, from magnitude; ρ changes every `hold` iterations.

        Raises
        ------
        numpy.linalg.LinAlgError
            S is far from positive semidefinite.
        """
        masks = self._threshold([layer.W for layer in self.layers])
        D = [np.where(mask, np.float32(0), layer.W) for mask, layer in zip(masks, self.layers, strict=True)]
        return self._run(hold, rho, masks, D, [np.zeros_like(d) for d in D])

    def run_again(self, hold: int) -> tuple[list[BoolArray], list[Single]]:
        """A run from where the last one ended, with ρ at `AGAIN` of what it was then.

        The support is free to change again, and the answer is better than after a run from magnitude that takes as
        long: the runs together are an ADMM that may be stopped after any of them.
        """
        masks, D, U, rho = self._state
        self._state = ([], [], [], rho)  # they change in place
        for dual in U:
            dual /= np.float32(AGAIN)
        return self._run(hold, AGAIN * rho, masks, D, U)

    def start_from(self, masks: list[BoolArray], weights: list[Single]) -> None:
        """Let `run_again` start from masks with their refitted, scaled weights; O(rows · K²).

        The dual variables of pruned weights are then their gradients, those of kept weights zero.
        """
        began = self.clock()
        D, U, rho = [x.copy() for x in weights], [], _RHO_FROM / AGAIN
        for layer, mask, x in zip(self.layers, masks, weights, strict=True):
            gradient = layer.B - layer.product(x)
            gradient *= np.float32(1.0 / rho)
            gradient[~mask] = 0
            U.append(gradient)
        self._seconds_of_start = max(self.clock() - began, 1e-9)
        self._state = (masks, D, U, rho)

    def _run(
        self, hold: int, rho: float, masks: list[BoolArray], D: list[Single], U: list[Single]
    ) -> tuple[list[BoolArray], list[Single]]:
        began, layers = self.clock(), self.layers
        inverses: list[Single] = []
        changes = self.changes
        self._invert(inverses, rho)
        kept = max(1, sum(mask.size - int(mask.sum()) for mask in masks))
        before = masks
        for step in range(1, MOST_ITERATIONS + 1):
            self.iterations += 1
            for k, layer in enumerate(layers):
                right = D[k]  # becomes B + ρ (D − U)
                right -= U[k]
                right *= np.float32(rho)
                right += layer.B
                U[k] += rows_times(right, inverses[k])
            masks = self._threshold(U)
            for k, mask in enumerate(masks):
                D[k] = np.where(mask, np.float32(0), U[k])
                U[k] -= D[k]
            if step % hold:
                continue
            changed = sum(int((mask != old).sum()) for mask, old in zip(masks, before, strict=True))
            before = masks
            if step >= _FIRST_OFFER:
                self.offer(self.objective(D), masks, D)
            if is_settled(step, changed, kept):
                break
            if (factor := growth(changed, kept)) > 1:
                rho *= factor
                for dual in U:
                    dual /= np.float32(factor)
                self._invert(inverses, rho)
        self.seconds += self.clock() - began
        self._last_changes = self.changes - changes
        self._state = (masks, D, U, rho)
        return masks, [d.copy() for d in D]

    def _invert(self, inverses: list[Single], rho: float) -> None:
        """Replace the list by (S + ρI)⁻¹ of every layer, one at a time to save memory."""
        began = self.clock()
        inverses.clear()
        inverses += (_shifted_inverse(layer.S, rho) for layer in self.layers)
        self.changes += 1
        self.seconds_of_changes += self.clock() - began

    @property
    def seconds_of_iteration(self) -> float:
        """Of one iteration, without the changes of ρ."""
        if not self.iterations:
            return self._seconds_of_start
        return max(self.seconds - self.seconds_of_changes, 1e-9) / self.iterations

    def affordable(self, seconds: float) -> float:
        """Iterations between two changes of ρ that another run, of that many seconds, has time for."""
        if self.changes:
            change = self.seconds_of_changes / self.changes
        else:
            shapes = [layer.W.shape for layer in self.layers]
            change = _INVERSE * sum(K**3 for _, K in shapes) / sum(rows * K**2 for rows, K in shapes)
            change *= self.seconds_of_iteration
        return (seconds / self._last_changes - change) / self.seconds_of_iteration

    def objective(self, X: list[Single]) -> float:
        """½ Σ s_r (x − w)ᵀ S (x − w) of scaled weights."""
        pairs = zip(self.layers, X, strict=True)
        return 0.5 * sum(float(layer.layer.scale @ layer.losses(x)) for layer, x in pairs)

    def _threshold(self, Z: list[Single]) -> list[BoolArray]:
        checkpoint()
        layers = [layer.layer for layer in self.layers]
        return self.budget.cheapest(layers, [layer.scale * z * z for layer, z in zip(self.layers, Z, strict=True)])


def _shifted_inverse(S: Single, rho: float) -> Single:
    """(S + ρI)⁻¹, float32 (K, K)."""
    shifted = S.copy()
    shifted[np.diag_indices(S.shape[0])] += np.float32(rho)
    factor = cholesky_lower(shifted)
    if factor is None:
        raise np.linalg.LinAlgError("a stored Hessian is not positive semidefinite")
    return inverse_of_cholesky(factor)
