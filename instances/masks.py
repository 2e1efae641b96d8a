"""Masks of pruned weights, in networks for further training and in files.

A mask in a network is a parametrisation of `torch.nn.utils.parametrize`: the layer multiplies by weight · mask, so
that no optimiser, weight decay or checkpoint restores a pruned weight. `squash` makes the masks permanent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.files.atomic import atomic_write
from cbs_opt.instances.plain import make_plain


@dataclass(frozen=True)
class LayerMask:
    """The pruned weights of one tensor.

    Attributes
    ----------
    name : str
    pruned : bool array of the tensor's shape
        True = removed.
    aliases : tuple of str
        Other names of the same tensor.
    """

    name: str
    pruned: NDArray[np.bool_]
    aliases: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of pruned weights."""
        return int(self.pruned.sum())

    @property
    def sparsity(self) -> float:
        """Pruned fraction."""
        return self.count / self.pruned.size

    @property
    def title(self) -> str:
        """All its names, for reports."""
        return " = ".join((self.name, *self.aliases))


class Mask(nn.Module):
    """A parametrisation that keeps weights at zero: the effective tensor is tensor · mask.

    Parameters
    ----------
    kept : bool Tensor
        Of the shape of the tensor; True = kept.
    """

    mask: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", kept)

    def forward(self, weight: Tensor) -> Tensor:
        """The tensor with zeros where the mask is."""
        return weight * self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        """A tensor that has the given value behind the mask."""
        return weight * self.mask


def add_masks(model: nn.Module, masks: Iterable[LayerMask], *, hooks: bool = False) -> None:
    """Keep pruned weights at zero during further training.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place. `copy.deepcopy`, tied layers, `MultiheadAttention` and recurrent layers are fine; an
        optimiser made before keeps its parameters.
    masks : iterable of LayerMask
    hooks : bool
        Use the masks of `torch.nn.utils.prune` (`weight_orig`, `weight_mask`), for code that expects them.

    Raises
    ------
    InstanceError
        For a tensor that the network does not have.
    UsageError
        When a tensor cannot be masked, or hooks would not keep it at zero.
    """
    masks = list(masks)
    for mask in masks:
        for name in (mask.name, *mask.aliases):
            _check(model, name, mask, hooks)
    for mask in masks:
        for name in (mask.name, *mask.aliases):
            module, leaf = _owner(model, name)
            kept = torch.from_numpy(~mask.pruned).to(getattr(module, leaf).device)
            if hooks:
                prune.custom_from_mask(module, leaf, kept.to(getattr(module, leaf)))  # type: ignore[no-untyped-call]
                continue
            with torch.no_grad():
                parametrize.register_parametrization(module, leaf, Mask(kept))
            if isinstance(module, nn.RNNBase):
                _keep_flat_weights_fresh(module)


def squash(model: nn.Module) -> nn.Module:
    """Make all masks permanent: plain parameters again, with zeros where the masks were.

    Masks made by `add_masks`, by torchao and by `torch.nn.utils.prune` alike; other parametrisations stay. Returns
    the model, which is changed in place.
    """
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            lists: Any = module.parametrizations
            for leaf in list(lists):
                if all(isinstance(getattr(each, "mask", None), Tensor) for each in lists[leaf]):
                    make_plain(module, leaf)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
    return model


def masks_of_zeros(tensors: Mapping[str, Tensor]) -> list[LayerMask]:
    """Masks that keep the zeros of the given tensors at zero."""
    return [LayerMask(name, (tensor == 0).cpu().numpy()) for name, tensor in tensors.items()]


def write_masks(path: Path | str, masks: Iterable[LayerMask]) -> None:
    """Write only the masks, by tensor name: bool, True = kept, under each name that a tensor has.

    Raises
    ------
    OutputError
        When the file cannot be written.
    """
    tensors = {}
    for mask in masks:
        for name in (mask.name, *mask.aliases):
            tensors[name] = torch.from_numpy(~mask.pruned)
    data = safetensors_bytes(tensors, {"format": "cbs-masks", "version": "1", "true": "kept"})
    with atomic_write(path) as file:
        file.write(data)


def read_masks(path: Path | str) -> list[LayerMask]:
    """Read what `write_masks` wrote.

    Raises
    ------
    InstanceError
        When there is no such file, or it does not hold masks.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InstanceError(f"{path}: no such file") from None
    except (SafetensorError, ValueError, OSError) as error:
        raise InstanceError(f"{path}: holds no masks in safetensors: {error}") from None
    wrong = [name for name, tensor in tensors.items() if tensor.dtype != torch.bool]
    if metadata.get("format") != "cbs-masks" or wrong:
        raise InstanceError(f"{path}: holds no masks: they are boolean tensors, as `write_masks` writes them")
    return [LayerMask(name, ~tensor.numpy()) for name, tensor in tensors.items()]


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise InstanceError(f"the network has no tensor {name}") from None
    return module, leaf


def _check(model: nn.Module, name: str, mask: LayerMask, hooks: bool) -> None:
    module, leaf = _owner(model, name)
    tensor = getattr(module, leaf, None)
    if not isinstance(tensor, Tensor):
        raise InstanceError(f"the network has no tensor {name}")
    if tuple(tensor.shape) != mask.pruned.shape:
        raise InstanceError(f"{name} has shape {tuple(tensor.shape)}, its mask {mask.pruned.shape}")
    if not hooks:
        return
    parent = name.rpartition(".")[0].rpartition(".")[0]
    attention = isinstance(module, nn.MultiheadAttention) or isinstance(
        model.get_submodule(parent), nn.MultiheadAttention
    )
    if attention or mask.aliases:
        why = "several layers share it" if mask.aliases else "attention reads it past its hooks"
        raise UsageError(f"{name}: hooks would not hold it at zero, as {why}: leave `hooks` out")


def _keep_flat_weights_fresh(module: nn.RNNBase) -> None:
    """Let a recurrent layer read its weights behind their masks: it keeps a list of the parameters themselves."""
    kind: Any = type(module)
    if isinstance(vars(kind).get("_flat_weights"), property):
        return

    def get(self: nn.RNNBase) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    # The class belongs to this module alone: `parametrize` has made it.
    kind._flat_weights = property(get, lambda self, value: None)


def kept_masks(layers: Iterable[LayerMask]) -> dict[str, Tensor]:
    """Masks by name of tensor, aliases included, bool of the tensor's shape: True where a weight is kept."""
    return {name: torch.from_numpy(~layer.pruned) for layer in layers for name in (layer.name, *layer.aliases)}
