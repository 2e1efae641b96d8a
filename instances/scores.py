"""How well a network does on samples: its loss, and a metric."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cbs_opt.device import Batches, find_card
from cbs_opt.errors import CbsError, InstanceError, UsageError
from cbs_opt.instances.batches import (
    call,
    checked_call,
    device_of,
    map_leaves,
    moved,
    on_cpu_instead,
    placed,
    reason,
)
from cbs_opt.instances.data import SampleSource
from cbs_opt.instances.losses import ClassLoss, FunctionLoss, LossLike, SampleLoss, declared, guessed
from cbs_opt.instances.metrics import Metric, MetricLike, declared_metric
from cbs_opt.instances.modes import evaluation_mode, fewest, is_half, outside_inference, single_precision
from cbs_opt.instances.own_loss import chosen_loss

logger = logging.getLogger("cbs_opt")

BATCH = 100
"""Samples that go through the network at a time."""

_ASKED = 8  # samples for which the network is asked for its own loss


@dataclass(frozen=True)
class Score:
    """How well a network does.

    Attributes
    ----------
    accuracy : float or None
        Where the metric is accuracy.
    loss : float
        The mean that PyTorch's `reduction="mean"` gives over all samples.
    samples : int
        How many they are.
    metric, value : str and float, or None
        Name and value of the metric.
    """

    accuracy: float | None
    loss: float
    samples: int
    metric: str | None = None
    value: float | None = None

    @property
    def finite(self) -> bool:
        """Whether all numbers are finite."""
        return math.isfinite(self.loss) and (self.value is None or math.isfinite(self.value))


class Judge:
    """Gathers loss and metric over batches, which it checks as they come.

    Parameters
    ----------
    loss : SampleLoss, name or callable, optional
        Guessed from the first batch where it is not declared, see `losses.guessed`.
    metric : Metric, name or callable, optional
        That of the loss where it is not declared.
    output_key : str, optional
        See `outputs.output_tensor`.
    name : str
        Of the data, for error messages.

    Attributes
    ----------
    loss : SampleLoss or None
    targets_vary : bool
        Whether two different targets were seen.
    """

    def __init__(
        self,
        loss: LossLike | None = None,
        metric: MetricLike | None = None,
        output_key: str | None = None,
        name: str = "",
    ) -> None:
        self.loss: SampleLoss | None = None if loss is None else declared(loss, output_key)
        self._declared_metric, self._key, self._where = metric, output_key, f"{name}: " if name else ""
        self.metric: Metric | None = None
        self._sums = self._weights = 0.0
        self.samples = 0
        self.targets_vary = False
        self._first: Tensor | None = None
        self._started = False

    def take(self, outputs: Any, targets: Any, inputs: Any) -> None:
        """Take in a batch of m samples.

        Raises
        ------
        InstanceError, UsageError
            In one sentence, when outputs and targets do not fit each other or the loss.
        """
        try:
            if self.loss is None:
                self.loss = guessed(outputs, targets, inputs, self._key)
            if not self._started:
                self.metric = declared_metric(self._declared_metric, self.loss)
                self._started = True
                self.loss.check(outputs, targets, inputs)
            elif isinstance(self.loss, ClassLoss):
                self.loss.classes(outputs, targets).check(self.loss.name)
            exact = outputs if isinstance(self.loss, FunctionLoss) else _double(outputs)
            sums, weights = self.loss.terms(exact, targets)
            if self.metric is not None:
                self.metric.update(outputs, targets)
        except torch.OutOfMemoryError:  # for smaller batches, or the CPU
            raise
        except CbsError as error:
            if self._where and not str(error).startswith(self._where):
                raise type(error)(f"{self._where}{error}") from error
            raise
        except Exception as error:  # torch's own words about shapes and types, or a user's loss or metric
            what = "the loss" if self.loss is None else f"the loss {self.loss.name}"
            raise InstanceError(
                f"{self._where}{what} does not take outputs and targets of the network: {reason(error)}; declare "
                "another with `--loss`, or a function of yours, `--loss module:function`"
            ) from error
        self._sums += float(sums.double().sum())
        self._weights += float(weights.double().sum())
        self.samples += len(targets)
        self._watch(targets)

    def find_loss(self, model: nn.Module, inputs: Any, targets: Any) -> None:
        """Ask the network for its loss, where none is declared; few samples on its device are enough."""
        if self.loss is None:
            self.loss = chosen_loss(model, inputs, targets, self._key)

    def _watch(self, targets: Any) -> None:
        if self.targets_vary or not isinstance(targets, Tensor):
            self.targets_vary = True
            return
        if self._first is None:
            self._first = targets[:1].clone()
        if targets.shape[1:] != self._first.shape[1:] or not bool((targets == self._first).all()):
            self.targets_vary = True

    @property
    def mean_weight(self) -> float:
        """Mean weight of a sample, by which single losses are shares of the whole."""
        return self._weights / self.samples if self.samples else 1.0

    def score(self) -> Score:
        """Over the samples so far; NaN where none counts."""
        loss = self._sums / self._weights if self._weights else math.nan
        value = None if self.metric is None else self.metric.value(loss)
        name = None if self.metric is None else self.metric.name
        return Score(value if name == "accuracy" else None, loss, self.samples, name, value)


def torch_device(name: str) -> torch.device:
    """The device of an option `--device`: a card wherever there is one; if asked for one, the log says why not."""
    card, why_not = (None, "") if name == "cpu" else find_card()
    if card is None and name == "cuda":
        logger.warning(f"the network runs on the CPU, not on a card: {why_not}")
    return torch.device("cpu") if card is None else card.device


@outside_inference()
def evaluate(
    model: nn.Module,
    source: SampleSource,
    *,
    loss: LossLike | None = None,
    metric: MetricLike | None = None,
    output_key: str | None = None,
    device: torch.device | str = "cpu",
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda samples: None,
) -> Score | None:
    """Score a network in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
    source : SampleSource
        With labels.
    loss, metric, output_key : optional
        See `Judge`.
    device : torch.device or str
        Where it runs; in smaller batches, or on the CPU, where memory is short. Afterwards the model is where it
        was.
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
        When the network cannot take the inputs, or outputs and targets do not fit each other.
    UsageError
        When the loss must be declared, or the source has no labels.
    """
    if source.labels is None:
        raise UsageError(
            f"{source.name}: has no labels to score with: give (inputs, labels), or skip the scores with "
            "`--no-score`"
        )
    judge = Judge(loss, metric, output_key, source.name)
    before = device_of(model)
    model.to(device)
    with ExitStack() as stack:
        stack.callback(model.to, before)
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.no_grad())
        run, batches = runner(model, stack), Batches(BATCH, fewest(model))
        for inputs, targets in source.batches(BATCH):
            if should_stop():
                break
            take_samples(judge, model, partial(run, name=source.name), inputs, targets, batches)
            progress(judge.samples)
    return judge.score() if judge.samples else None


def take_samples(
    judge: Judge, model: nn.Module, run: Callable[[Any], Any], inputs: Any, targets: Any, batches: Batches
) -> None:
    """Let the judge take in samples: in smaller batches where the memory of a card is short, at last on the CPU.

    Raises
    ------
    InstanceError
        When the memory of the CPU is too short as well.
    """
    before = judge.samples

    def take(first: int, last: int) -> None:
        begin = judge.samples - before  # where the CPU goes on
        x = placed(inputs[begin : begin + last - first], model)
        y = moved(targets[begin : begin + last - first], device_of(model))
        outputs = run(x)
        few = slice(0, max(_ASKED, fewest(model)))
        judge.find_loss(model, x[few], y[few])
        judge.take(outputs, y, x)

    while (left := len(inputs) - (judge.samples - before)) > 0:
        try:
            batches.run(left, take)
        except torch.OutOfMemoryError:
            on_cpu_instead(model)


def runner(model: nn.Module, stack: ExitStack) -> Callable[..., Any]:
    """A function that runs the model: in half precision where that is its own and the device has the operators."""
    state = {"tried": not is_half(model)}

    def run(x: Any, name: str = "") -> Any:
        if not state["tried"]:
            state["tried"] = True
            try:
                return call(model, x)
            except Exception as error:  # whatever operator the device lacks in half precision
                logger.info(
                    f"the network does not run in half precision here ({reason(error)}): in float32 instead"
                )
                stack.enter_context(single_precision(model))
        return checked_call(model, placed(x, model), name)

    return run


def _double(outputs: Any) -> Any:
    return map_leaves(
        lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, outputs
    )


def cost(before: Score, after: Score) -> float:
    """How much the pruned network costs, in points or percent: below 0 where it is better.

    A point is a hundredth of metrics that are shares (accuracy, top-5, R², mean IoU, functions); a percent is of
    the dense value of others (perplexity, squared error, the loss where there is no metric).
    """
    old, new = (score.loss if score.value is None else score.value for score in (before, after))
    if not math.isfinite(new):
        return math.inf
    if before.metric is None or before.metric in ("mse", "perplexity"):
        return 100 * (new - old) / max(abs(old), 1e-300)
    return 100 * (old - new)


def worries(before: Score | None, after: Score | None, classes: float | None = None) -> list[str]:
    """Sentences, in capitals, about scores that no reader should overlook.

    Parameters
    ----------
    before, after : Score or None
        Of the dense and of the pruned network.
    classes : float, optional
        Number of classes; unknown otherwise.
    """
    if after is None:
        return []
    if not after.finite:
        return ["THE SCORE OF THE PRUNED NETWORK IS NOT A FINITE NUMBER: it cannot be used as it is"]
    if before is None or not before.finite:
        return []
    out = []
    guess = math.log(classes) if classes and classes > 1 else 0.0
    if after.loss > 10 * max(before.loss, guess) and after.loss > 0:
        out.append(
            f"THE LOSS EXPLODES, from {before.loss:.4g} to {after.loss:.4g}: prune less, keep normalisation and "
            "sensitive layers out, or solve with `--update`"
        )
    if after.metric == "r2" and after.value is not None and after.value < 0 <= (before.value or 0.0):
        out.append(
            f"R² FALLS BELOW ZERO, to {after.value:.4g}: the pruned network predicts worse than the mean of the "
            "targets"
        )
    return out
