"""The remaining weights of a large block after each stage of elimination: updates and removal prices."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from cbs_opt.curvature import Curvature, GradientFactor
from cbs_opt.instance import Instance
from cbs_opt.interrupt import checkpoint
from cbs_opt.typing import BoolArray, FloatArray, IntArray

_CHUNK = 4096  # weights priced at a time
_PRODUCTS = 1 << 30  # multiplications between two checkpoints


class Thinning(Protocol):
    """A block from which many weights are removed at once."""

    def prices(self, kept: IntArray) -> FloatArray:
        """Rise of the doubled loss by each removal, float64 (len(kept),)."""

    def drop(self, weights: IntArray) -> None:
        """Remove weights, by their index in the block."""


def thinning_of(instance: Instance, k: int, kept: IntArray, coupled: BoolArray) -> Thinning:
    """The pricing of removals for the curvature of block k and the number of kept weights.

    `coupled`, bool (b_k,): the weights that are coupled to another one, from `Curvature.coupled`.
    """
    factor = instance.curvature.as_factor()
    if factor is not None and factor.m < kept.size:
        return FactorThinning(instance, factor, k, kept, coupled)
    return DenseThinning(instance, instance.curvature, k)


class DenseThinning:
    """Prices by the inverse of H on the kept weights: O(q³) per stage."""

    def __init__(self, instance: Instance, curvature: Curvature, k: int) -> None:
        part = curvature.block_slice(k)
        self.curvature, self.k = curvature, k
        self.w = instance.weights[part]
        self.g = None if instance.linear is None else instance.linear[part]

    def prices(self, kept: IntArray) -> FloatArray:
        """x² / [H_KK⁻¹]_ii."""
        pruned = np.ones(self.w.size, dtype=bool)
        pruned[kept] = False
        x = self.w + self.curvature.best_update(self.k, self.w, pruned, self.g)
        return np.asarray(x[kept] ** 2 / self.curvature.conditional_inverse_diagonal(self.k, kept))

    def drop(self, weights: IntArray) -> None:
        """Nothing to do: every stage starts from scratch."""


class FactorThinning:
    """Prices through M = G_K G_Kᵀ + mλI, which loses the dropped columns: O(m² q) per stage, in float32.

    With G_K in the kept columns, [H_KK⁻¹]_ii = (1 − ‖L⁻¹G_i‖²)/λ for M = LLᵀ, and the kept weights move by
    G_Kᵀ M⁻¹ G_P w_P − (g_K − G_Kᵀ M⁻¹ G_K g_K)/λ. Prices only rank the weights, so that single precision suffices;
    M itself is kept in float64. Weights without a gradient have x and 1/λ, and take no part in this.
    """

    def __init__(
        self, instance: Instance, curvature: GradientFactor, k: int, kept: IntArray, coupled: BoolArray
    ) -> None:
        self.coupled = coupled
        kept = kept[coupled[kept]]
        part = curvature.block_slice(k)
        self.curvature, self.k = curvature, k
        self.w = instance.weights[part]
        self.g = None if instance.linear is None else instance.linear[part]
        self.G = curvature.gradients[:, part]
        self._M = np.zeros((curvature.m, curvature.m), order="F")
        self._chunk = max(1, min(_CHUNK, _PRODUCTS // curvature.m**2))
        self._add(1.0, kept)
        self._M[np.diag_indices(curvature.m)] += curvature.m * curvature.damping

    def prices(self, kept: IntArray) -> FloatArray:
        """x² / [H_KK⁻¹]_ii."""
        from scipy.linalg import cho_solve, cholesky, solve_triangular

        damping = self.curvature.damping
        L = cholesky(self._M, lower=True)
        removed = self.w.copy()
        removed[kept] = 0.0
        right = self.curvature.project(self.k, removed)
        x = self.w[kept].copy()
        if self.g is not None:
            g = np.zeros_like(self.w)
            g[kept] = self.g[kept]
            right += self.curvature.project(self.k, g) / damping
            x -= g[kept] / damping
        x += self.curvature.back_project(self.k, cho_solve((L, True), right))[kept]
        single = L.astype(np.float32)
        out = x**2 * damping
        places = np.flatnonzero(self.coupled[kept])
        for first in range(0, places.size, self._chunk):
            if first:
                checkpoint()
            piece = places[first : first + self._chunk]
            G = np.asfortranarray(self.G[:, kept[piece]], dtype=np.float32)
            half = solve_triangular(single, G, lower=True, overwrite_b=True, check_finite=False)
            left = 1.0 - np.einsum("si,si->i", half, half, dtype=np.float64)
            out[piece] /= np.maximum(left, 1e-6)
        return out

    def drop(self, weights: IntArray) -> None:
        """Take the columns of these weights out of M."""
        self._add(-1.0, weights[self.coupled[weights]])

    def _add(self, sign: float, weights: IntArray) -> None:
        """Add ±G Gᵀ of the columns of these weights to M."""
        from scipy.linalg import blas

        for first in range(0, weights.size, self._chunk):
            if first:
                checkpoint()
            G = self.curvature.factor(self.k, weights[first : first + self._chunk])
            self._M = blas.dsyrk(sign, G, beta=1.0, c=self._M, lower=1, overwrite_c=1)
