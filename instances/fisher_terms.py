"""Losses whose squared gradients add up to a Fisher matrix: of the given labels, of drawn ones, or of all.

| `fisher` | labels | gradients of a sample |
|---|---|---|
| `empirical` | those of the data; any loss | 1 |
| `sampled` | one drawn from the network's own prediction, for every token or pixel; no labels needed | 1 |
| `exact` | every class, weighted by its probability; one class a sample; no labels needed | one for each class |

The last two estimate the Fisher matrix proper, which for these losses is the Gauss-Newton matrix, scaled as the
loss is: a mean over places stays a mean. The empirical one vanishes where samples are learnt by heart, and the
others nearly so. At a temperature T, with class probabilities softmax(z/T), they estimate the second derivative of
T² times the Kullback-Leibler divergence of these by the scores z: above 1, classes that the network holds for
unlikely count more, which a change of the weights that is not small can make likely.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cbs_opt.errors import UsageError
from cbs_opt.instances.classes import ClassView, class_view
from cbs_opt.instances.losses import ClassLoss, SampleLoss, ValueLoss
from cbs_opt.instances.output_gradients import Terms
from cbs_opt.instances.outputs import output_tensor

Fisher = Literal["empirical", "sampled", "exact"]
FISHERS = ("empirical", "sampled", "exact")

_MOST_CLASSES = 100
_TAIL = 1e-4  # share of a sample's uncertainty in classes that are left out


class FisherError(UsageError):
    """The loss is not one of which the Fisher matrix that was asked for can be taken."""


def fisher_terms(fisher: Fisher, loss: SampleLoss, seed: int = 0, temperature: float = 1.0) -> Terms:
    """What to differentiate for a Fisher matrix.

    Parameters
    ----------
    fisher : {"empirical", "sampled", "exact"}
    loss : SampleLoss
    seed : int
        Of the labels that are drawn.
    temperature : float
        Of the class probabilities of `sampled` and `exact`; 1 is the Fisher matrix.

    Returns
    -------
    callable
        Yields losses from outputs and targets, the latter None where there are none; see `row_gradients`. `exact`
        leaves out classes that hold less than 1e-4 of what is uncertain about every sample.

    Raises
    ------
    FisherError
        For a loss without a distribution to draw from, several classes a sample where all are wanted, or more than
        100 where all are wanted at a temperature above 1.
    """
    if temperature != 1 and not has_temperature(fisher, loss):
        raise FisherError(
            f"`temperature` is of class probabilities: `fisher` sampled or exact and cross entropy, got {fisher} "
            f"and {loss.name}"
        )
    if fisher == "empirical":
        return lambda outputs, targets: iter([loss.per_sample(outputs, targets).sum()])
    generator = torch.Generator().manual_seed(seed)
    if isinstance(loss, ClassLoss):
        divided = partial(_divided, loss, temperature)
        if fisher == "exact":
            return lambda outputs, targets: _all_classes(loss, divided(outputs, targets), temperature)
        return lambda outputs, targets: _drawn_classes(loss, divided(outputs, targets), generator, temperature)
    if fisher == "exact":
        raise FisherError(
            f"`fisher` exact weights the classes of a classifier, the loss is {loss.name}: `sampled` draws "
            "targets for cross entropy, mse and bce, `empirical` takes those of the data for any loss"
        )
    if not isinstance(loss, ValueLoss) or not isinstance(
        loss.module, nn.MSELoss | nn.BCELoss | nn.BCEWithLogitsLoss
    ):
        raise FisherError(
            f"the loss {loss.name} is of no distribution that targets could be drawn from: `fisher` empirical "
            "takes those of the data"
        )
    return lambda outputs, targets: _drawn_values(loss, output_tensor(outputs, loss.output_key), generator)


def has_temperature(fisher: Fisher | None, loss: object) -> bool:
    """Whether there are class probabilities that labels are drawn from or weighted by."""
    return fisher not in (None, "empirical") and isinstance(loss, ClassLoss)


def _divided(loss: ClassLoss, temperature: float, outputs: Any, targets: Any) -> ClassView:
    """Scores divided by the temperature; log-probabilities are brought to the sum that they must have."""
    view = scores_and_places(loss, outputs, targets)
    if temperature == 1:
        return view
    scores = view.scores / temperature
    return dataclasses.replace(view, scores=scores if loss.logits else torch.log_softmax(scores, 1))


def scores_and_places(loss: ClassLoss, outputs: Any, targets: Any) -> ClassView:
    """Scores, and which places count: all of one class a sample where there are no targets."""
    if targets is not None:
        return loss.classes(outputs, targets)
    scores = output_tensor(outputs, loss.output_key)
    if scores.dim() != 2 or loss.shift:
        raise UsageError(
            f"outputs {tuple(scores.shape)} are not of one class a sample: labels are needed to tell which places "
            "count"
        )
    return class_view(scores, torch.zeros(len(scores), dtype=torch.int64, device=scores.device), -1, False)


def _all_classes(loss: ClassLoss, view: ClassView, temperature: float) -> Iterator[Tensor]:
    """T√p_c times the loss of class c, the likeliest class of each sample first."""
    if view.scores.dim() != 2:
        raise FisherError(
            f"`fisher` exact needs one class a sample, the network gives {tuple(view.scores.shape[1:])}: with "
            "classes of tokens or pixels take `sampled`"
        )
    if temperature > 1 and view.scores.shape[1] > _MOST_CLASSES:
        raise FisherError(
            f"`fisher` exact at a temperature above 1 takes a pass for each of the {view.scores.shape[1]} "
            f"classes, at most {_MOST_CLASSES}: take `sampled`"
        )
    probabilities, order = torch.softmax(view.scores.detach().double(), 1).sort(1, descending=True)
    left = probabilities.flip(1).cumsum(1).flip(1)  # what is in this class and those after it
    for k in range(order.shape[1]):
        if k and bool((left[:, k] <= _TAIL * left[:, 1]).all()):
            return
        yield _share(loss, view, order[:, k], temperature * probabilities[:, k].sqrt())


def _drawn_classes(
    loss: ClassLoss, view: ClassView, generator: torch.Generator, temperature: float
) -> Iterator[Tensor]:
    """T times the loss of one class drawn for every place."""
    scores = view.scores.detach().movedim(1, -1)
    sums = torch.softmax(scores.double(), -1).cumsum(-1)
    drawn = torch.rand(sums.shape[:-1], generator=generator, dtype=torch.float64).to(sums.device)
    numbers = (sums < drawn.unsqueeze(-1)).sum(-1).clamp(max=sums.shape[-1] - 1)
    yield _share(loss, view, numbers, torch.full((len(scores),), temperature, dtype=torch.float64))


def _share(loss: ClassLoss, view: ClassView, numbers: Tensor, factor: Tensor) -> Tensor:
    """The sum of the losses of these classes over √weight, so that its square is a mean over the weight."""
    ignored = torch.full_like(numbers, int(loss.module.ignore_index))
    target = torch.where(view.counted, numbers, ignored)
    losses = loss.losses(dataclasses.replace(view, target=target))
    losses = losses.reshape(len(losses), -1).sum(1)
    losses = losses * factor.to(losses)
    counts = view.counted.reshape(len(losses), -1).sum(1).to(losses)
    counts = torch.ones_like(counts) if loss.total else counts
    return (losses / _root(loss, counts)).sum()


def _drawn_values(loss: ValueLoss, outputs: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """The loss of a target drawn for every output: normal for squared errors, 0 or 1 for binary cross entropy."""
    out = outputs.detach().float().cpu()
    if isinstance(loss.module, nn.MSELoss):
        target = out + 0.5**0.5 * torch.randn(out.shape, generator=generator)
    else:
        chances = out if isinstance(loss.module, nn.BCELoss) else torch.sigmoid(out)
        target = (torch.rand(out.shape, generator=generator) < chances).float()
    sums, weights = loss.terms(outputs, target.to(outputs.device))
    yield (sums / _root(loss, weights)).sum()


def _root(loss: SampleLoss, weights: Tensor) -> Tensor:
    """√ of the weight that the loss divides by."""
    if loss.mean_weight is not None:
        weights = torch.full_like(weights, loss.mean_weight)
    return torch.where(weights > 0, weights, torch.ones_like(weights)).sqrt()
