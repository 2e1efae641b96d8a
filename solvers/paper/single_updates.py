"""WoodFisher's update of the kept weights: one weight at a time, all added up."""

from __future__ import annotations

import numpy as np

from cbs_opt.instance import Instance
from cbs_opt.losses import check_mask
from cbs_opt.typing import BoolArray, FloatArray


def single_weight_update(instance: Instance, pruned: BoolArray) -> FloatArray:
    """The weights after the sum of the Optimal Brain Surgeon updates of every pruned weight alone.

    Pruning weight q alone moves the others by −w_q H⁻¹e_q / [H⁻¹]_qq. WoodFisher adds these moves over all pruned
    weights, as if none knew of the others, and then sets the pruned weights to zero. It is the best update only
    where a single weight of a block is pruned.

    Parameters
    ----------
    instance : Instance
        Without a first-order term; with one it is ignored, as WoodFisher does.
    pruned : bool (n,)

    Returns
    -------
    float64 (n,)
        Zero on the pruned weights.

    Raises
    ------
    InstanceError
        Where a block is singular.

    Notes
    -----
    One solve with each block: O(m² b_k) for a gradient factor of m < b_k rows.

    References
    ----------
    Singh, Alistarh, "WoodFisher: Efficient second-order approximation for neural network compression", 2020.
    """
    pruned = check_mask(instance, pruned)
    curvature, w = instance.curvature, instance.weights
    # best_update with nothing pruned and the linear term v moves by −H⁻¹v.
    v = np.where(pruned, w / curvature.inverse_diagonal(), 0.0)
    nothing = np.zeros(instance.n, dtype=bool)
    moved = np.empty(instance.n)
    for k in range(curvature.number_of_blocks):
        part = curvature.block_slice(k)
        moved[part] = w[part] + curvature.best_update(k, w[part], nothing[part], v[part])
    moved[pruned] = 0.0
    return moved
