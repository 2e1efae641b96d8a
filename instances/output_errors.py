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
        theirs, own = _rows(original, layouts), _rows(model, layouts)
        for part in slices(inputs, size):
            x = placed(inputs[part], model)
            targets: dict[str, deque[tuple[tuple[int, int], Tensor]]] = {name: deque() for name in layouts}

            def note(product: Product) -> None:
                if product.inputs is not None:
                    W = theirs[product.name][product.first : product.last]
                    targets[product.name].append(((product.first, product.last), W @ product.inputs()))  # noqa: B023

            with watched(original, layouts, note, reasons):
                checked_call(original, x)

            def compare(product: Product) -> None:
                if product.inputs is None:
                    return
                left = targets[product.name]  # noqa: B023
                rows, target = left.popleft() if left else (None, None)
                X = product.inputs()
                W = own[product.name][product.first : product.last]
                if rows != (product.first, product.last) or target is None or target.shape[1] != X.shape[1]:
                    different.add(product.name)  # noqa: B023
                    return
                error = ((W @ X - target) @ X.T).double().cpu()
                sums[product.name][product.first : product.last] += error

            with watched(model, layouts, compare, reasons):
                checked_call(model, x)
            refuse(reasons)
            different |= {name for name, left in targets.items() if left}
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


def _rows(model: nn.Module, layouts: Mapping[str, Layout]) -> dict[str, Tensor]:
    """Weights as (rows, K)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: layout.to_rows(parameters[name].detach().float().reshape(-1)).reshape(layout.rows, layout.inputs)
        for name, layout in layouts.items()
    }
