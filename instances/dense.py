"""The dense network on the samples of an export: its loss and accuracy, and whether they fit each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cbs_opt.errors import InstanceError
from cbs_opt.instances.gradients import Loss, Samples, chunk_size, evaluation_mode


def dense_scores(
    model: nn.Module,
    inputs: Samples,
    labels: Samples,
    *,
    loss: Loss,
    chunk_bytes: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Mean loss, and for classifiers under cross entropy the accuracy.

    Parameters
    ----------
    model : torch.nn.Module
        On the device where it is to run; used in evaluation mode.
    inputs, labels : (m, …)
    loss : callable
        Mean loss of a batch.
    chunk_bytes : int
        Memory for the activations of one piece.
    progress : callable, optional
        Gets the number of samples done.

    Returns
    -------
    dict
        `dense_loss`, and `dense_accuracy` where the outputs are (m, classes).

    Raises
    ------
    InstanceError
        When the network does not take the inputs, a label is no class of it, or the loss is not finite.
    """
    m, total, right = len(inputs), 0.0, None
    classify = loss is nn.functional.cross_entropy
    device = next(model.parameters()).device
    with evaluation_mode(model), torch.no_grad():
        try_out(model, inputs[:1].to(device))
        size = chunk_size(model, inputs[:1].to(device), (), chunk_bytes)
        for start in range(0, m, size):
            x, y = inputs[start : start + size].to(device), labels[start : start + size].to(device)
            outputs = model(x)
            if classify and isinstance(outputs, Tensor) and outputs.dim() == 2 and y.dim() == 1:
                _check_labels(y, outputs.shape[1])
                right = (right or 0) + int((outputs.argmax(1) == y).sum())
            total += float(loss(outputs, y)) * len(x)
            progress(min(start + size, m))
    if not torch.isfinite(torch.tensor(total)):
        raise InstanceError("the loss of the samples is not finite: check the data and the checkpoint")
    scores = {"dense_loss": total / m}
    return scores if right is None else scores | {"dense_accuracy": right / m}


def try_out(model: nn.Module, one: Tensor) -> None:
    """Run a network on one sample, (1, …); raises `InstanceError` when it does not take it."""
    try:
        model(one)
    except Exception as error:  # whatever a user's network does with inputs that are not its own
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise InstanceError(
            f"the network does not take inputs of shape {tuple(one.shape[1:])}, {one.dtype}: "
            f"{type(error).__name__}: {reason}"
        ) from error


def _check_labels(labels: Tensor, classes: int) -> None:
    if labels.is_floating_point():
        raise InstanceError(f"labels must be class numbers, int64, got {labels.dtype}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InstanceError(f"labels must lie in [0, {classes - 1}], the network's classes, got {low} … {high}")
