"""CBS-U: the best update of the kept weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbs_opt.device import Work, choose, or_on_cpu
from cbs_opt.errors import UnboundedError
from cbs_opt.instance import Instance
from cbs_opt.typing import BoolArray, FloatArray

logger = logging.getLogger("cbs_opt")


def best_update(instance: Instance, pruned: BoolArray, device: str = "cpu", threads: int = 1) -> FloatArray:
    """Best weights once `pruned` are zero; CBS-U, eqs 10-12 of the CBS paper, with the first-order term.

    Parameters
    ----------
    instance : Instance
    pruned : bool (n,)
    device : {"auto", "cpu", "cuda"}
    threads : int
        Cores of the CPU, for "auto".

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
    return update_from(instance, pruned, None, None, device, threads)[0]


def update_from(
    instance: Instance,
    pruned: BoolArray,
    start: NDArray[Any] | None,
    should_stop: Callable[[], bool] | None,
    device: str = "cpu",
    threads: int = 1,
) -> tuple[FloatArray, bool]:
    """`best_update` from weights near the best ones; also whether it was completed.

    Parameters
    ----------
    instance, pruned, device, threads
        As for `best_update`, which also says what is raised.
    start : float (n,), optional
    should_stop : callable, optional
        Asked during the update of long rows on the CPU; True leaves their weights as they are.
    """
    curvature, w = instance.curvature, instance.weights
    if not curvature.is_convex:
        raise UnboundedError(
            f"block {curvature.indefinite_blocks[0]}: the update has no minimum, because the Hessian is indefinite"
        )
    if device != "cpu" and (card := choose(device, _work(instance, pruned), threads)) is not None:
        with or_on_cpu("the update"):
            from cbs_opt.curvature.device_update import best_weights

            found = best_weights(curvature, w, pruned, instance.linear, card)
            if np.isfinite(found).all():
                return found, True
            logger.warning("the update: the card gave what is not a number; on the CPU instead")
    if start is None and should_stop is None:
        return curvature.best_weights(w, pruned, instance.linear), True
    return curvature.improved_weights(w, pruned, instance.linear, start, should_stop or (lambda: False))


def _work(instance: Instance, pruned: BoolArray) -> Work:
    """What the update costs: factorisations of the smaller side, or products of rows that share a Hessian."""
    curvature, factor = instance.curvature, instance.curvature.as_factor()
    sizes = curvature.block_sizes.astype(np.float64)
    shared = curvature.number_of_stored < curvature.number_of_blocks
    stored = float((sizes[: curvature.number_of_stored] ** 2).sum()) if shared else float((sizes**2).sum())
    if factor is not None:
        side = np.minimum(sizes, factor.m)
        flops, stored = float((side**3 / 3 + factor.m * side * sizes).sum()), float(factor.gradients.size)
    elif shared:
        flops = float(np.minimum(sizes**3 / 3, 300.0 * sizes**2).sum())
    else:
        flops = float((sizes**3 / 3).sum())
    largest = float(sizes.max())
    return Work(
        what=f"the update of {instance.n} weights",
        flops64=flops,
        upload=8.0 * stored,
        moved=24.0 * stored,
        launches=100.0 + 10.0 * np.unique(curvature.block_sizes).size,
        memory=8.0 * (stored + 6.0 * (largest**2 if factor is None else float(factor.m) ** 2)),
    )
