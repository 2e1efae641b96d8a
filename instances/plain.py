"""Networks whose weights are computed from other tensors, and the plain networks that compute the same.

`weight_norm`, `spectral_norm`, `orthogonal`, masks of `torch.nn.utils.prune` and of our own, any parametrisation
of `torch.nn.utils.parametrize`: pruning applies to the effective value, the tensor that the layer multiplies by.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from cbs_opt.errors import UsageError
from cbs_opt.instances.stored_forms import encoded, stored_forms

logger = logging.getLogger("cbs_opt")


@dataclass(frozen=True)
class Plain:
    """A network with plain weights.

    Attributes
    ----------
    model : torch.nn.Module
        The network itself where all its weights are plain; otherwise a copy that shares all other tensors with it,
        but for those that were made in `torch.inference_mode`.
    masks : dict of str to bool Tensor
        By name of the effective tensor, what masks of the network keep at zero: True = masked.
    """

    model: nn.Module
    masks: dict[str, Tensor]


def computed_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, module and attribute of every weight that is computed from other tensors."""
    for path, module in model.named_modules():
        if path.endswith(".parametrizations") or ".parametrizations." in path:
            continue
        leaves: list[str] = []
        if parametrize.is_parametrized(module):
            parametrizations: Any = module.parametrizations
            leaves += list(parametrizations)
        leaves += [hook_leaf(hook) for hook in _hooks(module)]
        for leaf in dict.fromkeys(leaves):
            yield f"{path}.{leaf}" if path else leaf, module, leaf


def plain_model(model: nn.Module) -> Plain:
    """Give every weight its effective value as a plain parameter.

    Parameters
    ----------
    model : torch.nn.Module
        Not changed.

    Raises
    ------
    UsageError
        When the network cannot be copied.
    """
    found = list(computed_weights(model))
    tensors = [*model.parameters(), *model.buffers()]
    inferred = {id(tensor) for tensor in tensors if not is_lazy(tensor) and tensor.is_inference()}
    if not found and not inferred:
        return Plain(model, {})
    masks = {name: mask for name, module, leaf in found if (mask := mask_of(module, leaf)) is not None}
    private = {id(tensor) for _, module, leaf in found for tensor in stored_tensors(module, leaf).values()}
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors if id(tensor) not in private | inferred}
    for module in model.modules():  # results of hooks, which torch refuses to copy
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach()
    if found:
        what, remedy = f"computed weights ({found[0][0]})", "make them plain before"
    else:
        what, remedy = "tensors made in torch.inference_mode", "make it outside"
    try:
        plain = copy.deepcopy(model, memo)
    except Exception as error:  # whatever a user's network does when it is copied
        raise UsageError(
            f"the network has {what} and cannot be copied ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:120] if str(error) else ''}): {remedy}"
        ) from error
    for _, module, leaf in list(computed_weights(plain)):
        make_plain(module, leaf)
    return Plain(plain, masks)


@torch.no_grad()
def effective(module: nn.Module, leaf: str) -> Tensor:
    """The tensor that a layer multiplies by, in evaluation mode; not to be written to."""
    training = module.training
    module.eval()
    try:
        for hook in _hooks(module):
            if hook_leaf(hook) == leaf:
                if isinstance(hook, prune.BasePruningMethod):
                    return hook.apply_mask(module).detach()  # type: ignore[no-untyped-call, no-any-return]
                if isinstance(hook, SpectralNorm):
                    return hook.compute_weight(module, do_power_iteration=False).detach()
                return hook.compute_weight(module).detach()  # type: ignore[no-any-return]
        value: Tensor = getattr(module, leaf)
        return value.detach()
    finally:
        module.train(training)


def effective_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters by name, aliases included; computed weights by their effective values."""
    found = list(computed_weights(model))
    private = {id(tensor) for _, module, leaf in found for tensor in stored_tensors(module, leaf).values()}
    out = {
        name: parameter.detach()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) not in private
    }
    for name, module, leaf in found:
        out[name] = effective(module, leaf)
    return out


@torch.no_grad()
def set_effective(model: nn.Module, name: str, value: Tensor) -> None:
    """Give a tensor of a network a new effective value.

    Where its parametrisation cannot produce the value (such as an orthogonal matrix with zeros), it is
    removed and the tensor becomes plain, with a warning.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf].copy_(value)  # type: ignore[union-attr]
        return
    stored = stored_tensors(module, leaf)
    before = {key: tensor.clone() for key, tensor in stored.items()}
    for attempt in (_encode, _assign):
        try:
            if attempt(module, leaf, value) and _same(effective(module, leaf), value):
                _refresh(module, leaf)
                return
        except Exception as error:  # a parametrisation without an inverse, or whose inverse refuses zeros
            logger.debug(f"{name}: {type(error).__name__}: {str(error)[:120]}")
        for key, tensor in stored.items():
            tensor.copy_(before[key])
    logger.warning(
        f"{name}: its parametrisation cannot hold the pruned values: it is removed, and the tensor plain"
    )
    make_plain(module, leaf)
    getattr(module, leaf).copy_(value)


def _encode(module: nn.Module, leaf: str, value: Tensor) -> bool:
    """Store what produces a value, where the form is one that we know."""
    stored = stored_tensors(module, leaf)
    names = {(f"parametrizations.{leaf}.{key}" if key[: len(leaf)] != leaf else key): key for key in stored}
    for form in stored_forms(names):
        new = encoded(form, value, {name: stored[key] for name, key in names.items()})
        if new is None:
            return False
        for name, tensor in new.items():
            stored[names[name]].copy_(tensor)
        return True
    return False


def _assign(module: nn.Module, leaf: str, value: Tensor) -> bool:
    """Assign a value through the inverse of a parametrisation."""
    if not parametrize.is_parametrized(module, leaf):
        return False
    setattr(module, leaf, value.clone())  # the parametrisation may keep the very tensor that it gets
    return True


def _refresh(module: nn.Module, leaf: str) -> None:
    """Let the result of a hook, which lies about until the next call, be that of the new tensors."""
    if not parametrize.is_parametrized(module, leaf):
        setattr(module, leaf, effective(module, leaf))


def make_plain(module: nn.Module, leaf: str) -> None:
    """Replace a computed weight by a plain parameter with its effective value."""
    training = module.training
    module.eval()
    try:
        if parametrize.is_parametrized(module, leaf):
            # A copy of a parametrised module shares its class, from which torch would take the property away.
            kind = type(module)
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=True)
            return
        value = effective(module, leaf).clone()
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if _is_weight_hook(hook) and hook_leaf(hook) == leaf]:
            del hooks[key]
        stored = stored_tensors(module, leaf)
        for stored_name in stored:
            module._parameters.pop(stored_name, None)
            module._buffers.pop(stored_name, None)
        vars(module).pop(leaf, None)
        setattr(module, leaf, nn.Parameter(value))  # a recurrent network keeps a list of its weights up to date
    finally:
        module.train(training)


def mask_of(module: nn.Module, leaf: str) -> Tensor | None:
    """What a mask keeps at zero, True = masked; None where there is no mask."""
    for key, tensor in stored_tensors(module, leaf).items():
        if key.rpartition(".")[2] in (f"{leaf}_mask", "mask"):
            return tensor == 0
    return None


def stored_tensors(module: nn.Module, leaf: str) -> dict[str, Tensor]:
    """The parameters and buffers that a weight is computed from."""
    if parametrize.is_parametrized(module, leaf):
        inner: Any = module.parametrizations[leaf]  # type: ignore[index]
        named = (*inner.named_parameters(), *inner.named_buffers())
        return dict(named)
    keys = [f"{leaf}_{ending}" for ending in ("orig", "mask", "g", "v", "u")]
    tensors = {**module._parameters, **module._buffers}
    return {key: tensor for key in keys if (tensor := tensors.get(key)) is not None}


def hook_leaf(hook: Any) -> str:
    """The attribute that a hook of `torch.nn.utils` computes."""
    return str(hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name)


def _hooks(module: nn.Module) -> list[Any]:
    return [hook for hook in module._forward_pre_hooks.values() if _is_weight_hook(hook)]


def _is_weight_hook(hook: Any) -> bool:
    return isinstance(hook, prune.BasePruningMethod | WeightNorm | SpectralNorm)


def _same(value: Tensor, wanted: Tensor) -> bool:
    """Whether zeros are exact and all else agrees."""
    if value.shape != wanted.shape or not bool(torch.equal(value == 0, wanted == 0)):
        return False
    tolerance = torch.finfo(wanted.dtype).eps ** 0.5  # norms and singular values carry rounding errors
    return torch.allclose(value.double(), wanted.double(), rtol=tolerance, atol=0)
