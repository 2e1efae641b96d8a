"""Losses that networks compute themselves, such as those of Hugging Face, which take labels and return a loss.

Such a network tells which of the known losses is its own: the one with the same value. Labels are kept among its
inputs where its outputs depend on them, as in an encoder-decoder that makes the inputs of its decoder from them,
and where its loss is none of those known; so are targets with names of their own, such as `start_positions`.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from cbs_opt.errors import CbsError, InstanceError
from cbs_opt.instances.batches import Bundle, arguments, call, device_of, map_leaves, moved, placed
from cbs_opt.instances.losses import SampleLoss, declared
from cbs_opt.instances.modes import evaluation_mode, fewest, single_precision
from cbs_opt.instances.outputs import output_tensor

logger = logging.getLogger("cbs_opt")

LABELS = ("labels", "label", "targets", "target", "y", "label_ids")
"""Names of labels in batches and among the arguments of networks."""

_KNOWN = ("cross-entropy", "next-token", "mse", "bce")
_SAME = 1e-3  # relative difference of two values of one loss, of which one is in half precision perhaps
_TRIED = 4  # samples

Item = tuple[Any, Any, int]
"""Inputs, targets (or None) and number of samples of a batch."""


class OwnLoss(SampleLoss):
    """The loss that a network returns, for the batch with which it is called: each sample has the same share."""

    name = "of the network"

    def __init__(self, *, of_batches: bool = False) -> None:
        self.of_batches = of_batches

    def terms(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """The loss of the batch for each of m samples: their sum has the derivatives of the sum over samples."""
        loss = loss_in(outputs)
        if loss is None:
            raise InstanceError("the network returns no loss with these samples")
        sums = loss.float().expand(len(targets)) if loss.dtype != torch.float64 else loss.expand(len(targets))
        return sums, torch.ones_like(sums)


def loss_in(outputs: Any) -> Tensor | None:
    """The loss among the outputs of a network: one number, called `loss`."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        return None
    return loss.reshape(())


def chosen_loss(model: nn.Module, inputs: Any, targets: Any, output_key: str | None) -> SampleLoss | None:
    """The loss that a network computes itself from inputs and targets; None where it computes none.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode, on the device of the samples.
    inputs, targets : (m, …)
        Few are enough.
    output_key : str, optional
        See `outputs.output_tensor`.
    """
    outputs = _own_outputs(model, inputs, targets)
    loss = None if outputs is None else loss_in(outputs)
    if loss is None or not math.isfinite(float(loss)):
        return None
    value = float(loss)
    name = _known_as(outputs, targets, value, output_key)
    if name is not None:
        logger.info(f"the loss is {name}, as the network has it")
        return declared(name, output_key)
    if _returns_loss(model, inputs):
        logger.info(f"the loss is that of the network itself, {value:.4g} for the first samples")
        return OwnLoss(of_batches=_nothing_alone(model, inputs, value))
    logger.warning(
        f"the network itself has another loss, {value:.4g} for the first samples, than {', '.join(_KNOWN)}: "
        "declare it with `--loss` (from Python `loss=`)"
    )
    return None


def with_labels(items: Sequence[Item], model: nn.Module) -> list[Item]:
    """The batches, with labels among the inputs where the network needs them there, and targets that it has there.

    Parameters
    ----------
    items : sequence of Item
        On the CPU.
    model : torch.nn.Module
        Is run on few samples of the first batch.
    """
    inputs, targets, _ = items[0]
    name = _label_argument(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        return list(items)
    if not isinstance(inputs, Bundle) if targets is None else name is None or not isinstance(targets, Tensor):
        return list(items)
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(single_precision(model))
        stack.enter_context(torch.no_grad())
        part = slice(0, max(_TRIED, fewest(model)))
        x = placed(inputs[part], model)
        if targets is None:
            names = _targets_among(model, x)
            return [_with_targets(item, names) for item in items] if names else list(items)
        assert name is not None
        y = moved(targets[part], device_of(model))
        needed = _needs_labels(model, x, y)
    return [(_with_argument(x, name, y, m), y, m) for x, y, m in items] if needed else list(items)


def _needs_labels(model: nn.Module, x: Any, y: Tensor) -> bool:
    """Whether the outputs depend on the labels, or the loss is one that only the network knows."""
    outputs = _own_outputs(model, x, y)
    if outputs is None:
        return False
    try:
        without = call(model, x)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # what the network does without labels
        return True
    loss = loss_in(outputs)
    if loss is not None and math.isfinite(float(loss)) and _known_as(outputs, y, float(loss), None) is None:
        return True
    try:
        one, other = output_tensor(outputs), output_tensor(without)
    except InstanceError:  # the part that the loss is about is still to be named
        return False
    return one.shape != other.shape or not torch.allclose(one, other, 1e-3, 1e-5, equal_nan=True)


def _label_argument(model: nn.Module) -> str | None:
    """The name under which the network takes labels."""
    try:
        names = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return None
    return next((name for name in LABELS if name in names and names[name].kind != names[name].VAR_KEYWORD), None)


def _own_outputs(model: nn.Module, inputs: Any, targets: Any) -> Any:
    """What the network returns with labels; None where it takes none, or not these."""
    args, kwargs = arguments(inputs)
    if isinstance(targets, Tensor):
        name = _label_argument(model)
        if name is None:
            return None
        kwargs[name] = targets
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # labels of another kind
        return None


def _known_as(outputs: Any, targets: Any, value: float, output_key: str | None) -> str | None:
    """The name of the known loss that has this value; of several, as for an untrained network, the nearest."""
    if not isinstance(targets, Tensor):
        return None
    found: dict[str, float] = {}
    exact = map_leaves(
        lambda leaf: leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, outputs
    )
    for name in _KNOWN:
        try:
            sums, weights = declared(name, output_key).terms(exact, targets)
        except (CbsError, RuntimeError, IndexError, ValueError, TypeError):  # targets that are none of this loss
            continue
        found[name] = abs(float(sums.double().sum() / weights.double().sum()) - value)
    nearest = min(found, key=lambda name: found[name], default=None)
    return nearest if nearest is not None and found[nearest] <= _SAME * max(abs(value), 1e-6) else None


def _returns_loss(model: nn.Module, inputs: Any) -> bool:
    """Whether the network returns a loss with the inputs alone: its targets are among them."""
    try:
        with torch.no_grad():
            return loss_in(call(model, inputs)) is not None
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a user's network does
        return False


def _nothing_alone(model: nn.Module, inputs: Any, value: float) -> bool:
    """Whether the loss of single samples is zero where that of all is not."""
    if value == 0 or len(inputs) < 2 or fewest(model) > 1:
        return False
    with torch.no_grad():
        losses = [loss_in(call(model, inputs[s : s + 1])) for s in range(min(len(inputs), _TRIED))]
    return all(loss is not None and abs(float(loss)) <= 1e-6 * abs(value) for loss in losses)


def _targets_among(model: nn.Module, x: Any) -> list[str]:
    """The arguments by name without which the network returns no loss, if it returns one with them."""
    if not isinstance(x, Bundle) or not _returns_loss(model, x):
        return []
    args, kwargs = arguments(x)
    found = []
    for name in kwargs:
        try:
            outputs = model(*args, **{key: part for key, part in kwargs.items() if key != name})
        except Exception:  # an input without which the network does not run
            continue
        if loss_in(outputs) is None:
            found.append(name)
    return found


def _with_targets(item: Item, names: Sequence[str]) -> Item:
    inputs, _, m = item
    _, kwargs = arguments(inputs)
    if len(names) == 1 and names[0] in LABELS and isinstance(kwargs.get(names[0]), Tensor):
        return inputs, kwargs[names[0]], m
    return inputs, Bundle({name: kwargs[name] for name in names if name in kwargs}, m), m


def _with_argument(inputs: Any, name: str, labels: Tensor, m: int) -> Bundle:
    args, kwargs = arguments(inputs)
    return Bundle((args, {**kwargs, name: labels}), m)
