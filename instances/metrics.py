"""Metrics of a network other than its loss: accuracy, top-5, R², mean IoU, perplexity, or a user's function."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.instances.batches import Bundle, joined, map_leaves, reason
from cbs_opt.instances.classes import ClassView, class_view
from cbs_opt.instances.losses import ClassLoss, SampleLoss, ValueLoss
from cbs_opt.instances.outputs import SeveralOutputsError, output_tensor

MetricLike: TypeAlias = "Metric | Callable[..., Any] | str"

METRIC_NAMES = ("accuracy", "top-5", "r2", "mse", "mean-iou", "perplexity", "none")
"""Metrics by name; a user's function of (outputs, targets) comes as `module:function`."""


class Metric(abc.ABC):
    """A number over all samples, accumulated batch by batch.

    Attributes
    ----------
    name : str
    higher_is_better : bool
    share : bool
        Whether it is a share between 0 and 1, of which a hundredth is a point.
    """

    name: str
    higher_is_better = True
    share = True

    @abc.abstractmethod
    def reset(self) -> None:
        """Reset."""

    @abc.abstractmethod
    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch."""

    @abc.abstractmethod
    def value(self, loss: float) -> float:
        """The metric of all samples so far, whose loss is given."""


class _OfClasses(Metric):
    def __init__(self, loss: SampleLoss) -> None:
        self._loss = loss
        self.reset()

    def view(self, outputs: Any, targets: Any) -> ClassView:
        found = self._loss.classes(outputs, targets)
        if found is None:
            found = class_view(output_tensor(outputs, self._loss.output_key), targets, -100, False)
        return found


class TopAccuracy(_OfClasses):
    """Share of the samples, tokens or pixels whose class is among the k with the highest scores."""

    def __init__(self, loss: SampleLoss, k: int = 1) -> None:
        self.k = k
        self.name = "accuracy" if k == 1 else f"top-{k}"
        super().__init__(loss)

    def reset(self) -> None:
        """Reset."""
        self._right = self._count = 0

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch."""
        view = self.view(outputs, targets)
        k = min(self.k, view.scores.shape[1])
        # As `argmax` for k = 1: of equal scores the first counts.
        best = view.scores.argmax(1, keepdim=True) if k == 1 else view.scores.topk(k, dim=1).indices
        hit = (best == view.numbers.unsqueeze(1)).any(1) & view.counted
        self._right += int(hit.sum())
        self._count += int(view.counted.sum())

    def value(self, loss: float) -> float:
        """The share."""
        return self._right / self._count if self._count else math.nan


class BinaryAccuracy(Metric):
    """Share of the binary predictions that are correct: a logit above 0, a probability above ½."""

    name = "accuracy"

    def __init__(self, loss: ValueLoss) -> None:
        self._loss = loss
        self._threshold = 0.0 if type(loss.module).__name__ == "BCEWithLogitsLoss" else 0.5
        self.reset()

    def reset(self) -> None:
        """Reset."""
        self._right = self._count = 0

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch."""
        out, y = self._loss.values(outputs, targets)
        self._right += int(((out > self._threshold) == (y > 0.5)).sum())
        self._count += y.numel()

    def value(self, loss: float) -> float:
        """The share."""
        return self._right / self._count if self._count else math.nan


class MeanIoU(_OfClasses):
    """Intersection over union, averaged over the classes that occur in targets or predictions."""

    name = "mean-iou"

    def reset(self) -> None:
        """Reset."""
        self._confusion: Tensor | None = None

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch."""
        view = self.view(outputs, targets)
        classes = view.scores.shape[1]
        found, true = view.scores.argmax(1)[view.counted], view.numbers[view.counted]
        counts = (
            torch.bincount(true * classes + found, minlength=classes * classes).reshape(classes, classes).cpu()
        )
        self._confusion = counts if self._confusion is None else self._confusion + counts

    def value(self, loss: float) -> float:
        """The mean over classes."""
        if self._confusion is None:
            return math.nan
        C = self._confusion.double()
        both = C.diagonal()
        union = C.sum(0) + C.sum(1) - both
        seen = union > 0
        return float((both[seen] / union[seen]).mean()) if bool(seen.any()) else math.nan


class SquaredError(Metric):
    """Mean squared error, or R²: the explained share of the variance of each output, averaged over outputs."""

    def __init__(self, loss: SampleLoss, name: str) -> None:
        self.name = name
        self.higher_is_better = self.share = name == "r2"
        self._loss = loss
        self.reset()

    def reset(self) -> None:
        """Reset."""
        self._count = 0
        self._sums: list[Tensor] = []

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch."""
        values = ValueLoss(torch.nn.MSELoss(), self.name, self._loss.output_key).values(outputs, targets)
        out, y = (part.double().reshape(len(part), -1).cpu() for part in values)
        if not self._count:
            self._shift = y.mean(0)  # keeps the sums of squares small
        y0 = y - self._shift
        new = [((out - y) ** 2).sum(0), y0.sum(0), (y0**2).sum(0)]
        if self._sums and len(new[0]) != len(self._sums[0]):
            raise InstanceError(f"the metric {self.name} needs outputs of one shape: declare `--metric none`")
        self._sums = [a + b for a, b in zip(self._sums, new, strict=True)] if self._sums else new
        self._count += len(y)

    def value(self, loss: float) -> float:
        """The mean over outputs."""
        if not self._count:
            return math.nan
        error, total, squares = self._sums
        if self.name == "mse":
            return float(error.mean()) / self._count
        variance = squares - total**2 / self._count
        seen = variance > 0
        return float((1 - error[seen] / variance[seen]).mean()) if bool(seen.any()) else math.nan


class Perplexity(Metric):
    """The exponential of the mean cross entropy."""

    name = "perplexity"
    higher_is_better = share = False

    def reset(self) -> None:
        """Nothing is kept."""

    def update(self, outputs: Any, targets: Any) -> None:
        """Nothing is needed."""

    def value(self, loss: float) -> float:
        """Of the loss."""
        return math.exp(loss) if loss < 700 else math.inf


class FunctionMetric(Metric):
    """A user's function of the outputs and targets of all samples; higher is better.

    It gets the tensor that `output_tensor` finds, or all outputs where several could be meant.
    """

    def __init__(self, function: Callable[..., Any], name: str, output_key: str | None = None) -> None:
        self.function, self.name, self._key = function, name, output_key
        self.reset()

    def reset(self) -> None:
        """Reset."""
        self._outputs: list[Any] = []
        self._targets: list[Any] = []
        self._whole = False

    def update(self, outputs: Any, targets: Any) -> None:
        """Keep a batch, on the CPU."""
        try:
            outputs = output_tensor(outputs, self._key)
        except SeveralOutputsError:
            outputs = Bundle(outputs, len(targets))
            self._whole = True
        if self._whole and isinstance(targets, Bundle):  # as the outputs: one dictionary or tuple of all samples
            self._targets.append(targets.changed(_on_cpu))
        else:
            targets = targets.tree if isinstance(targets, Bundle) else targets
            self._targets.append(map_leaves(_on_cpu, targets))
        self._outputs.append(outputs.changed(_on_cpu) if isinstance(outputs, Bundle) else outputs.detach().cpu())

    def value(self, loss: float) -> float:
        """The value of the function on all samples."""
        try:
            outputs, targets = _joined(self._outputs), _joined(self._targets)
            return float(self.function(outputs, targets))
        except Exception as error:  # whatever a user's metric does
            raise InstanceError(
                f"the metric {self.name} does not take the outputs and targets of all samples, or returns no "
                f"number: {reason(error)}"
            ) from error


def _on_cpu(leaf: Any) -> Any:
    return leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf


def _joined(parts: list[Any]) -> Any:
    """The batches of outputs or targets as one, those of other kinds as a list."""
    if all(isinstance(part, Tensor) for part in parts):
        return torch.cat(parts)
    if all(isinstance(part, Bundle) for part in parts):
        return joined(parts).tree
    return parts


def declared_metric(metric: MetricLike | None, loss: SampleLoss) -> Metric | None:
    """The metric that is declared, or the one that goes with the loss; None for none.

    Raises
    ------
    UsageError
        For an unknown name.
    """
    if isinstance(metric, Metric):
        return metric
    if metric is None:
        return _usual(loss)
    if not isinstance(metric, str):
        if not callable(metric):
            raise UsageError(f"a metric must be a name or a function, got {type(metric).__name__}")
        return FunctionMetric(metric, getattr(metric, "__name__", type(metric).__name__), loss.output_key)
    name = metric.replace("_", "-").lower()
    if name == "none":
        return None
    if name == "accuracy":
        return BinaryAccuracy(loss) if _is_binary(loss) else TopAccuracy(loss)  # type: ignore[arg-type]
    if name.startswith("top-") and name[4:].isdecimal() and int(name[4:]) > 0:
        return TopAccuracy(loss, int(name[4:]))
    if name in ("r2", "mse"):
        return SquaredError(loss, name)
    if name == "mean-iou":
        return MeanIoU(loss)
    if name == "perplexity":
        if not isinstance(loss, ClassLoss):
            raise UsageError("the metric perplexity goes with a cross entropy")
        return Perplexity()
    if ":" in metric:
        from cbs_opt.instances.plugins import load_object

        return declared_metric(load_object(metric, "--metric"), loss)
    raise UsageError(f"`metric` must be one of {', '.join(METRIC_NAMES)}, or module:function, got '{metric}'")


def _is_binary(loss: SampleLoss) -> bool:
    return isinstance(loss, ValueLoss) and type(loss.module).__name__ in ("BCELoss", "BCEWithLogitsLoss")


def _usual(loss: SampleLoss) -> Metric | None:
    if isinstance(loss, ClassLoss):
        return Perplexity() if loss.shift else TopAccuracy(loss)
    if isinstance(loss, ValueLoss):
        return BinaryAccuracy(loss) if _is_binary(loss) else SquaredError(loss, "r2")
    return None
