"""How well a classifier does: accuracy and mean cross entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.instances.data import SampleSource

BATCH = 100
"""Samples that go through the network at a time."""


@dataclass(frozen=True)
class Score:
    """Accuracy, mean cross entropy in nats, and the number of samples that they are over."""

    accuracy: float
    loss: float
    samples: int


def torch_device(name: str) -> torch.device:
    """The device of an option `--device`; raises `UsageError` for CUDA where there is none."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UsageError("`--device cuda` was asked for, but torch finds no CUDA device here")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def evaluate(
    model: nn.Module,
    source: SampleSource,
    *,
    device: torch.device | str = "cpu",
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda samples: None,
) -> Score | None:
    """Score a classifier in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
        From inputs (m, …) to logits (m, classes).
    source : SampleSource
    device : torch.device or str
        Where it runs; the model stays where it is afterwards.
    should_stop : callable
        Asked between batches; the score is then over the samples until there.
    progress : callable
        Told the number of samples done, batch by batch.

    Returns
    -------
    Score or None
        None when it was stopped before the first batch.

    Raises
    ------
    InstanceError
        When the network cannot take the inputs, gives no logits, or has fewer classes than the labels.
    """
    before = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.to(device).eval()
    right, total, done = 0, 0.0, 0
    try:
        for inputs, labels in source.batches(BATCH):
            if should_stop():
                break
            logits = _logits(model, source.name, inputs.to(device))
            if int(labels.max()) >= logits.shape[1]:
                raise InstanceError(
                    f"{source.name}: labels must be between 0 and {logits.shape[1] - 1} for this network, got "
                    f"{int(labels.max())}"
                )
            y = labels.to(device)
            right += int((logits.argmax(1) == y).sum())
            total += float(nn.functional.cross_entropy(logits.double(), y, reduction="sum"))
            done += len(labels)
            progress(done)
    finally:
        model.to(before)
    return Score(right / done, total / done, done) if done else None


def _logits(model: nn.Module, name: str, inputs: torch.Tensor) -> torch.Tensor:
    try:
        with torch.no_grad():
            logits = model(inputs)
    except Exception as error:  # whatever a user's network does with inputs that are not its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InstanceError(
            f"{name}: the network cannot take inputs of shape {tuple(inputs.shape[1:])}: {reason}"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != len(inputs):
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise InstanceError(f"{name}: the network must give logits (samples, classes), got {shape}")
    return logits
