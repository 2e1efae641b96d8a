"""The layer-wise reconstruction error: how much a layer's output changes when its weights do.

For one output row with weights w, whose layer has inputs X (K, places of m samples), the squared error of the
output is ‖δᵀX‖² = δᵀXXᵀδ. As ½δᵀHδ is the loss everywhere in this package, H = XXᵀ/m: the loss is half the
squared error of the layer's output, summed over places and averaged over samples. Optimal Brain Compression
[1]_ and SparseGPT [2]_ use the same matrix, up to a constant factor; all rows of a layer share it.

A place is each point where a weight is multiplied: a place of an image, a time step, a token, and every use of a
tensor that several layers share.

.. [1] Frantar, Singh, Alistarh: Optimal Brain Compression, NeurIPS 2022.
.. [2] Frantar, Alistarh: SparseGPT, ICML 2023.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.instances.batches import Samples, checked_call, placed, slices, within_memory
from cbs_opt.instances.gradients import CHUNK_BYTES, chunk_size
from cbs_opt.instances.modes import evaluation_mode, fewest, single_precision
from cbs_opt.instances.products import Product, Products
from cbs_opt.instances.prunable import select
from cbs_opt.instances.tensors import Layout
from cbs_opt.typing import FloatArray

logger = logging.getLogger("cbs_opt")

_PIECE_BYTES = 1 << 27  # of inputs that are converted to double precision at a time

_TRIED = 2048  # samples at most that are run to see which weights the network uses

UNUSED = "the network does not use it on these samples"
"""Why a weight has no reconstruction error that none of the samples reaches."""


class UnreachedError(InstanceError):
    """No sample reaches the layers, or not as in the network that they are compared with."""


@dataclass(frozen=True)
class RowRange:
    """Rows of a layer that share their inputs.

    Attributes
    ----------
    first, last : int
        The rows first … last − 1.
    covariance : float64 (K, K)
        XXᵀ/m of the inputs X of these rows.
    shifts : float64 (last − first,), or None
        Added to the diagonal, row by row, for uses of the weight as an embedding or from the other side.
    """

    first: int
    last: int
    covariance: FloatArray
    shifts: FloatArray | None = None


@dataclass(frozen=True)
class LayerCovariance:
    """The reconstruction Hessians of all rows of a layer, before they are copied row by row.

    Attributes
    ----------
    name : str
        Of the weight.
    layout : Layout
        `rows` rows of K = `inputs` weights; `to_rows` and `from_rows` lead to the tensor and back.
    ranges : tuple of RowRange
        In order; together all rows. One range for a linear layer, one for each group of a convolution, three for
        the projections of queries, keys and values.
    """

    name: str
    layout: Layout
    ranges: tuple[RowRange, ...]

    @property
    def mean_diagonal(self) -> float:
        """Mean diagonal entry of the Hessians of all rows."""
        total = 0.0
        for r in self.ranges:
            shift = 0.0 if r.shifts is None else float(r.shifts.mean())
            total += (r.last - r.first) * (float(r.covariance.diagonal().mean()) + shift)
        return total / max(self.layout.rows, 1)


def passes(model: nn.Module, samples: Samples) -> Iterator[object]:
    """Run a network on one sample, then on more of them, as long as it is asked: at most 2048 in all."""
    few = fewest(model)
    first = placed(samples[:few], model)
    yield checked_call(model, first)
    most = min(len(samples), _TRIED)
    for part in slices(samples, max(few, chunk_size(model, first, (), CHUNK_BYTES)), few, most):
        yield checked_call(model, placed(samples[part], model))


def followed(
    model: nn.Module, run: Callable[[nn.Module], Iterable[object]], weights: Mapping[str, Layout]
) -> tuple[list[str], dict[str, str]]:
    """Which weights have a reconstruction error that can be computed, by few samples through the network.

    Parameters
    ----------
    model : torch.nn.Module
        Runs in evaluation mode.
    run : callable
        Runs the network on a sample, and on more of them while it is iterated, such as `passes`. This goes on as
        long as weights have not been used: which experts of a mixture work depends on the sample.
    weights : mapping of str to Layout

    Returns
    -------
    names : list of str
    reasons : dict of str to str
        Of all others: why not.
    """
    seen: set[tuple[str, bool]] = set()
    reasons: dict[str, str] = {}

    def note(product: Product) -> None:
        use = (product.name, product.across)
        if product.inputs is not None and use not in seen:
            product.inputs()  # whatever cannot be made of this network must show now
        seen.add(use)

    with ExitStack() as stack:
        for state in (evaluation_mode(model), single_precision(model), torch.no_grad()):
            stack.enter_context(state)
        stack.enter_context(watched(model, weights, note, reasons))  # knows the tensors in the state just entered
        for _ in run(model):
            if {name for name, _ in seen} | {*reasons} >= {*weights}:
                break
    for name in weights:
        if (name, False) not in seen and name not in reasons:
            across = (name, True) in seen
            reasons[name] = "it is multiplied from the other side" if across else UNUSED
    return [name for name in weights if name not in reasons], reasons


@within_memory
def input_covariances(
    model: nn.Module,
    inputs: Samples,
    names: Sequence[str] | Mapping[str, Layout],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Callable[[int], None] = lambda done: None,
) -> list[LayerCovariance]:
    """XXᵀ/m of the inputs X of each named weight.

    A weight that no sample reaches, such as an expert of a mixture that is never chosen, gets a multiple of the
    identity at the level of the others; the log says so.

    Parameters
    ----------
    model : torch.nn.Module
        Runs in evaluation mode.
    inputs : (m, …)
        A tensor, or anything with a length whose slices are tensors.
    names : sequence of str, or mapping of str to Layout
        Weights, and how they are laid out where that is known already.
    chunk_bytes : int
        Memory for the activations and patches of one chunk.
    progress : callable, optional
        Gets the number of samples done.

    Returns
    -------
    list of LayerCovariance

    Raises
    ------
    UsageError
        For a weight that is multiplied in a way that cannot be followed.
    UnreachedError
        When none of the weights is used.
    InstanceError
        When inputs are not finite.

    Notes
    -----
    Sums are kept in float64. O(m · places · K²) time a layer.
    """
    layouts = names if isinstance(names, Mapping) else _layouts(model, names)
    sums = {name: _Sums(layout) for name, layout in layouts.items()}
    reasons: dict[str, str] = {}
    with evaluation_mode(model), single_precision(model), torch.no_grad():
        first = placed(inputs[: fewest(model)], model)
        checked_call(model, first)
        size = max(len(first), chunk_size(model, first, (), chunk_bytes))
        for part in slices(inputs, size):
            with watched(model, layouts, lambda product: sums[product.name].add(product), reasons):
                checked_call(model, placed(inputs[part], model))
            refuse(reasons)
            progress(part.stop)
    return _completed([sums.pop(name).covariance(name, len(inputs)) for name in list(sums)])


def _completed(layers: list[LayerCovariance]) -> list[LayerCovariance]:
    """The layers, with uncorrelated inputs of the mean square of the others' for those that were not called."""
    levels = [layer.mean_diagonal for layer in layers if layer.ranges]
    if not levels:
        raise UnreachedError("none of the layers is called: they have no inputs to reconstruct from")
    out = []
    for layer in layers:
        if not layer.ranges:
            logger.warning(
                f"{layer.name}: no sample reaches it: its inputs count as uncorrelated, with the mean square of "
                "those of the other layers"
            )
            inputs = float(np.mean(levels)) * np.eye(layer.layout.inputs)
            layer = replace(layer, ranges=(RowRange(0, layer.layout.rows, inputs),))
        out.append(layer)
    return out


def refuse(reasons: Mapping[str, str]) -> None:
    """Raise `UsageError` for the first weight whose products cannot be followed, if there is one."""
    for name, reason in reasons.items():
        raise UsageError(f"'{name}' has no reconstruction error that can be computed: {reason}")


def _layouts(model: nn.Module, names: Sequence[str]) -> dict[str, Layout]:
    selection = select(model)
    known = {tensor.name: tensor.layout for tensor in selection.tensors}
    known |= {left.tensor.name: left.tensor.layout for left in selection.left_out if left.tensor is not None}
    for name in names:
        if name not in known:
            raise UsageError(f"the network has no weight '{name}'")
    return {name: known[name] for name in names}


def watched(
    model: nn.Module,
    layouts: Mapping[str, Layout],
    report: Callable[[Product], None],
    reasons: dict[str, str],
) -> Products:
    """Report the products of weights in a forward pass; why others cannot be followed goes to `reasons`."""
    parameters = dict(model.named_parameters())
    weights = {name: (parameters[name].detach(), layout) for name, layout in layouts.items()}

    def refuse(name: str, reason: str) -> None:
        reasons.setdefault(name, reason)

    return Products(weights, report, refuse)


@dataclass
class _Sums:
    """What has been seen of the inputs of one weight, by ranges of rows."""

    layout: Layout
    products: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    counts: Tensor | None = None

    def add(self, product: Product) -> None:
        if product.counts is not None:
            counts = product.counts(None)
            if self.counts is None:
                self.counts = torch.zeros(self.layout.rows, dtype=torch.float64, device=counts.device)
            self.counts[product.first : product.last] += counts
        if product.inputs is None:
            return
        key, X = (product.first, product.last), product.inputs()
        K, places = X.shape
        total = self.products.get(key)
        if total is None:
            total = self.products[key] = torch.zeros(K, K, dtype=torch.float64, device=X.device)
        step = max(1, _PIECE_BYTES // (8 * K))
        for start in range(0, places, step):
            piece = X[:, start : start + step].double()
            total.addmm_(piece, piece.T)

    def covariance(self, name: str, samples: int) -> LayerCovariance:
        """Split the rows where a range ends, and sum the inputs of each part; none if none was seen."""
        rows, K = self.layout.rows, self.layout.inputs
        if not self.products and self.counts is None:
            return LayerCovariance(name, self.layout, ())
        edges = sorted({0, rows} | {edge for key in self.products for edge in key})
        counts = None if self.counts is None else self.counts.cpu().numpy() / samples
        ranges = []
        for first, last in pairwise(edges):
            total = np.zeros((K, K))
            for (low, high), product in self.products.items():
                if low <= first and last <= high:
                    total += product.cpu().numpy()
            total = (total + total.T) / (2 * samples)
            if not np.isfinite(total).all():
                raise InstanceError(
                    f"the inputs of the layer of '{name}' are not finite: check the data and the checkpoint"
                )
            ranges.append(RowRange(first, last, total, None if counts is None else counts[first:last]))
        return LayerCovariance(name, self.layout, tuple(ranges))
