"""The mean squared gradient of the loss by the output of every row: the second factor of K-FAC.

Every product that the network makes with a weight is seen where torch is called (`products`); its result is noted,
and the loss is differentiated by it. Calls that hide their products are written out (`unfused`); functions with a
backward pass of their own run once more (`autograd_functions`). A block of the network without gradients
(`torch.no_grad`) is differentiated all the same: the loss depends on its weights, whoever trains them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cbs_opt.errors import InstanceError, UsageError
from cbs_opt.instances.autograd_functions import functions_seen
from cbs_opt.instances.batches import Samples, call, checked_call, moved, placed, reason, slices, within_memory
from cbs_opt.instances.gradients import CHUNK_BYTES, chunk_size
from cbs_opt.instances.modes import evaluation_mode, fewest, outside_inference, single_precision
from cbs_opt.instances.products import Product, Products
from cbs_opt.instances.tensors import Layout
from cbs_opt.instances.unfused import UNFUSED
from cbs_opt.instances.views import NotFollowed
from cbs_opt.typing import FloatArray

logger = logging.getLogger("cbs_opt")

Terms = Callable[[Any, Any], Iterator[Tensor]]
"""Outputs and targets of a few samples → losses, whose squared gradients are added up."""


@dataclass(frozen=True)
class RowGradients:
    """What the gradients by the outputs of a weight's rows say.

    Attributes
    ----------
    squares : float64 (rows,)
        Mean of g_r² over samples and places; 0 for a row that is used nowhere.
    places : float64 (rows,)
        Number of places of a sample; 0 throughout for a tensor that is looked up only.
    shifts : float64 (rows,)
        What every diagonal entry of a row gains by uses of the weight as an embedding or from the other side: the
        sum over places of x_r² g_j², averaged over samples and the outputs j.
    variances : float64 (rows,)
        Of the mean `squares`, as an estimate from places taken for independent: those of one sample are not, and
        it is then too small. Infinite where there is one place only.
    """

    squares: FloatArray
    places: FloatArray
    shifts: FloatArray
    variances: FloatArray


class TracedProducts(Products):
    """Note the products of weights with their results, so that a loss can be differentiated by the latter.

    Parameters
    ----------
    weights, refuse
        As for `Products`.
    everywhere : bool
        Whether blocks of the network without gradients have them all the same.

    Attributes
    ----------
    seen : list of (Tensor, list of Product)
        Results that are part of the graph, and the products within.
    muted : bool
        Whether products are ignored.
    hidden : str or None
        The function without a graph that is running, whose products are refused.
    """

    def __init__(
        self,
        weights: Mapping[str, tuple[Tensor, Layout]],
        refuse: Callable[[str, str], None],
        everywhere: bool = True,
    ) -> None:
        super().__init__(weights, self._note, refuse)
        self.seen: list[tuple[Tensor, list[Product]]] = []
        self.muted, self.hidden = False, None
        self._new: list[Product] = []
        self._everywhere = everywhere

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Write a call out that hides its products, and note those of all others."""
        kwargs = kwargs or {}
        if self.muted:
            return func(*args, **kwargs)
        if self._everywhere and getattr(func, "__name__", "") == "_set_grad_enabled" and not args[0]:
            return None
        unfused = UNFUSED.get(getattr(func, "__name__", ""))
        if unfused is not None and self.names_in(args, kwargs):
            with self:
                return unfused(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is a weight, or a part of one."""
        return bool(self.names_in((tensor,), {}))

    def _note(self, product: Product) -> None:
        if self.hidden is not None:
            raise NotFollowed(
                f"it is multiplied in the function {self.hidden}, which cannot be differentiated twice"
            )
        self._new.append(product)

    def result_of(self, result: Any) -> Any:
        """A copy of the result, which the network may change in place."""
        products, self._new = self._new, []
        if not products or not isinstance(result, Tensor):
            return result
        traced = result if result.requires_grad else result.detach().requires_grad_()
        self.seen.append((traced, products))
        return traced.clone()


@outside_inference()
@within_memory
def row_gradients(
    model: nn.Module,
    inputs: Samples,
    targets: Samples | None,
    layouts: Mapping[str, Layout],
    terms: Terms,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, RowGradients]:
    """The mean squared gradient of each row of the named weights.

    Parameters
    ----------
    model : torch.nn.Module
        Runs in evaluation mode.
    inputs, targets : (m, …)
        The targets may be None where `terms` needs none.
    layouts : mapping of str to Layout
        The weights, by name.
    terms : callable
        Yields for the outputs and targets of some samples one loss after the other, each the sum of those of the
        samples: the squares of their gradients are added up, see `fisher_terms`.
    chunk_bytes : int
        Memory for the activations of one piece.
    progress : callable, optional
        Gets the number of samples done.

    Raises
    ------
    UsageError
        For a weight whose outputs cannot be followed.
    InstanceError
        When the loss cannot be differentiated, or a gradient is not finite.

    Notes
    -----
    One forward pass of each sample, and one backward pass for each loss that `terms` yields.
    """
    sums = {name: _Sums(layout) for name, layout in layouts.items()}
    parameters = dict(model.named_parameters())
    reasons: dict[str, str] = {}
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(single_precision(model))
        device = next(model.parameters()).device
        if device.type == "cuda":  # cuDNN differentiates recurrent layers in training mode only
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        weights = {name: (parameters[name].detach(), layout) for name, layout in layouts.items()}
        size = max(fewest(model), chunk_size(model, placed(inputs[: fewest(model)], model), (), chunk_bytes))
        for part in slices(inputs, size):
            x = placed(inputs[part], model)
            y = None if targets is None else moved(targets[part], device)
            with torch.enable_grad():
                traced, outputs = _traced(model, x, weights, lambda name, reason: reasons.update({name: reason}))
                if reasons:
                    name, why = next(iter(reasons.items()))
                    raise UsageError(f"'{name}' has no output gradients that can be computed: {why}")
                _add(traced, sums, terms(outputs, y))
            progress(part.stop)
    return {name: total.gradients(name, len(inputs)) for name, total in sums.items()}


def _traced(
    model: nn.Module, x: Any, weights: Mapping[str, tuple[Tensor, Layout]], refuse: Callable[[str, str], None]
) -> tuple[TracedProducts, Any]:
    """The products of a forward pass, and the outputs of the network."""
    traced = TracedProducts(weights, refuse)
    try:
        with functions_seen(traced), traced:
            return traced, call(model, x)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the network changes tensors where it has no gradients: it must not have any there
        logger.debug("kfac: blocks of the network without gradients stay without")
    finally:
        for buffer in model.buffers():
            if buffer.requires_grad and not buffer.is_leaf:
                buffer.detach_()
    traced = TracedProducts(weights, refuse, everywhere=False)
    with functions_seen(traced), traced:
        return traced, checked_call(model, x)


def _add(traced: TracedProducts, sums: Mapping[str, _Sums], losses: Iterator[Tensor]) -> None:
    """Add the squared gradients of all losses by the results of one forward pass."""
    results = [result for result, _ in traced.seen]
    for result, products in traced.seen:
        for product in products:
            if product.counts is None:
                sums[product.name].places[product.first : product.last] += product.outputs(result).shape[1]
    totals: list[list[Tensor | None]] = [[None] * len(products) for _, products in traced.seen]
    first = list(islice(losses, 2))
    alone = len(first) == 1
    for loss in chain(first, losses):
        if not loss.requires_grad or not results:
            continue
        try:
            gradients: Sequence[Tensor | None] = torch.autograd.grad(
                loss, results, allow_unused=True, retain_graph=True
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an operator without a derivative
            raise InstanceError(f"the loss cannot be differentiated: {reason(error)}") from error
        for (_, products), gradient, total in zip(traced.seen, gradients, totals, strict=True):
            if gradient is None:
                continue
            for k, product in enumerate(products):
                squares = product.outputs(gradient).double().square()
                if alone:
                    sums[product.name].add(product, squares)
                    continue
                before = total[k]
                total[k] = squares if before is None else before.add_(squares)
    for (_, products), total in zip(traced.seen, totals, strict=True):
        for product, added in zip(products, total, strict=True):
            if added is not None:
                sums[product.name].add(product, added)


class _Sums:
    """Sums over samples, places and losses for the rows of one weight."""

    def __init__(self, layout: Layout) -> None:
        zeros = (torch.zeros(layout.rows, dtype=torch.float64) for _ in range(4))
        self.squares, self.fourths, self.places, self.shifts = zeros

    def add(self, product: Product, squares: Tensor) -> None:
        """Add squared gradients (rows, places) of a product."""
        part = slice(product.first, product.last)
        if product.counts is None:
            self.squares[part] += squares.sum(1).cpu()
            self.fourths[part] += squares.square().sum(1).cpu()
        else:
            self.shifts[part] += product.counts(squares.mean(0)).cpu()

    def gradients(self, name: str, samples: int) -> RowGradients:
        """The means."""
        places = self.places.clamp(min=1)
        squares = (self.squares / places).numpy()
        spread = ((self.fourths / places).numpy() - squares**2).clip(min=0)
        variances = np.where(places.numpy() > 1, spread / (places.numpy() - 1).clip(min=1), np.inf)
        shifts = (self.shifts / samples).numpy()
        if not (np.isfinite(squares).all() and np.isfinite(shifts).all()):
            raise InstanceError(
                f"the gradients by the outputs of '{name}' are not finite: check the data and the checkpoint"
            )
        return RowGradients(squares, (self.places / samples).numpy(), shifts, variances)
