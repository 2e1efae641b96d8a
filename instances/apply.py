"""Applies a solution to the network from which its instance was exported.

`metadata["tensors"]` of the instance maps its weights to tensors: name, shape, offset. Before anything changes,
names, shapes and values are compared, so that a solution is never applied to another network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cbs_opt import Instance, Result, Solution
from cbs_opt.errors import InstanceError, SolutionError
from cbs_opt.instances.masks import LayerMask, add_masks
from cbs_opt.instances.modes import unwrapped
from cbs_opt.instances.plain import effective_tensors, set_effective
from cbs_opt.instances.tensors import Place, read_places

_RELATIVE = 1e-6  # float32 copies of float64 weights differ by 6e-8
_TINY = 1e-37


def layer_masks(instance: Instance, pruned: NDArray[np.bool_]) -> list[LayerMask]:
    """Cut a selection, bool (n,), into the tensors of the network; raises `InstanceError` as `apply` does."""
    return [LayerMask(place.name, place.tensor(pruned), place.aliases) for place in read_places(instance)]


def apply(model: nn.Module, instance: Instance, solution: Result | Solution) -> list[LayerMask]:
    """Prune a network in place; kept weights change if the solution has updated weights.

    Parameters
    ----------
    model : torch.nn.Module
        With the weights that the instance was made from.
    instance : Instance
    solution : Result or Solution

    Returns
    -------
    list of LayerMask
        In the order of the instance.

    Raises
    ------
    InstanceError
        When the instance does not name its tensors, or the model has tensors of other names, shapes or values. The
        model is then unchanged.
    SolutionError
        When the solution belongs to another instance.

    Examples
    --------
    >>> from cbs_opt.instances.apply import apply
    >>> result = cbs_opt.solve(instance, "search", update=True)      # doctest: +SKIP
    >>> [layer.sparsity for layer in apply(model, instance, result)]  # doctest: +SKIP
    """
    model = unwrapped(model)
    changed = pruned_tensors(instance, solution, effective_tensors(model))
    for place in read_places(instance):
        set_effective(model, place.name, changed[place.name])
    return layer_masks(instance, solution.pruned)


def prune_masks(
    model: nn.Module, instance: Instance, solution: Result | Solution, *, hooks: bool = False
) -> list[LayerMask]:
    """Prune a network in place and keep the pruned weights at zero during further training.

    Every pruned tensor gets a `masks.Mask`, a parametrisation; `masks.squash` makes them permanent. With `hooks`
    they are masks of `torch.nn.utils.prune`. Parameters, result and errors are otherwise those of `apply` and
    `masks.add_masks`.
    """
    masks = apply(model, instance, solution)
    add_masks(unwrapped(model), masks, hooks=hooks)
    return masks


def pruned_tensors(
    instance: Instance, solution: Result | Solution, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of the instance after pruning; parameters and errors as for `apply`.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        Of the network before pruning, by name; they are not changed. Of several names of one tensor those that
        are there are compared and pruned alike.

    Returns
    -------
    dict
        The pruned tensors, under each of these names and under that of the instance, in the types that they had.
    """
    _check_belongs(instance, solution)
    out = {}
    for place in read_places(instance):
        there = [name for name in (place.name, *place.aliases) if name in tensors]
        if not there:
            raise InstanceError(f"the instance prunes the tensor {place.name}, which the network does not have")
        for name in there:
            out[name] = _pruned(name, place, instance, solution, tensors[name])
        out.setdefault(place.name, out[there[0]])
    return out


def _pruned(name: str, place: Place, instance: Instance, solution: Result | Solution, old: Tensor) -> Tensor:
    shape = place.layout.shape
    if tuple(old.shape) != shape:
        raise InstanceError(f"{name} has shape {shape} in the instance and {tuple(old.shape)} in the network")
    _check_values(name, place.tensor(instance.weights), old, place.dtype)
    # Types of eight bits lack operations: the computation uses a wider one.
    new = old if old.dtype.itemsize > 1 else old.float()
    pruned = torch.from_numpy(place.tensor(solution.pruned)).to(old.device)
    if solution.weights is not None:
        new = torch.from_numpy(place.tensor(solution.weights)).to(new)
    new = new.masked_fill(pruned, 0).to(old.dtype)
    if not bool(torch.isfinite(new.float()).all()):
        raise SolutionError(f"the updated weights of {name} do not fit into the type {old.dtype}")
    return new


def _check_belongs(instance: Instance, solution: Result | Solution) -> None:
    if solution.pruned.shape != (instance.n,):
        raise SolutionError(
            f"the solution is for {solution.pruned.size} weights, the instance has {instance.n}: they do not "
            "belong together"
        )
    theirs = solution.instance_sha256 if isinstance(solution, Solution) else ""
    if theirs and instance.sha256 and theirs != instance.sha256:
        raise SolutionError(
            f"the solution is for the instance {theirs[:12]}…, this one is {instance.sha256[:12]}…: they do not "
            "belong together"
        )


def _check_values(name: str, weights: NDArray[np.float64], tensor: Tensor, dtype: str) -> None:
    """Compare with the instance; a checkpoint may have higher precision than the network it was loaded into."""
    values = tensor.detach().cpu()
    held: Any = vars(torch).get(dtype)
    for form in (values, values.to(held) if isinstance(held, torch.dtype) else values):
        wide = form.double().numpy().ravel()
        expected = weights.ravel()
        # Written so that NaN counts as different.
        same = np.abs(wide - expected) <= _RELATIVE * np.abs(expected) + _TINY
        if same.all():
            return
    wrong = int(np.count_nonzero(~same))
    raise InstanceError(
        f"{name} differs from the instance's weights in {wrong} of {expected.size} places: the instance was "
        "made from another checkpoint"
    )
