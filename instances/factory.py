"""The return value of a user's factory: a model, and optionally data, loss and metric."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from cbs_opt.errors import UsageError

_KEYS = {
    "model": "model",
    "network": "model",
    "data": "data",
    "train": "data",
    "train_data": "data",
    "test": "test_data",
    "test_data": "test_data",
    "val": "test_data",
    "loss": "loss",
    "metric": "metric",
    "output_key": "output_key",
}


@dataclass(frozen=True)
class Made:
    """The parts of the return value of a factory.

    Attributes
    ----------
    model : torch.nn.Module
    data, test_data : object
        See `cbs_opt.instances.own_data`.
    loss, metric, output_key : object
        See `losses.declared`, `metrics.declared_metric` and `outputs.output_tensor`.
    """

    model: nn.Module
    data: Any = None
    test_data: Any = None
    loss: Any = None
    metric: Any = None
    output_key: str | None = None


def parts_of(made: Any, spec: str) -> Made:
    """Divide `model`, `(model, data)`, `(model, train, test, loss, metric)` or a dictionary with these names.

    The test data may be left out before a loss: (model, data, loss[, metric]).

    (model, inputs, labels) is taken as such where both are tensors or arrays of the same length.

    Raises
    ------
    UsageError
        For anything else.
    """
    if isinstance(made, Mapping):
        unknown = [str(key) for key in made if key not in _KEYS]
        parts = {_KEYS[key]: part for key, part in made.items() if key in _KEYS}
        if unknown or not isinstance(parts.get("model"), nn.Module):
            raise UsageError(
                f"{spec}: a dictionary must have `model`, and may have `train`, `test`, `loss` and `metric`, got "
                f"{', '.join(map(str, made)) or 'nothing'}"
            )
        return Made(**parts)
    listed = list(made) if isinstance(made, tuple | list) else [made]
    if not 1 <= len(listed) <= 5 or not isinstance(listed[0], nn.Module):
        raise UsageError(
            f"{spec}: must return a model, (model, data), (model, data, loss[, metric]) or (model, training data, "
            "test data[, loss[, metric]]), got "
            f"{_kind(made)}"
        )
    if (
        len(listed) == 3
        and all(isinstance(part, Tensor | np.ndarray) for part in listed[1:])
        and len(listed[1]) == len(listed[2])
    ):
        return Made(listed[0], (listed[1], listed[2]))
    if len(listed) in (3, 4) and _is_loss(listed[2]):
        return Made(listed[0], listed[1], None, *listed[2:])
    return Made(*listed)


def _is_loss(part: Any) -> bool:
    """Whether the third part is a loss where test data might stand: these are no name, and no function of two."""
    if isinstance(part, str | nn.Module):
        return True
    if not callable(part) or hasattr(part, "__getitem__") or hasattr(part, "__iter__"):
        return False
    try:
        parameters = inspect.signature(part).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) == 2


def _kind(made: Any) -> str:
    if isinstance(made, tuple | list):
        return f"({', '.join(type(part).__name__ for part in made[:4])}{', …' if len(made) > 4 else ''})"
    return type(made).__name__
