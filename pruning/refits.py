"""Kept weights fitted to the outputs that each layer has in the dense network, all layers in one pass.

The layers are fitted in the order of the forward pass, each with the inputs that the layers fitted before give it:
the error ½‖WX − W₀X₀‖²/m of `cbs_opt.instances.output_errors`, minimised over the kept weights. No label is used.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from cbs_opt.budget import Budget
from cbs_opt.curvature import HessianBlocks, SharedBlocks
from cbs_opt.errors import UnboundedError
from cbs_opt.instance import Instance
from cbs_opt.instances.batches import call, placed
from cbs_opt.instances.data import SampleSource
from cbs_opt.instances.modes import evaluation_mode, fewest, single_precision
from cbs_opt.instances.output_errors import LayerOutputs
from cbs_opt.instances.products import Product, Products
from cbs_opt.instances.tensors import Layout, Place
from cbs_opt.instances.views import memory_of
from cbs_opt.pruning.network import WorkingCopy, norms_of
from cbs_opt.typing import BoolArray, FloatArray, IntArray
from cbs_opt.update import best_update

logger = logging.getLogger("cbs_opt")

MEMORY = 3 << 30
"""Bytes for targets and patches. Where all places of all samples do not fit, products with many places keep some
of them, drawn at random, in an eighth of this at least; then samples are left out. No share of the free memory, on
which the result must not depend."""

DAMPING = 10.0
"""That of a fit, as a multiple of that of H: fitted to hundreds of samples, layer after layer, weights go further
from their values than the selection supposes. With thousands it makes no difference."""

LEAST_PLACES = 32
"""That a product keeps of each sample, on average, at least."""

_PIECE_BYTES = 1 << 26  # of inputs whose products are summed in single precision


@torch.no_grad()
def refit(
    copy: WorkingCopy,
    dense: nn.Module,
    samples: SampleSource,
    pruned: BoolArray,
    damping: float,
    *,
    relative: bool,
    statistics: bool,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Fit the kept weights of all layers, one after the other.

    Parameters
    ----------
    copy : WorkingCopy
        The pruned network, changed in place.
    dense : torch.nn.Module
        Its layers' outputs are the targets.
    samples : SampleSource
        The first of them, as many as `MEMORY` allows and as have one shape.
    pruned : bool (n,)
    damping : float
        λ of XXᵀ/m + λI; it holds the weights near their present values.
    relative : bool
        Whether the damping is a multiple of the mean diagonal entry of XXᵀ/m.
    statistics : bool
        Whether batch norms take their statistics from the samples on the way, and keep them.
    check : callable, optional
        Called between products; raises to stop, which leaves the copy with some layers fitted.

    Notes
    -----
    Weights that are used several times in a pass, looked up, or not followed stay as they are. One forward pass of
    each network, and the update of every layer.
    """
    layouts = {place.name: place.layout for place in copy.places}
    with ExitStack() as stack:
        for network in (copy.model, dense):
            stack.enter_context(evaluation_mode(network))
            stack.enter_context(single_precision(network))
        few = fewest(copy.model)
        count = len(samples) if not samples.borders else min(samples.borders[1:-1] or [len(samples)])
        needs = _needs(dense, placed(samples.batch(0, few), copy.model), layouts)
        m, most = needs.room_for(count, few)
        x = placed(samples.batch(0, m), copy.model)
        places = _Places(len(x), most)
        targets = _targets(dense, x, layouts, places, check)
        fit = _Fit(copy, targets, pruned, len(x), places, damping, relative, check)
        if statistics:
            stack.enter_context(_statistics_of_a_batch(copy.model))
        with fit:
            call(copy.model, x)
    left = [name for name in layouts if name not in fit.done]
    if left:
        logger.debug(f"not fitted to the outputs of the dense network: {', '.join(left)}")


@dataclass(frozen=True)
class _Needs:
    """What the products of a sample take.

    Attributes
    ----------
    rows, places : int64 (p,)
        Outputs of each product, and at how many places.
    passing : int
        Bytes of what is alive meanwhile: three tensors, as large as any that a call returns, and three times the
        inputs of a product.
    """

    rows: IntArray
    places: IntArray
    passing: int

    def _bytes(self, m: int, most: int) -> int:
        """Memory for m samples, when no product keeps more than `most` places of each."""
        return m * (4 * int(self.rows @ np.minimum(self.places, most)) + self.passing)

    def room_for(self, count: int, least: int) -> tuple[int, int]:
        """How many samples, at least `least`, and places of each product and sample fit into `MEMORY`."""
        m = min(count, 7 * MEMORY // 8 // self.passing, MEMORY // self._bytes(1, LEAST_PLACES))
        m = max(m, least)
        everywhere = int(self.places.max(initial=1))
        fits = bisect_right(range(everywhere + 1), MEMORY, key=lambda places: self._bytes(m, places))
        return m, max(fits - 1, LEAST_PLACES)


def _needs(dense: nn.Module, one: Any, layouts: Mapping[str, Layout]) -> _Needs:
    """Measured on a few samples."""
    rows, places, inputs = [], [], [0]

    def measure(product: Product) -> None:
        if product.inputs is not None:
            X = product.inputs()
            rows.append(product.last - product.first)
            places.append(-(-X.shape[1] // len(one)))
            inputs.append(X.nbytes)

    with _Sizes(dense, layouts, measure) as sizes:
        call(dense, one)
    passing = 3 * sizes.largest + 3 * max(inputs)
    return _Needs(np.array(rows, np.int64), np.array(places, np.int64), max(1, -(-passing // len(one))))


class _Places:
    """Those of each product that are kept.

    Parameters
    ----------
    samples : int
    most : int
        Places of each sample, on average.
    """

    def __init__(self, samples: int, most: int) -> None:
        self._kept = samples * most
        self._all: dict[tuple[str, int], int] = {}

    def of_dense(self, product: Product) -> Product:
        """The product of the dense network, with inputs at places drawn from all that it has."""
        if product.inputs is None:
            return product
        X = product.inputs()
        self._all[product.name, product.first] = X.shape[1]
        X = self._drawn(product, X)
        return replace(product, inputs=lambda: X)

    def same(self, product: Product) -> Tensor | None:
        """The inputs at the places of the dense network; None where the network has others."""
        assert product.inputs is not None
        X = product.inputs()
        return self._drawn(product, X) if self._all.get((product.name, product.first)) == X.shape[1] else None

    def _drawn(self, product: Product, X: Tensor) -> Tensor:
        """Some columns of the inputs, scaled so that sums over them estimate those over all."""
        count = X.shape[1]
        if count <= self._kept:
            return X
        seed = crc32(f"{product.name} {product.first}".encode())
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return X[:, order[: self._kept].sort().values.to(X.device)] * math.sqrt(count / self._kept)


def _targets(
    dense: nn.Module, x: Any, layouts: Mapping[str, Layout], places: _Places, check: Callable[[], None]
) -> LayerOutputs:
    """The outputs of the dense network; none for weights that it uses more than once."""
    targets = LayerOutputs(dense, layouts)
    with _Products(dense, layouts, lambda product: targets.note(places.of_dense(product)), check):
        call(dense, x)
    for name in targets.left:
        if any(later[0] < earlier[1] for earlier, later in pairwise(sorted(targets.rows(name)))):
            targets.clear(name)
    return targets


class _Products(Products):
    """The products of a network that are followed; `check` is called before each call of torch."""

    def __init__(
        self,
        model: nn.Module,
        layouts: Mapping[str, Layout],
        report: Callable[[Product], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        weights = {name: (parameters[name].detach(), layout) for name, layout in layouts.items()}
        super().__init__(weights, report, lambda name, reason: None)
        self._check = check

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a call; here, as what is raised by a report counts as a reason not to follow a weight."""
        self._check()
        return super().__torch_function__(func, types, args, kwargs)


class _Sizes(_Products):
    """Note how large the tensors are that calls return, apart from views of parameters and buffers.

    Attributes
    ----------
    largest : int
        Bytes of the largest.
    """

    largest = 0

    def __init__(self, model: nn.Module, layouts: Mapping[str, Layout], report: Callable[[Product], None]) -> None:
        super().__init__(model, layouts, report)
        self._memory = {memory_of(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a call."""
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, Tensor) and memory_of(result) not in self._memory:
            self.largest = max(self.largest, result.nbytes)
        return result


class _Fit(_Products):
    """Fit each weight when the network multiplies by it, and repeat the call with the new one.

    Attributes
    ----------
    done : set of str
        Weights that were fitted.
    """

    def __init__(
        self,
        copy: WorkingCopy,
        targets: LayerOutputs,
        pruned: BoolArray,
        m: int,
        places: _Places,
        damping: float,
        relative: bool,
        check: Callable[[], None],
    ) -> None:
        self._parameters = dict(copy.model.named_parameters(remove_duplicate=False))
        self._tensors = {place.name: place for place in copy.places}
        layouts = {place.name: place.layout for place in copy.places}
        super().__init__(copy.model, layouts, self._fit, check)
        self._targets, self._pruned, self._m, self._places = targets, pruned, m, places
        self._damping, self._relative = damping, relative
        self._changed = False
        self.done: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a call, and again where it changed a weight."""
        result = super().__torch_function__(func, types, args, kwargs)
        if self._changed:
            self._changed = False
            del result
            return func(*args, **(kwargs or {}))
        return result

    def _fit(self, product: Product) -> None:
        if product.inputs is None or not self._targets.rows(product.name):
            return
        X = self._places.same(product)
        target = None if X is None else self._targets.take(product, X)
        if X is None or target is None:
            self._targets.clear(product.name)  # the network chooses other inputs than the dense one
            return
        place, held = self._tensors[product.name], self._parameters[product.name]
        W = _as_rows(held, place.layout)
        part = slice(product.first, product.last)
        new = self._fitted(W[part].double(), X, target, _rows_pruned(place, self._pruned)[part])
        if new is None:
            return
        W[part] = torch.from_numpy(new).to(W)
        held.copy_(place.layout.from_rows(W.reshape(-1)).reshape(held.shape))
        self.done.add(product.name)
        self._changed = True

    def _fitted(self, W: Tensor, X: Tensor, target: Tensor, pruned: BoolArray) -> FloatArray | None:
        """The weights of some rows, (rows, K), with the least error; None where no update can be found."""
        K, places = X.shape
        H = torch.zeros(K, K, dtype=torch.float64, device=X.device)
        TX = torch.zeros(len(W), K, dtype=torch.float64, device=X.device)
        step = max(1, _PIECE_BYTES // (4 * K))
        for start in range(0, places, step):
            piece = slice(start, start + step)
            H += (X[:, piece] @ X[:, piece].T).double()
            TX += (target[:, piece] @ X[:, piece].T).double()
        H = (H + H.T) / (2 * self._m)
        gradient = W @ H - TX / self._m
        if not bool(torch.isfinite(H).all() and torch.isfinite(gradient).all()):
            return None
        H.diagonal().add_(self._damping * (float(H.diagonal().mean()) if self._relative else 1.0))
        curvature = SharedBlocks(HessianBlocks.from_blocks([H.cpu().numpy()]), [0] * len(W), [1.0] * len(W))
        flat = pruned.ravel()
        layer = Instance(
            W.cpu().numpy().ravel(), curvature, Budget(int(flat.sum())), gradient.cpu().numpy().ravel()
        )
        try:
            return best_update(layer, flat).reshape(W.shape)
        except UnboundedError:  # H is singular, without a damping
            return None


@contextmanager
def _statistics_of_a_batch(model: nn.Module) -> Iterator[None]:
    """Batch norms take mean and variance from what goes through the network, and keep them."""
    norms = [norm for _, norm in norms_of(model)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum


def _as_rows(tensor: Tensor, layout: Layout) -> Tensor:
    """A copy of a weight in single precision, (rows, K)."""
    return layout.to_rows(tensor.detach().float().clone().reshape(-1)).reshape(layout.rows, layout.inputs)


def _rows_pruned(place: Place, pruned: BoolArray) -> BoolArray:
    return pruned[place.part].reshape(place.layout.rows, place.layout.inputs)
