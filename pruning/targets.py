"""Layers that make up for earlier errors: the dense network's outputs as targets, all layers or one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from cbs_opt.budget import Budget
from cbs_opt.curvature import Curvature, HessianBlocks, SharedBlocks
from cbs_opt.instance import Instance
from cbs_opt.instances.data import SampleSource
from cbs_opt.instances.output_errors import output_error_gradients
from cbs_opt.instances.reconstruction import UnreachedError, input_covariances
from cbs_opt.instances.row_blocks import RowBlocks, row_blocks
from cbs_opt.instances.tensors import Place, read_places
from cbs_opt.pruning.network import WorkingCopy
from cbs_opt.result import Result
from cbs_opt.typing import BoolArray, FloatArray

logger = logging.getLogger("cbs_opt")


def with_dense_targets(instance: Instance, model: nn.Module, dense: nn.Module, samples: SampleSource) -> Instance:
    """The instance with the gradient of the layers' errors as first-order term.

    Parameters
    ----------
    instance : Instance
        Of reconstruction or kfac, around the weights of `model`.
    model, dense : torch.nn.Module
    samples : SampleSource
        Those of the instance.
    """
    places = read_places(instance)
    found = output_error_gradients(model, dense, samples.inputs, {place.name: place.layout for place in places})
    linear = np.concatenate([found[place.name].ravel() for place in places])
    return replace(instance, linear=linear * _scale_of_weights(instance.curvature))


def one_by_one(
    copy: WorkingCopy,
    dense: nn.Module,
    instance: Instance,
    result: Result,
    samples: SampleSource,
    solver: Callable[[Instance], Result],
) -> tuple[BoolArray, FloatArray]:
    """Solve layer after layer, each with the inputs that the layers pruned before give it.

    Each layer, and each group of the budget within it, prunes as many weights as in the solution of all layers.

    Parameters
    ----------
    copy : WorkingCopy
        With the weights of the instance; those of the solution afterwards.
    dense : torch.nn.Module
        Its outputs are the targets.
    instance : Instance
        Of reconstruction or kfac, with the budget of the stage.
    result : Result
        Of that instance.
    samples : SampleSource
    solver : callable
        Solves the instance of a layer.

    Returns
    -------
    pruned : bool (n,)
    weights : float64 (n,)
    """
    pruned, weights = result.pruned.copy(), instance.weights.copy()
    scales = _scale_of_weights(instance.curvature)
    noted = instance.metadata["damping"]
    places = read_places(instance)
    dampings = np.full(len(places), noted) if np.isscalar(noted) else np.asarray(noted)
    for place, damping in zip(places, dampings, strict=True):
        try:
            layer = _layer(copy, dense, instance, place, float(damping), scales, result.pruned, samples)
        except UnreachedError as error:
            logger.info(f"{place.name} stays as solved with all other layers: {error}")
            weights[place.part] = (instance.weights if result.weights is None else result.weights)[place.part]
            weights[place.part][result.pruned[place.part]] = 0.0
            copy.take(weights)
            continue
        if layer.budget.total:
            own = solver(layer)
            new = layer.weights if own.weights is None else own.weights
            pruned[place.part] = own.pruned
            weights[place.part] = np.where(own.pruned, 0.0, new)
        copy.take(weights)
    return pruned, weights


def _layer(
    copy: WorkingCopy,
    dense: nn.Module,
    instance: Instance,
    place: Place,
    damping: float,
    scales: FloatArray,
    pruned: BoolArray,
    samples: SampleSource,
) -> Instance:
    """The instance of one layer around its present weights."""
    layouts = {place.name: place.layout}
    covariances = input_covariances(copy.model, samples.inputs, layouts)
    factors = scales[place.part].reshape(place.layout.rows, -1)[:, 0]
    curvature = curvature_of(row_blocks(covariances, [damping], None, {place.name: factors}))
    errors = output_error_gradients(copy.model, dense, samples.inputs, layouts)[place.name].ravel()
    budget = instance.budget.of_part(place.part, pruned[place.part])
    if budget.number_of_groups == 1:
        budget = Budget(budget.total)
    fixed: NDArray[np.int8] | None = None if instance.fixed is None else instance.fixed[place.part]
    return Instance(
        instance.weights[place.part], curvature, budget, errors * scales[place.part], fixed, metadata={}
    )


def curvature_of(rows: RowBlocks) -> Curvature:
    """The Hessians of rows as a curvature."""
    form: Curvature = HessianBlocks.from_blocks(list(rows.matrices(inverse=False)))
    return form if rows.plain else SharedBlocks(form, rows.shared, rows.scale)


def _scale_of_weights(curvature: Curvature) -> FloatArray:
    """The factor of the block of each weight, float64 (n,)."""
    if not isinstance(curvature, SharedBlocks):
        return np.ones(curvature.n)
    return np.repeat(curvature.block_scale, curvature.block_sizes)
