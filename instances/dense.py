"""The loss and metric of the dense network on the samples of an export, and checks of the data."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import nn

from cbs_opt.device import Batches
from cbs_opt.errors import InstanceError
from cbs_opt.instances.batches import Samples, on_cpu_instead, placed, slices
from cbs_opt.instances.gradients import chunk_size
from cbs_opt.instances.modes import evaluation_mode, fewest
from cbs_opt.instances.scores import Judge, Score, runner, take_samples

logger = logging.getLogger("cbs_opt")

_CERTAIN = 1e-6  # mean loss below which gradients hold rounding errors only


def dense_scores(
    model: nn.Module,
    inputs: Samples,
    labels: Samples,
    judge: Judge,
    *,
    chunk_bytes: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, float | str]:
    """Score the network, and warn about data without useful gradients.

    Parameters
    ----------
    model : torch.nn.Module
        On the device where it is to run; used in evaluation mode.
    inputs, labels : (m, …)
    judge : Judge
        With the loss and the metric; knows the loss afterwards.
    chunk_bytes : int
        Memory for the activations of one piece.
    progress : callable, optional
        Gets the number of samples done.

    Returns
    -------
    dict
        `dense_loss`; `dense_accuracy`, or `dense_metric` and `dense_value`, where there is a metric; `loss`.

    Raises
    ------
    InstanceError
        When the network does not take the inputs, the labels do not fit its outputs, or the loss is not finite.
    UsageError
        When the loss must be declared.
    """
    m = len(inputs)
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.no_grad())
        run = runner(model, stack)
        few = fewest(model)
        try:
            run(placed(inputs[:few], model))
        except torch.OutOfMemoryError:
            on_cpu_instead(model)
            run(placed(inputs[:few], model))
        batches = Batches(chunk_size(model, placed(inputs[:few], model), (), chunk_bytes), few)
        for part in slices(inputs, batches.size):
            take_samples(judge, model, run, inputs[part], labels[part], batches)
            progress(part.stop)
    score = judge.score()
    if not math.isfinite(score.loss):
        raise InstanceError(
            "the loss of the samples is not finite: check the data and the checkpoint"
            if judge.mean_weight
            else "no sample counts in the loss: all labels are ignored"
        )
    _warn(judge, score, m)
    assert judge.loss is not None
    facts: dict[str, float | str] = {"loss": judge.loss.name, "dense_loss": score.loss}
    if score.metric == "accuracy" and score.value is not None:
        facts["dense_accuracy"] = score.value
    elif score.metric is not None and score.value is not None and math.isfinite(score.value):
        facts |= {"dense_metric": score.metric, "dense_value": score.value}
    return facts


def _warn(judge: Judge, score: Score, m: int) -> None:
    if m > 1 and not judge.targets_vary and not (judge.loss is not None and judge.loss.of_batches):
        logger.warning(f"all {m} samples have the same label: draw them from all classes")
    if abs(score.loss) < _CERTAIN:
        right = " and the accuracy 1" if score.accuracy == 1 else ""
        logger.warning(
            f"THE LOSS OF THE SAMPLES IS {score.loss:.3g}{right}: its gradients almost vanish, and so do every "
            "objective and bound; use samples that the network does not fit perfectly, such as held-out ones, or "
            "`--source reconstruction`"
        )
