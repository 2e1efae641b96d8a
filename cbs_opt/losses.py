"""The evaluator: every loss that the package reports is computed here, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cbs_opt.errors import InstanceError, UnboundedError
from cbs_opt.instance import Instance
from cbs_opt.typing import BoolArray, FloatArray
from cbs_opt.update import best_update, update_from


@dataclass(frozen=True)
class Losses:
    """The losses of a selection.

    Attributes
    ----------
    selection_loss : float
        Predicted increase of the loss when the kept weights do not change.
    joint_loss : float or None
        The increase after the best update of the kept weights; None if the update has no minimum, or
        where a run had no time left for it.
    weights : float64 (n,) or None
        The weights after that update.
    complete : bool
        False where the update was stopped: `joint_loss` is that of `weights`, but better ones exist.
    """

    selection_loss: float
    joint_loss: float | None
    weights: FloatArray | None
    complete: bool = True


def predicted_loss(instance: Instance, delta: FloatArray) -> float:
    """gᵀδ + ½ δᵀHδ, the predicted increase of the loss when the weights change by `delta`, float64 (n,)."""
    value = 0.5 * instance.curvature.quadratic(delta)
    return value if instance.linear is None else value + float(instance.linear @ delta)


def selection_loss(instance: Instance, pruned: ArrayLike) -> float:
    """½ w_Pᵀ H_PP w_P − g_Pᵀ w_P; eq 7 of the CBS paper and the first-order term.

    Parameters
    ----------
    instance : Instance
    pruned : bool (n,)

    Returns
    -------
    float
        O(m p) for a gradient factor, O(Σ b_k²) for dense blocks.
    """
    return predicted_loss(instance, np.where(check_mask(instance, pruned), -instance.weights, 0.0))


def joint_loss(instance: Instance, pruned: ArrayLike) -> float:
    """½ w_Pᵀ ([H⁻¹]_PP)⁻¹ w_P: the loss after the best update of the kept weights.

    The value is gᵀδ + ½ δᵀHδ at the δ of `best_update`, so that rounding errors of the solve enter
    only quadratically, and it is the loss of weights that exist.

    Raises
    ------
    UnboundedError
        See `best_update`.
    """
    pruned = check_mask(instance, pruned)
    return predicted_loss(instance, best_update(instance, pruned) - instance.weights)


def evaluate(
    instance: Instance,
    pruned: ArrayLike,
    device: str = "cpu",
    threads: int = 1,
    *,
    start: NDArray[Any] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Losses:
    """Both losses and the updated weights.

    Parameters
    ----------
    instance : Instance
    pruned : bool (n,)
    device, threads
        As for `best_update`.
    start : float (n,), optional
        Weights near the best ones, as a solver has them: they save time on long rows that share a Hessian. The
        residual is computed from the data, and corrected as far as without them.
    should_stop : callable, optional
        True ends the update of such rows; the weights are then those that there are, and so is the loss.
    """
    pruned = check_mask(instance, pruned)
    if not instance.curvature.is_convex:
        return Losses(selection_loss(instance, pruned), None, None)
    try:
        weights, complete = update_from(instance, pruned, start, should_stop, device, threads)
    except UnboundedError:
        return Losses(selection_loss(instance, pruned), None, None)
    selection = selection_loss(instance, pruned)
    joint = predicted_loss(instance, weights - instance.weights)
    return Losses(selection, min(joint, selection), weights, complete)


def check_mask(instance: Instance, pruned: ArrayLike) -> BoolArray:
    """`pruned` as bool (n,); raises `InstanceError` for another type or shape."""
    mask = np.asarray(pruned)
    if mask.dtype != np.bool_ or mask.shape != (instance.n,):
        raise InstanceError(
            f"`pruned` must be bool of shape ({instance.n},), got {mask.dtype} of shape {mask.shape}"
        )
    return mask
