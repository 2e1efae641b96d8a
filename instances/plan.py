"""The tensors that an export prunes, in the order of the instance, with their weights and existing zeros."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cbs_opt.budget import Budget
from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.instances.budgets import check_room
from cbs_opt.instances.modes import unwrapped
from cbs_opt.instances.plain import plain_model
from cbs_opt.instances.prunable import Prunable, Selection, select
from cbs_opt.instances.reconstruction import UNUSED, followed
from cbs_opt.instances.tensors import Layout, Place, places
from cbs_opt.typing import BoolArray, FloatArray, IntArray

logger = logging.getLogger("cbs_opt")


@dataclass(frozen=True)
class Plan:
    """The pruned tensors of a network.

    Attributes
    ----------
    model : torch.nn.Module
        The network with plain weights: itself, or a copy where some of its weights are computed from others.
    places : list of Place
    weights : float64 (n,)
        Effective values, in the order of the instance.
    masked : bool (n,)
        Weights that masks of the network keep at zero.
    """

    model: nn.Module
    places: list[Place]
    weights: FloatArray
    masked: BoolArray

    @property
    def names(self) -> list[str]:
        """The tensors that are pruned, by their first names."""
        return [place.name for place in self.places]

    @property
    def zeros(self) -> BoolArray:
        """Weights that are zero already, bool (n,)."""
        return np.asarray(self.weights == 0)

    def fixed(self, keep_zeros: bool) -> NDArray[np.int8] | None:
        """1 for what must stay zero: masked weights, and all zeros where these are to be kept; else None."""
        must = self.zeros & (self.masked | keep_zeros)
        return must.astype(np.int8) if must.any() else None


def make_plan(
    model: nn.Module,
    names: Sequence[str] | None,
    exclude: Sequence[str] | None,
    *,
    source: str,
    run: Callable[[nn.Module], Iterable[object]],
    log: bool = True,
    whole: bool = False,
) -> Plan:
    """Choose the tensors to prune, and lay them out.

    Parameters
    ----------
    model : torch.nn.Module
    names, exclude : sequence of str, optional
        Names and patterns, see `prunable.matches`. The order of exact names is kept.
    source : {"fisher", "reconstruction", "kfac"}
        For the latter two, tensors whose curvature cannot be computed are omitted.
    run : callable
        Runs a network on a sample, and on more of them while it is iterated; see `reconstruction.followed`.
    log : bool
        Whether what is pruned is logged.
    whole : bool
        Whether tensors that none of the samples reaches belong to the plan all the same.

    Raises
    ------
    UsageError
        For names that are not there or twice there, or when nothing is left to prune.
    InstanceError
        For weights that are not finite.
    """
    without = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if without is not None:
        raise UsageError(f"'{without}' has no values (device meta): load the weights before")
    plain = plain_model(unwrapped(model))
    default = select(plain.model)
    chosen = _in_order(default.chosen(names, exclude), names) if names is not None or exclude else default
    if not chosen.tensors:
        raise UsageError(_nothing(default))
    by_rows = source != "fisher"
    if by_rows or not set(chosen.tensors) <= set(default.tensors):
        what = {"kfac": "curvature by kfac", "reconstruction": "reconstruction error"}.get(source)
        chosen = _followed(plain.model, chosen, run, what, whole=whole, log=log)
    parameters = dict(plain.model.named_parameters())
    if log:
        partly = any(parameter.requires_grad for parameter in parameters.values())
        chosen.log({name for name in chosen.names if partly and not parameters[name].requires_grad})
    for tensor in chosen.tensors:
        if not bool(torch.isfinite(parameters[tensor.name].detach().float()).all()):
            raise InstanceError(f"'{tensor.name}' must hold finite real numbers")
    laid = places(
        [
            (t.name, t.layout, t.aliases, str(parameters[t.name].dtype).removeprefix("torch."))
            for t in chosen.tensors
        ]
    )
    weights, masked = [], []
    for place in laid:
        flat = parameters[place.name].detach().cpu().double().reshape(-1)
        weights.append(place.layout.to_rows(flat).numpy())
        mask = next((plain.masks[n] for n in (place.name, *place.aliases) if n in plain.masks), None)
        none = torch.zeros(place.layout.size, dtype=torch.bool)
        masked.append(place.layout.to_rows(none if mask is None else mask.cpu().reshape(-1)).numpy())
    return Plan(plain.model, laid, np.concatenate(weights), np.concatenate(masked))


def with_zeros(budget: Budget, fixed: NDArray[np.int8] | None, *, log: bool = True) -> Budget:
    """The budget, raised where more weights must stay zero than it would prune; with `log`, the log says so."""
    if fixed is None:
        return budget
    if budget.cross_groups is not None:
        check_room(budget, fixed, "keeping the weights at zero that are zero already")
        return budget
    n = fixed.size
    groups: IntArray = np.zeros(n, np.int64) if budget.groups is None else np.asarray(budget.groups)
    old = np.array([budget.total]) if budget.group_budgets is None else np.asarray(budget.group_budgets)
    new = np.maximum(old, np.bincount(groups[fixed == 1], minlength=old.size))
    if (new == old).all():
        return budget
    where = "" if budget.groups is None else f" in {np.count_nonzero(new > old)} of {old.size} groups"
    logger.log(
        logging.WARNING if log else logging.DEBUG,
        f"more weights are kept at zero than the budget prunes{where}: {int(new.sum())} of {n} weights "
        f"({new.sum() / n:.1%}) are pruned in place of {int(old.sum())} ({old.sum() / n:.1%})",
    )
    if budget.groups is None:
        return Budget(int(new[0]))
    return Budget(int(new.sum()), budget.groups, new)


def _in_order(selection: Selection, names: Sequence[str] | None) -> Selection:
    """The tensors in the order of the names, where all names are exact and none is named twice."""
    if names is None:
        return selection
    owner = {name: tensor for tensor in selection.tensors for name in tensor.names}
    if not all(name in owner for name in names):
        return selection
    wanted = [owner[name] for name in names]
    if len(set(wanted)) < len(wanted):
        raise UsageError("a parameter is named twice")
    return replace(selection, tensors=tuple(wanted))


def _followed(
    model: nn.Module,
    selection: Selection,
    run: Callable[[nn.Module], Iterable[object]],
    what: str | None,
    *,
    whole: bool,
    log: bool,
) -> Selection:
    """Trace samples to see how tensors are multiplied; omit those that cannot be traced and thus have no `what`.

    None needs no trace, and nothing is omitted.
    """
    layouts = {tensor.name: tensor.layout for tensor in selection.tensors}
    _, reasons = followed(model, run, layouts)
    for turn in (0, 1):  # other orders in which a tensor may be stored
        other = {
            name: orders[turn]
            for name, reason in reasons.items()
            if reason != UNUSED and turn < len(orders := _orders(layouts[name]))
        }
        turned, _ = followed(model, run, other) if other else ([], {})
        for name in turned:
            layouts[name] = other[name]
            del reasons[name]
    tensors = tuple(Prunable(t.name, t.aliases, layouts[t.name]) for t in selection.tensors)
    selection = replace(selection, tensors=tensors)
    if what is None:
        return selection
    if whole:
        reasons = {name: reason for name, reason in reasons.items() if reason != UNUSED}
    left = selection.without({name: f"no {what}: {reason}" for name, reason in reasons.items()})
    for name, reason in reasons.items():
        level = logging.WARNING if log else logging.DEBUG
        logger.log(level, f"{name} is left out, its {what} cannot be computed: {reason}")
    if not left.tensors:
        first = selection.tensors[0].name
        raise UsageError(
            f"no tensor has a {what} that can be computed ('{first}': {reasons[first]}): "
            "`--source fisher` needs none"
        )
    return left


def _orders(layout: Layout) -> list[Layout]:
    """Other orders of the rows and inputs of a tensor that is a matrix or a stack of matrices."""
    if len(layout.shape) == 2:
        return [Layout(layout.shape, inputs_first=not layout.inputs_first)]
    if len(layout.shape) == 3 and not layout.stacked:
        return [Layout(layout.shape, inputs_first=first, stacked=True) for first in (False, True)]
    return []


def _nothing(selection: Selection) -> str:
    tensors = [left.names[0] for left in selection.left_out if left.tensor and len(left.tensor.layout.shape) > 1]
    known = f": name some of {', '.join(tensors[:6])} by `--tensors`" if tensors else ""
    axes = "" if tensors else ", and no parameter with two axes or more"
    return f"the network has no layer whose weights are pruned by default{axes}{known}"
