"""Class scores and target class numbers, for all layouts that networks use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cbs_opt.errors import InstanceError


@dataclass(frozen=True)
class ClassView:
    """Scores and targets in the layout of `torch.nn.CrossEntropyLoss`.

    Attributes
    ----------
    scores : (m, C, …)
    target : int64 (m, …), or probabilities, float (m, C, …)
    counted : bool (m, …)
        False where the target is the class to ignore.
    """

    scores: Tensor
    target: Tensor
    counted: Tensor

    @property
    def numbers(self) -> Tensor:
        """int64 (m, …): the class of each place, the likeliest where the targets are probabilities."""
        return self.target.argmax(1) if self.target.is_floating_point() else self.target

    def check(self, name: str) -> None:
        """Raise `InstanceError` for targets that are no classes of the network."""
        classes = self.scores.shape[1]
        if self.target.is_floating_point():
            sums = self.target.double().sum(1)
            if bool((self.target < 0).any()) or bool(((sums - 1).abs() > 1e-3).any()):
                raise InstanceError(
                    f"the loss {name} needs class numbers or probabilities that sum to 1, the targets sum to "
                    f"{float(sums.min()):g} … {float(sums.max()):g}: for several labels per sample declare "
                    "`--loss bce`"
                )
            return
        counted = self.target[self.counted]
        if counted.numel() == 0:
            return
        low, high = int(counted.min()), int(counted.max())
        if low < 0 or high >= classes:
            hint = ""
            if low == 1 and high == classes:
                hint = ": they count from 1; subtract 1"
            elif low < 0 and int((counted < 0).sum()) == int((counted == low).sum()) and high < classes:
                hint = (
                    f": where {low} marks what to ignore, declare torch.nn.CrossEntropyLoss(ignore_index={low}) "
                    "as "
                    "the factory's loss"
                )
            raise InstanceError(
                f"labels must lie in [0, {classes - 1}], the network's classes, got {low} … {high}{hint}"
            )


def class_view(scores: Tensor, targets: Any, ignore_index: int, shift: bool) -> ClassView:
    """Lay out scores and targets of m samples.

    Parameters
    ----------
    scores : (m, C), (m, C, …), (m, …, C) or (m·T, C)
        Classes on the second axis, or on the last one as language models have them, or with samples and tokens
        in one axis.
    targets : (m,), (m, 1), (m, …), or (m, C) one-hot numbers or probabilities
    ignore_index : int
    shift : bool
        Scores of a place are those of the next place's target.

    Raises
    ------
    InstanceError
        With both shapes, when they do not fit.
    """
    if not isinstance(targets, Tensor):
        raise InstanceError(
            f"class numbers must be one tensor, got {type(targets).__name__}: declare a loss of your own, `--loss "
            "module:function`"
        )
    m = len(targets)
    y = targets
    places = tuple(y.shape[1:])
    if scores.dim() == 2 and len(scores) != m and len(scores) == m * y.shape[1:].numel():
        scores = scores.reshape(m, *places, scores.shape[1])
    if scores.dim() < 2 or len(scores) != m:
        raise _unfit(scores, targets)
    if scores.dim() == 2 and y.dim() == 2 and y.shape[1] == 1 and scores.shape[1] > 1:
        y, places = y[:, 0], ()
    if tuple(scores.shape) == tuple(y.shape):
        if y.is_floating_point():
            return ClassView(scores, y, torch.ones_like(y[:, 0], dtype=torch.bool))
        y, places = y.to(torch.int64).argmax(1), tuple(y.shape[2:])
    first, last = tuple(scores.shape[2:]) == places, tuple(scores.shape[1:-1]) == places
    if shift and not last:
        raise InstanceError(
            f"the loss next-token needs logits (m, T, V) and tokens (m, T), got {tuple(scores.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if shift:
        scores, y = scores[:, :-1], y[:, 1:]
    if shift or (last and not first):
        scores = scores.movedim(-1, 1)
    elif not first:
        raise _unfit(scores, targets)
    if scores.shape[1] < 2:
        raise InstanceError(
            f"the network gives {tuple(scores.shape[1:])} per sample, less than two classes: declare the loss, "
            "`--loss mse` for values, `--loss bce` for a probability"
        )
    if y.is_floating_point():
        raise InstanceError(
            f"labels must be class numbers, int64, got {targets.dtype}: convert them, or declare the loss, "
            "such as `--loss mse`"
        )
    y = y.to(torch.int64)
    return ClassView(scores, y, y != ignore_index)


def _unfit(scores: Tensor, targets: Tensor) -> InstanceError:
    return InstanceError(
        f"outputs {tuple(scores.shape)} and targets {tuple(targets.shape)} are not scores with class numbers: "
        "declare the loss, `--loss mse`, `--loss bce` or `--loss module:function`"
    )
