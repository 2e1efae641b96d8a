"""A solution back into the network that its instance came from.

The instance says in `metadata["tensors"]` which of its weights are which tensor: name, shape, offset. Before
anything changes, names, shapes and values are compared, so that a solution never lands in another network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import prune

from cbs_opt import Instance, Result, Solution
from cbs_opt.errors import InstanceError, SolutionError

_RELATIVE = 1e-6  # float32 copies of float64 weights differ by 6e-8
_TINY = 1e-37


@dataclass(frozen=True)
class LayerMask:
    """What is pruned of one tensor.

    Attributes
    ----------
    name : str
    pruned : bool array of the tensor's shape
        True = removed.
    """

    name: str
    pruned: NDArray[np.bool_]

    @property
    def count(self) -> int:
        """Number of pruned weights."""
        return int(self.pruned.sum())

    @property
    def sparsity(self) -> float:
        """Pruned fraction."""
        return self.count / self.pruned.size


def layer_masks(instance: Instance, pruned: NDArray[np.bool_]) -> list[LayerMask]:
    """Cut a selection, bool (n,), into the tensors of the network; raises `InstanceError` as `apply` does."""
    return [LayerMask(name, pruned[part].reshape(shape)) for name, shape, part in _places(instance)]


def apply(model: nn.Module, instance: Instance, solution: Result | Solution) -> list[LayerMask]:
    """Prune a network in place; its kept weights move where the solution has updated weights.

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
        When the instance does not say which tensors it is about, or the model has others: other names, shapes
        or values. The model is then unchanged.
    SolutionError
        When the solution belongs to another instance.

    Examples
    --------
    >>> from cbs_opt.instances.apply import apply
    >>> result = cbs_opt.solve(instance, "search", update=True)      # doctest: +SKIP
    >>> [layer.sparsity for layer in apply(model, instance, result)]  # doctest: +SKIP
    """
    parameters = dict(model.named_parameters())
    changed = pruned_tensors(instance, solution, {name: p.detach() for name, p in parameters.items()})
    with torch.no_grad():
        for name, tensor in changed.items():
            parameters[name].copy_(tensor)
    return layer_masks(instance, solution.pruned)


def prune_masks(model: nn.Module, instance: Instance, solution: Result | Solution) -> list[LayerMask]:
    """Prune a network in place and hold the pruned weights at zero while it is trained on.

    Every pruned tensor becomes a masked parameter of `torch.nn.utils.prune` (`weight_orig`, `weight_mask`);
    `torch.nn.utils.prune.remove` makes it plain again. Parameters, result and errors are those of `apply`.
    """
    masks = apply(model, instance, solution)
    parameters = dict(model.named_parameters())
    for layer in masks:
        path, _, leaf = layer.name.rpartition(".")
        mask = torch.from_numpy(~layer.pruned).to(parameters[layer.name])
        prune.custom_from_mask(model.get_submodule(path), leaf, mask)  # type: ignore[no-untyped-call]
    return masks


def pruned_tensors(
    instance: Instance, solution: Result | Solution, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors after pruning, those that the instance is about; parameters and errors as of `apply`.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        Of the network before pruning; they stay as they are.
    """
    _check_belongs(instance, solution)
    out = {}
    for name, shape, part in _places(instance):
        if name not in tensors:
            raise InstanceError(f"the instance prunes the tensor {name}, which the network does not have")
        old = tensors[name]
        if tuple(old.shape) != shape:
            raise InstanceError(f"{name} has shape {shape} in the instance and {tuple(old.shape)} in the network")
        _check_values(name, instance.weights[part], old)
        pruned = torch.from_numpy(solution.pruned[part].reshape(shape)).to(old.device)
        new = old
        if solution.weights is not None:
            new = torch.from_numpy(solution.weights[part].reshape(shape)).to(old)
            if not bool(torch.isfinite(new).all()):
                raise SolutionError(f"the updated weights of {name} do not fit into the type {old.dtype}")
        out[name] = new.masked_fill(pruned, 0)
    return out


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


def _check_values(name: str, weights: NDArray[np.float64], tensor: Tensor) -> None:
    values = tensor.detach().double().cpu().numpy().ravel()
    # Written so that NaN counts as different.
    same = np.abs(values - weights) <= _RELATIVE * np.abs(weights) + _TINY
    if not same.all():
        wrong = int(np.count_nonzero(~same))
        raise InstanceError(
            f"{name} differs from the instance's weights in {wrong} of {weights.size} places: the instance was "
            "made from another checkpoint"
        )


def _places(instance: Instance) -> Iterator[tuple[str, tuple[int, ...], slice]]:
    """Name, shape and place among the weights of each tensor, checked to cover all weights once."""
    table = instance.metadata.get("tensors")
    if table is None:
        raise InstanceError("the instance does not say which tensors its weights are: `metadata` has no `tensors`")
    end, seen = 0, set()
    for name, shape, offset in sorted(map(_entry, _list(table)), key=lambda entry: entry[2]):
        size = int(np.prod(shape, dtype=np.int64))
        if offset != end or name in seen or end + size > instance.n:
            raise InstanceError(
                f"`metadata`: the tensor {name}, {size} weights from {offset} on, does not continue the others, "
                f"which end at {end} of {instance.n}"
            )
        yield name, shape, slice(offset, offset + size)
        seen.add(name)
        end += size
    if end != instance.n:
        raise InstanceError(f"`metadata`: its tensors hold {end} weights, the instance {instance.n}")


def _list(table: Any) -> Sequence[Any]:
    if not isinstance(table, list | tuple) or not table:
        raise InstanceError("`metadata`: `tensors` must be a list of name, shape and offset")
    return table


def _entry(item: Any) -> tuple[str, tuple[int, ...], int]:
    try:
        name, shape, offset = item["name"], tuple(item["shape"]), item["offset"]
        whole = all(isinstance(number, int) and number >= 0 for number in (*shape, offset))
    except (KeyError, TypeError):
        whole = False
    if not whole or not isinstance(name, str):
        raise InstanceError(f"`metadata`: {str(item)[:80]} must be a tensor's name, shape and offset")
    return name, shape, offset
