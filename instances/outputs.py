"""The tensor of a network's output to which the loss applies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cbs_opt.errors import InstanceError
from cbs_opt.instances.batches import leaves_of

_NAMES = (
    "logits",
    "prediction",
    "predictions",
    "preds",
    "output",
    "outputs",
    "out",
    "y_hat",
    "scores",
    "start_logits",
)


class SeveralOutputsError(InstanceError):
    """A network has several outputs, and nothing tells which of them is meant."""


def output_tensor(outputs: Any, key: str | None = None) -> Tensor:
    """The logits or predictions of a network that returns a tensor, a tuple, a dictionary or a dataclass.

    Parameters
    ----------
    outputs : object
        What the network returned.
    key : str, optional
        Name or number of the part that is meant. By default: the tensor itself; the part called `logits`, `out`
        and the like; the only tensor; the first tensor of a tuple that is not a single number.

    Raises
    ------
    InstanceError
        When there is no such part; `SeveralOutputsError` when several could be meant.
    """
    if isinstance(outputs, Tensor) and key is None:
        return outputs
    named = _named(outputs)
    if key is not None:
        part = named.get(key)
        if not isinstance(part, Tensor):
            raise InstanceError(f"the network's output has no tensor '{key}'; it has {_listed(named)}")
        return part
    for name in _NAMES:
        if isinstance(part := named.get(name), Tensor):
            return part
    tensors = {name: part for name, part in named.items() if isinstance(part, Tensor) and part.dim() > 0}
    if len(tensors) == 1 or (tensors and isinstance(outputs, tuple | list)):
        return next(iter(tensors.values()))
    raise SeveralOutputsError(
        f"the network's output, {_listed(named)}, does not determine the tensor of the loss: name it with "
        "`--output-key` (from Python `output_key`), such as 'logits', or declare a loss of all outputs, a "
        "function of (outputs, targets), with `--loss module:function` (from Python `loss=`)"
    )


def output_values(outputs: Any, key: str | None = None) -> Tensor:
    """The tensor of `output_tensor`; where several could be meant all of them, floating-point (m, k)."""
    try:
        return output_tensor(outputs, key)
    except SeveralOutputsError:
        tensors = [part for part in leaves_of(outputs) if isinstance(part, Tensor) and part.dim() > 0]
        values = [part for part in tensors if part.is_floating_point() and len(part) == len(tensors[0])]
        if not values:
            raise
        return torch.cat([part.float().reshape(len(part), -1) for part in values], dim=1)


def _named(outputs: Any) -> dict[str, Any]:
    if isinstance(outputs, Mapping):
        return {str(name): part for name, part in outputs.items()}
    if isinstance(outputs, tuple) and hasattr(outputs, "_fields"):
        return dict(zip(outputs._fields, outputs, strict=True))
    if isinstance(outputs, tuple | list):
        return {str(number): part for number, part in enumerate(outputs)}
    if dataclasses.is_dataclass(outputs):
        return {f.name: getattr(outputs, f.name) for f in dataclasses.fields(outputs)}
    if isinstance(outputs, Tensor):
        return {"0": outputs}
    return dict(getattr(outputs, "__dict__", {}))


def _listed(named: dict[str, Any]) -> str:
    parts = [
        f"{name} {tuple(part.shape)}" if isinstance(part, Tensor) else f"{name} ({type(part).__name__})"
        for name, part in named.items()
    ]
    return ", ".join(parts[:8]) or "nothing"
