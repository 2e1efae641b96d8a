"""The selection problem in its own variables: min ½ xᵀQx + cᵀx over binary x, Q = diag(w) H diag(w)."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from cbs_opt.typing import BoolArray, FloatArray, IntArray

if TYPE_CHECKING:
    from cbs_opt.instance import Instance


class SelectionObjective:
    """CBS-S (eqs 7-9) of an instance, with c = −g∘w where there is a first-order term.

    Solvers work on this view; it forms no matrix that the curvature does not form.

    Parameters
    ----------
    instance : Instance
    """

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.curvature = instance.curvature
        self.w = instance.weights
        self.c = np.zeros(instance.n) if instance.linear is None else -instance.linear * instance.weights

    @cached_property
    def diagonal(self) -> FloatArray:
        """Q_ii = w_i² H_ii, float64 (n,)."""
        return self.w**2 * self.curvature.diagonal()

    def columns(self, k: int, index: IntArray) -> FloatArray:
        """Columns of Q of block k, float64 (b_k, len(index)); `index` counts within the block."""
        w = self.w[self.curvature.block_slice(k)]
        return np.asarray(self.curvature.columns(k, index) * w[:, None] * w[index])

    def block(self, k: int) -> FloatArray:
        """Q of block k, float64 (b_k, b_k), a copy."""
        w = self.w[self.curvature.block_slice(k)]
        return np.asarray(self.curvature.block(k) * w[:, None] * w)

    def gradient(self, x: FloatArray) -> FloatArray:
        """Qx + c, float64 (n,), for x float64 (n,)."""
        return self.w * self.curvature.matmul(self.w * x) + self.c

    def value(self, pruned: BoolArray) -> float:
        """½ xᵀQx + cᵀx at a selection, bool (n,)."""
        delta = np.where(pruned, self.w, 0.0)
        return 0.5 * self.curvature.quadratic(delta) + float(self.c[pruned].sum())
