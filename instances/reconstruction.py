"""The layer-wise reconstruction error: how much a layer's output changes when its weights do.

For one output row with weights w, whose layer has inputs X (K, places of m samples), the squared error of the
output is ‖δᵀX‖² = δᵀXXᵀδ. As ½δᵀHδ is the loss everywhere in this package, H = XXᵀ/m: the loss is half the
squared error of the layer's output, summed over places and averaged over samples. Optimal Brain Compression
[1]_ and SparseGPT [2]_ use the same matrix, up to a constant factor; all rows of a layer share it.

.. [1] Frantar, Singh, Alistarh: Optimal Brain Compression, NeurIPS 2022.
.. [2] Frantar, Alistarh: SparseGPT, ICML 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.instances.batches import Samples, call, placed, slices
from cbs_opt.instances.gradients import CHUNK_BYTES, chunk_size
from cbs_opt.instances.modes import evaluation_mode
from cbs_opt.instances.layers import Layer, columns, layer_of, tapped
from cbs_opt.typing import FloatArray


def reconstruction_layers(model: nn.Module, names: Sequence[str]) -> list[Layer]:
    """The layers whose weights are named.

    Raises
    ------
    UsageError
        For a parameter that is not the weight of a plain linear or two-dimensional convolutional layer.
    """
    layers = []
    for name in names:
        found = layer_of(model, name)
        if found is None or found[1] != "weight":
            raise UsageError(
                f"the reconstruction error needs weights of plain Linear or Conv2d layers, which '{name}' is not"
            )
        layers.append(found[0])
    return layers


def input_covariances(
    model: nn.Module,
    inputs: Samples,
    names: Sequence[str],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Callable[[int], None] = lambda done: None,
) -> list[FloatArray]:
    """XXᵀ/m of the inputs X of each named layer.

    Parameters
    ----------
    model : torch.nn.Module
        Runs in evaluation mode.
    inputs : (m, …)
        A tensor, or anything with a length whose slices are tensors.
    names : sequence of str
        Weights of linear and convolutional layers.
    chunk_bytes : int
        Memory for the activations and patches of one piece.
    progress : callable, optional
        Gets the number of samples done.

    Returns
    -------
    list of float64 (G, K, K)
        For each layer; G = 1 but for grouped convolutions, K the weights of an output row.

    Raises
    ------
    UsageError
        For a parameter that is not the weight of such a layer.
    InstanceError
        When a layer is not called, or its inputs are not finite.

    Notes
    -----
    Sums are kept in float64. O(m · places · K²) time a layer.
    """
    layers = reconstruction_layers(model, names)
    sums: list[Tensor | None] = [None] * len(layers)
    with evaluation_mode(model), torch.no_grad():
        size = chunk_size(model, placed(inputs[:1], model), (), chunk_bytes)
        for part in slices(inputs, size):
            with tapped(layers, graph=False) as record:
                call(model, placed(inputs[part], model))
            for number, layer in enumerate(layers):
                for passage in record[layer]:
                    X = _patches(layer, passage.inputs)
                    product = X @ X.transpose(1, 2)
                    before = sums[number]
                    sums[number] = product if before is None else before.add_(product)
            progress(part.stop)
    out = []
    for name, total in zip(names, sums, strict=True):
        if total is None:
            raise InstanceError(f"the layer of '{name}' is never called: it has no inputs to reconstruct from")
        covariance = (total / len(inputs)).cpu().numpy()
        if not np.isfinite(covariance).all():
            raise InstanceError(
                f"the inputs of the layer of '{name}' are not finite: check the data and the checkpoint"
            )
        out.append((covariance + covariance.swapaxes(1, 2)) / 2)
    return out


def _patches(layer: Layer, a: Tensor) -> Tensor:
    """X (G, K, places of all samples), float64."""
    if isinstance(layer, nn.Conv2d):
        patches = columns(layer, a)
        return patches.permute(1, 2, 0, 3).flatten(2).double()
    return a.reshape(1, -1, a.shape[-1]).transpose(1, 2).double()
