"""Networks run with other tensors in place of their own, however many names these have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from cbs_opt.instances.batches import arguments


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], samples: Any) -> Any:
    """Run a model on a tensor or a bundle, with other tensors in place of some of its own.

    Parameters
    ----------
    model : torch.nn.Module
        It has its own tensors again afterwards.
    tensors : mapping of str to Tensor
        By one of the names of each parameter or buffer; wherever else the model holds the same one, this is
        replaced too.
    samples : Tensor or Bundle
        See `batches.arguments`.

    Raises
    ------
    KeyError
        For a name that the model does not have.

    Notes
    -----
    Each place in a module is replaced once, whatever names the module has: `functional_call` by itself takes a
    module with two names for two modules, and leaves the replacement in it.
    """
    held: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    held.update(model.named_buffers(remove_duplicate=False))
    replacements = {id(held[name]): tensor for name, tensor in tensors.items()}
    everywhere = {
        f"{prefix}.{leaf}" if prefix else leaf: replacements[id(own)]
        for prefix, module in model.named_modules()  # each module once
        for group in (module._parameters, module._buffers)
        for leaf, own in group.items()
        if own is not None and id(own) in replacements
    }
    args, kwargs = arguments(samples)
    return functional_call(model, everywhere, args, kwargs, tie_weights=False)
