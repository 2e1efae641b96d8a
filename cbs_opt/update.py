"""CBS-U: the best update of the kept weights."""

from __future__ import annotations

from cbs_opt.errors import UnboundedError
from cbs_opt.instance import Instance
from cbs_opt.typing import BoolArray, FloatArray


def best_update(instance: Instance, pruned: BoolArray) -> FloatArray:
    """Best weights once `pruned` are zero; CBS-U, eqs 10-12 of the CBS paper, with the first-order term.

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
        When H is singular and `linear` has a component in its null space, or H is indefinite.

    Notes
    -----
    Each block takes the smallest system that its curvature allows: pruned side, kept side, or the gradients.
    Small blocks of equal size are solved in batches.

    References
    ----------
    Yu, Serra, Ramalingam, Zhe, "The Combinatorial Brain Surgeon", ICML 2022.
    """
    if not instance.curvature.is_convex:
        raise UnboundedError(
            f"block {instance.curvature.indefinite_blocks[0]}: the update has no minimum, because the Hessian is "
            "indefinite"
        )
    return instance.curvature.best_weights(instance.weights, pruned, instance.linear)
