"""CBS-U: the best move of the weights that stay."""

from __future__ import annotations

import numpy as np

from cbs_opt.curvature.inverse_hessian_blocks import InverseHessianBlocks
from cbs_opt.instance import Instance
from cbs_opt.typing import BoolArray, FloatArray

_BATCH_BYTES = 1 << 28  # of one batch of equal blocks
_BATCH_LARGEST = 128  # beyond this size LAPACK alone keeps a core busy


def best_update(instance: Instance, pruned: BoolArray) -> FloatArray:
    """Best weights once `pruned` are zero; CBS-U, eqs 10-12 of [1]_, with the first-order term.

    Parameters
    ----------
    instance : Instance
    pruned : bool (n,)

    Returns
    -------
    float64 (n,)
        Zero on the pruned weights. Where H is singular on the kept weights: one of the minimisers.

    Raises
    ------
    UnboundedError
        When H is singular and `linear` has a component in its null space.

    Notes
    -----
    Each block takes the smallest system that its curvature allows: pruned side, kept side, or the gradients.
    Small blocks of inverse Hessians of equal size are solved in batches.

    References
    ----------
    .. [1] Yu, Serra, Ramalingam, Zhe, "The Combinatorial Brain Surgeon", ICML 2022.
    """
    curvature = instance.curvature
    updated = np.zeros(instance.n)
    single = np.arange(curvature.number_of_blocks)
    if isinstance(curvature, InverseHessianBlocks):
        sizes, counts = np.unique(curvature.block_sizes, return_counts=True)
        in_batches = sizes[(counts > 1) & (sizes <= _BATCH_LARGEST)]
        for b in in_batches.tolist():
            blocks = np.flatnonzero(curvature.block_sizes == b)
            for chunk in np.array_split(blocks, 1 + blocks.size * b * b * 8 // _BATCH_BYTES):
                index = curvature.offsets[chunk][:, None] + np.arange(b)
                inverse = np.stack([curvature.inverse_block(int(k)) for k in chunk])
                g = None if instance.linear is None else instance.linear[index]
                updated[index] = weight_update(inverse, instance.weights[index], pruned[index], g)
        single = np.flatnonzero(~np.isin(curvature.block_sizes, in_batches))
    for k in single.tolist():
        part = curvature.block_slice(k)
        w, P = instance.weights[part], pruned[part]
        g = None if instance.linear is None else instance.linear[part]
        updated[part] = w + curvature.best_update(k, w, P, g)
    updated[pruned] = 0.0
    return updated


def weight_update(
    h_inv: FloatArray, w: FloatArray, pruned: BoolArray, linear: FloatArray | None = None
) -> FloatArray:
    """Best weights of a batch of equal blocks; CBS-U, eqs 10-12.

    The system of every block is brought to the same size b by putting the identity in place of the rows and
    columns that stay, and to a unit diagonal, so that one batched LAPACK call solves them all.

    Parameters
    ----------
    h_inv : float64 (R, b, b)
    w : float64 (R, b)
    pruned : bool (R, b)
    linear : float64 (R, b), optional

    Returns
    -------
    float64 (R, b)
        w + u − H⁻¹_{:,P} ([H⁻¹]_PP)⁻¹ (w_P + u_P), u = −H⁻¹g; O(R b³) time, O(R b²) memory.
    """
    free = w if linear is None else w - np.einsum("rij,rj->ri", h_inv, linear)
    scale = 1.0 / np.sqrt(np.einsum("rii->ri", h_inv))
    both = pruned[:, :, None] & pruned[:, None, :]
    system = np.where(both, h_inv * scale[:, :, None] * scale[:, None, :], np.eye(w.shape[1]))
    rhs = np.where(pruned, free * scale, 0.0)
    multipliers = np.linalg.solve(system, rhs[:, :, None])[:, :, 0] * scale
    return np.where(pruned, 0.0, free - np.einsum("rij,rj->ri", h_inv, multipliers))
