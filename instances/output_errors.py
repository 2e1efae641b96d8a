"""How far layers of a changed network are from the outputs of the original one, and the gradient of that error.

For a layer with weights W and inputs X in the changed network, and W₀ and X₀ in the original one, the error is
½‖WX − W₀X₀‖²/m, summed over places and averaged over samples. Its Hessian by a row of W is XXᵀ/m, that of
`reconstruction`; its gradient is (WX − W₀X₀)Xᵀ/m: with it as first-order term a layer makes up for the errors of
those before it, as in the asymmetric reconstruction of [1]_.

.. [1] He, Zhang, Sun: Channel pruning for accelerating very deep neural networks, ICCV 2017.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from cbs_opt.errors import InstanceError
from cbs_opt.instances.batches import Samples, checked_call, placed, slices, within_memory
from cbs_opt.instances.gradients import CHUNK_BYTES, chunk_size
from cbs_opt.instances.modes import evaluation_mode, fewest, single_precision
from cbs_opt.instances.products import Product
from cbs_opt.instances.reconstruction import UnreachedError, refuse, watched
from cbs_opt.instances.tensors import Layout
from cbs_opt.typing import FloatArray

logger = logging.getLogger("cbs_opt")


@within_memory
def output_error_gradients(
    model: nn.Module,
    original: nn.Module,
    inputs: Samples,
    layouts: Mapping[str, Layout],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, FloatArray]:
    """Gradient of the error of each layer's output by its weights.

    Parameters
    ----------
    model, original : torch.nn.Module
        Of the same form, on the same device; run in evaluation mode.
    inputs : (m, …)
        A tensor, or anything with a length whose slices are tensors.
    layouts : mapping of str to Layout
        The weights, by name.
    chunk_bytes : int
        Memory for the activations and patches of one chunk.
    progress : callable, optional
        Gets the number of samples done.

    Returns
    -------
    dict of str to float64 (rows, K)
        In the order of an instance. Uses as an embedding, or from the other side, count as having no error, and
        so do weights whose inputs the two networks choose differently, such as experts of a mixture.

    Raises
    ------
    UsageError
        For a weight whose products cannot be followed.
    UnreachedError
        When the two networks make the same products with none of the weights.
    InstanceError
        When an error is not finite.
    """
    sums = {name: torch.zeros(layout.rows, layout.inputs, dtype=torch.float64) for name, layout in layouts.items()}
    reasons: dict[str, str] = {}
    different: set[str] = set()
    with ExitStack() as stack:
        for network in (model, original):
            stack.enter_context(evaluation_mode(network))
            stack.enter_context(single_precision(network))
        stack.enter_context(torch.no_grad())
        first = placed(inputs[: fewest(model)], model)
        size = max(len(first), chunk_size(model, first, (), chunk_bytes // 2))
        targets, own = LayerOutputs(original, layouts), rows_of(model, layouts)

        def compare(product: Product) -> None:
            if product.inputs is None:
                return
            X = product.inputs()
            target = targets.take(product, X)
            if target is None:
                different.add(product.name)
                return
            W = own[product.name][product.first : product.last]
            sums[product.name][product.first : product.last] += ((W @ X - target) @ X.T).double().cpu()

        for part in slices(inputs, size):
            x = placed(inputs[part], model)
            targets.clear()
            with watched(original, layouts, targets.note, reasons):
                checked_call(original, x)
            with watched(model, layouts, compare, reasons):
                checked_call(model, x)
            refuse(reasons)
            different.update(targets.left)
            progress(part.stop)
    if different >= {*layouts}:
        raise UnreachedError("the network and the original one do not make the same products")
    for name in different:
        logger.info(
            f"{name}: the network chooses other inputs for it than the original one does: its outputs have no "
            "target, and count as having no error"
        )
        sums[name].zero_()
    out = {name: (total / len(inputs)).numpy() for name, total in sums.items()}
    for name, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise InstanceError(f"the inputs of the layer of '{name}' are not finite: check the data")
    return out


class LayerOutputs:
    """The outputs of the products of a network, by weight and in order: what those of another network aim at.

    Parameters
    ----------
    model : torch.nn.Module
        In single precision.
    layouts : mapping of str to Layout
        The weights, by name.
    """

    def __init__(self, model: nn.Module, layouts: Mapping[str, Layout]) -> None:
        self._weights = rows_of(model, layouts)
        self._of: dict[str, deque[tuple[tuple[int, int], Tensor]]] = {name: deque() for name in layouts}

    def note(self, product: Product) -> None:
        """Keep the outputs (rows, places) of a product of the network."""
        if product.inputs is not None:
            W = self._weights[product.name][product.first : product.last]
            self._of[product.name].append(((product.first, product.last), W @ product.inputs()))

    def take(self, product: Product, X: Tensor) -> Tensor | None:
        """The outputs of the next product by the weight; None where that has other rows or places than X."""
        left = self._of[product.name]
        rows, target = left.popleft() if left else (None, None)
        if rows != (product.first, product.last) or target is None or target.shape[1] != X.shape[1]:
            return None
        return target

    def rows(self, name: str) -> list[tuple[int, int]]:
        """The ranges of rows of the products by a weight that are left."""
        return [rows for rows, _ in self._of[name]]

    @property
    def left(self) -> list[str]:
        """Weights with products that were not taken."""
        return [name for name, products in self._of.items() if products]

    def clear(self, name: str | None = None) -> None:
        """Forget the products by a weight, or by all."""
        for each in self._of if name is None else (name,):
            self._of[each].clear()


def rows_of(model: nn.Module, layouts: Mapping[str, Layout]) -> dict[str, Tensor]:
    """Weights as (rows, K), float32."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: layout.to_rows(parameters[name].detach().float().reshape(-1)).reshape(layout.rows, layout.inputs)
        for name, layout in layouts.items()
    }
