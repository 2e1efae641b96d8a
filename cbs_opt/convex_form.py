"""An indefinite selection problem as a convex one with the same loss of every selection.

Room: core; `run` applies it before a solver starts, and `certificate` before a proof is checked.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from cbs_opt.curvature import HessianBlocks
from cbs_opt.errors import SolverError
from cbs_opt.instance import Instance
from cbs_opt.linalg import is_positive
from cbs_opt.memory import require_bytes
from cbs_opt.typing import FloatArray

_NEWTON_LIMIT = 1200
"""Weights of a block up to which the shift is fitted; beyond, it is a multiple of the identity."""

_STEPS = 40  # Newton steps at most
_CLOSE = 1e-3  # smallest barrier weight, in units of the most negative eigenvalue


def convex_form(instance: Instance) -> Instance:
    """An instance with positive semidefinite H whose selection loss is the same for every selection.

    A selection is binary, so that y_i² = y_i: with Q = diag(w) H diag(w),

        ½ yᵀQy + cᵀy = ½ yᵀ(Q + D)y + (c − d/2)ᵀy,   D = diag(d).

    The shift d is close to the one of least sum among those that make Q + D positive semidefinite, which loses
    least at y = ½ (the QCR method of Billionnet, Elloumi and Plateau, without the equations). It is rounded to a
    coarse grid, so that other machines find the same one.

    Parameters
    ----------
    instance : Instance

    Returns
    -------
    Instance
        The instance itself where H is positive semidefinite; else one with a first-order term.

    Notes
    -----
    O(b³) time per indefinite block of b weights, times about twenty up to 1200 weights. The joint loss is another
    one: it has no minimum for an indefinite H.
    """
    curvature = instance.curvature
    if curvature.is_convex:
        return instance
    require_bytes(
        16.0 * float((curvature.block_sizes.astype(np.float64) ** 2).sum()), "a convex form of all blocks"
    )
    w = instance.weights
    linear = np.zeros(instance.n) if instance.linear is None else instance.linear.copy()
    blocks = []
    for k in range(curvature.number_of_blocks):
        H, part = curvature.block(k), curvature.block_slice(k)
        if k not in curvature.indefinite_blocks:
            blocks.append(H)
            continue
        own = w[part]
        moved = own != 0
        Q = H * own[:, None] * own
        d = np.zeros(own.size)
        d[moved] = convex_shift(Q[np.ix_(moved, moved)])
        with np.errstate(divide="ignore", invalid="ignore"):
            lift = np.where(moved, d / own**2, 0.0)
            linear[part] += np.where(moved, 0.5 * d / own, 0.0)  # a step by −w gains −½ d
        # Weights that are zero cost nothing, with or without their row.
        blocks.append(np.where(moved[:, None] & moved, H, 0.0) + np.diag(lift))
    convex = HessianBlocks.from_blocks(blocks)
    if not convex.is_convex or not np.isfinite(linear).all():
        raise SolverError(
            "the indefinite Hessian cannot be made convex in float64: rescale the weights or the Hessian"
        )
    return replace(instance, curvature=convex, linear=linear)


def convex_shift(Q: FloatArray) -> FloatArray:
    """A diagonal d, float64 (b,), with Q + diag(d) positive semidefinite and a small sum; O(b³)."""
    b = Q.shape[0]
    if b == 0:
        return np.zeros(0)
    least = float(np.linalg.eigvalsh(Q)[0])
    largest = float(np.abs(Q).max())
    if least >= 0:
        return np.zeros(b)
    # The grid is a power of two: sums of its multiples are exact.
    grid = 2.0 ** math.floor(math.log2(max(-least, 1e-12 * largest)) - 14)
    fitted = _least_sum(Q, -least) if b <= _NEWTON_LIMIT else None
    for d in (fitted, np.full(b, -least)):
        if d is not None:
            rounded: FloatArray = grid * (np.floor(d / grid) + 1.0)
            if is_positive(Q + np.diag(rounded), definite=False, precision=1e-17):
                return rounded
    return np.full(b, -least + 1e-9 * largest)


def _least_sum(Q: FloatArray, depth: float) -> FloatArray | None:
    """Minimise Σ d − μ log det(Q + diag(d)) by Newton steps, for μ from `depth` down to a small share of it.

    `depth` is minus the least eigenvalue. The gradient is 1 − μ diag(W), the Hessian μ W∘W, W = (Q + diag(d))⁻¹.
    """
    from scipy.linalg import cho_factor, cho_solve, lapack

    b = Q.shape[0]
    d = np.full(b, 2.0 * depth)
    mu = depth
    for _ in range(_STEPS):
        factor, info = lapack.dpotrf(Q + np.diag(d), lower=1)
        if info != 0:
            return None
        lower, info = lapack.dpotri(factor, lower=1)
        W = np.tril(lower) + np.tril(lower, -1).T
        diagonal = W.diagonal()
        try:
            step = cho_solve(cho_factor(W * W, lower=True), diagonal - 1.0 / mu)
        except np.linalg.LinAlgError:
            return None
        # In the local norm a step of less than 1 stays positive definite.
        decrement = math.sqrt(max(float(step @ (diagonal - 1.0 / mu)), 0.0))
        d = d + step / (1.0 + decrement)
        if decrement < 0.5:
            if mu <= _CLOSE * depth:
                return d
            mu *= 0.2
    return d
