"""The instances of a stage: one quadratic model, with every damping and every division of the budget tried."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from cbs_opt.budget import Budget
from cbs_opt.curvature import Curvature, GradientFactor, HessianBlocks, SharedBlocks
from cbs_opt.errors import UsageError
from cbs_opt.instance import Instance
from cbs_opt.instances.data import SampleSource
from cbs_opt.instances.export import Export, Progress
from cbs_opt.instances.recipe import Recipe
from cbs_opt.instances.scores import Judge
from cbs_opt.instances.tensors import read_places
from cbs_opt.losses import predicted_loss
from cbs_opt.pruning.method import Method
from cbs_opt.typing import FloatArray

logger = logging.getLogger("cbs_opt")

_EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Problem:
    """A quadratic model of the network, with one damping and one division of the budget.

    Attributes
    ----------
    instance : Instance
        Its budget is not that of the stage yet.
    damping : float
        Of the grid, relative or not as the method says.
    split : str
        "global", "layer" or "normalised".
    first_order_scale : float
        By which the gradient of the loss was multiplied.
    """

    instance: Instance
    damping: float
    split: str
    first_order_scale: float = 1.0


def exported(
    model: nn.Module,
    source: SampleSource,
    names: Sequence[str],
    recipe: Recipe,
    judge: Judge,
    *,
    device: str,
    dense: bool = True,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Instance:
    """The quadratic model around the weights that the network has, with the damping of the recipe.

    `dense` says whether nothing of it is pruned yet.
    """
    job = Export(
        model,
        source.inputs,
        source.labels,
        names,
        recipe,
        device=device,
        progress=progress,
        should_stop=should_stop,
        judge=judge,
        dense=dense,
    )
    return job.instance()


def problems(instance: Instance, method: Method, dampings: Sequence[float]) -> Iterator[Problem]:
    """All variants, those of one division together.

    Parameters
    ----------
    instance : Instance
        With the first of the dampings.
    method : Method
    dampings : sequence of float
    """
    splits: list[str] = [method.split]
    if method.split == "auto":
        splits = ["global", "layer"] + (["normalised"] if method.source != "fisher" else [])
    for split in splits:
        for damping in dampings:
            damped = instance
            if damping != dampings[0]:
                damped = redamped(instance, dampings[0], damping, relative=method.relative)
            if split == "normalised":
                damped = normalised(damped)
            for scale in method.first_order_scales:
                linear = None if damped.linear is None or scale == 0 else scale * damped.linear
                yield Problem(damped if scale == 1 else replace(damped, linear=linear), damping, split, scale)


def redamped(instance: Instance, old: float, new: float, *, relative: bool) -> Instance:
    """The same quadratic model with another damping.

    Parameters
    ----------
    instance : Instance
        With gradients or Hessian blocks.
    old, new : float
        Of the grid; `old` is not 0 where they are relative.
    relative : bool
        Whether they are multiples of the mean diagonal; the absolute ones are then noted in the metadata.
    """
    factor = new / old if relative else 1.0
    curvature = instance.curvature
    if isinstance(curvature, GradientFactor):
        return instance.with_damping(curvature.damping * factor if relative else new)
    before = damping_of_layers(instance)
    shift = before * (factor - 1.0) if relative else np.full(before.size, new - old)
    stored = stored_blocks(curvature)
    of_stored = np.zeros(stored.number_of_blocks, np.int64)
    of_stored[shared_index(curvature)] = layer_of_blocks(instance)
    blocks = []
    for k in range(stored.number_of_blocks):
        block = stored.block(k).copy()
        # What was added before cannot be taken away exactly: a zero row would become negative.
        rounding = 2 * _EPSILON * float(block.diagonal().max()) if shift[of_stored[k]] < 0 else 0.0
        block[np.diag_indices_from(block)] += shift[of_stored[k]] + rounding
        blocks.append(block)
    form: Curvature = HessianBlocks.from_blocks(blocks)
    if isinstance(curvature, SharedBlocks):
        form = SharedBlocks(form, curvature.shared, curvature.block_scale)
    after = (before + shift).tolist()
    noted = after[0] if np.isscalar(instance.metadata["damping"]) else after
    return replace(instance, curvature=form, metadata={**instance.metadata, "damping": noted})


def damping_of_layers(instance: Instance) -> FloatArray:
    """The damping in the dense blocks of each tensor, float64."""
    noted, count = instance.metadata["damping"], len(read_places(instance))
    return np.full(count, noted, np.float64) if np.isscalar(noted) else np.asarray(noted, np.float64)


def undamped_loss(instance: Instance, delta: FloatArray) -> float:
    """The change of the loss by the quadratic model without its damping, which is no part of the loss.

    Parameters
    ----------
    instance : Instance
        With gradients or Hessian blocks.
    delta : float64 (n,)
        The change of the weights.
    """
    curvature = instance.curvature
    if isinstance(curvature, GradientFactor):
        return predicted_loss(instance.with_damping(0.0), delta)
    damping = damping_of_layers(instance)[layer_of_blocks(instance)]
    if isinstance(curvature, SharedBlocks):
        damping = damping * curvature.block_scale
    value = predicted_loss(instance, delta) - 0.5 * float(np.repeat(damping, curvature.block_sizes) @ delta**2)
    return value if instance.linear is not None else max(value, 0.0)


def normalised(instance: Instance) -> Instance:
    """Errors of each layer divided by what the loss of the whole layer would be, ½ wᵀHw of all its weights.

    The first-order term is divided likewise: the best update of a selection stays what it is.
    """
    curvature = instance.curvature
    layers = layer_of_blocks(instance)
    sizes = np.zeros(int(layers.max()) + 1)
    for k in range(curvature.number_of_blocks):
        w = instance.weights[curvature.block_slice(k)]
        sizes[layers[k]] += curvature.block_quadratic(k, w)
    factor = 1.0 / np.where(sizes > 0, sizes, 1.0)
    scale = factor[layers]
    if isinstance(curvature, SharedBlocks):
        form = SharedBlocks(curvature.stored, curvature.shared, curvature.block_scale * scale)
    else:
        form = SharedBlocks(curvature, np.arange(curvature.number_of_blocks), scale)
    linear = instance.linear
    if linear is not None:
        linear = linear * np.repeat(scale, curvature.block_sizes)
    return replace(instance, curvature=form, linear=linear)


def of_layers(instance: Instance, total: int, fixed: NDArray[np.int8] | None) -> Budget:
    """The same fraction of every layer, `total` weights in all."""
    sizes = np.array([place.layout.size for place in read_places(instance)], np.int64)
    most = sizes.copy()
    least = np.zeros_like(sizes)
    group = np.repeat(np.arange(sizes.size), sizes)
    if fixed is not None:
        least = np.bincount(group[fixed == 1], minlength=sizes.size).astype(np.int64)
        most -= np.bincount(group[fixed == -1], minlength=sizes.size).astype(np.int64)
    wanted = total * sizes / sizes.sum()
    counts = np.clip(np.floor(wanted + 1e-9).astype(np.int64), least, most)
    step = 1 if counts.sum() < total else -1
    order = np.argsort(-step * (wanted - counts), kind="stable")
    while counts.sum() != total:  # a few weights, unless fixed ones leave less freedom
        free = [k for k in order if least[k] <= counts[k] + step <= most[k]]
        if not free:
            raise UsageError("fixed weights leave no way to prune the same fraction of every layer")
        for k in free[: abs(total - int(counts.sum()))]:
            counts[k] += step
    return Budget(total, group, counts)


def stored_blocks(curvature: Curvature) -> Curvature:
    """The blocks that are stored."""
    return curvature.stored if isinstance(curvature, SharedBlocks) else curvature


def shared_index(curvature: Curvature) -> NDArray[np.int64]:
    """The stored block of each block, int64 (K,)."""
    return curvature.shared if isinstance(curvature, SharedBlocks) else np.arange(curvature.number_of_blocks)


def layer_of_blocks(instance: Instance) -> NDArray[np.int64]:
    """The tensor of each block, int64 (K,)."""
    starts = np.array([place.start for place in read_places(instance)], np.int64)
    offsets = np.asarray(instance.curvature.offsets[:-1], np.int64)
    return np.asarray(np.searchsorted(starts, offsets, side="right") - 1, np.int64)


def scaled_update(instance: Instance, pruned: NDArray[np.bool_], updated: FloatArray, scale: float) -> FloatArray:
    """Weights w + scale · (ŵ − w) on the kept weights, 0 on the others, float64 (n,)."""
    moved = instance.weights + scale * (updated - instance.weights)
    return np.where(pruned, 0.0, moved)
