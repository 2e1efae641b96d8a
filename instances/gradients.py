"""The gradient of the loss of every sample or mini-batch: the rows of the empirical Fisher matrix.

`per_sample_gradients` holds all of them; `gradient_rows` yields them in chunks, by one of three methods
with the same result as automatic differentiation of one sample at a time: the inputs and output gradients of
the layers (`layers`), `torch.func`, or that loop itself, if a timed trial finds it faster, as for
recurrent networks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from cbs_opt.errors import InstanceError
from cbs_opt.instances.batches import (
    Bundle,
    Samples,
    by_memory,
    call,
    leaves_of,
    moved,
    placed,
    reason,
    slices,
)
from cbs_opt.instances.layers import columns, layer_gradients, layer_of, tapped
from cbs_opt.instances.losses import LossLike, SampleLoss, declared
from cbs_opt.instances.modes import evaluation_mode, fewest, outside_inference, single_precision
from cbs_opt.instances.substitution import call_with

logger = logging.getLogger("cbs_opt")

Route = Callable[[Any, Any], Tensor]
"""Gradients (c, n) of each of c samples, from inputs (c, …) and targets (c, …)."""

CHUNK_BYTES = 1 << 26
"""Memory that the gradients and activations of one piece may take on the CPU: larger pieces are slower there."""

_LARGEST_CHUNK = 512
_CANDIDATES = 8  # samples among which those with the largest losses try the routes out
_WORTH_A_SWITCH = 1.5  # a route that is faster by less is not taken: both give the same up to rounding errors
_TRIAL = 64  # samples that a timed trial differentiates at a time, at most
_TOLERANCE = 1e-4  # largest relative difference of a route from automatic differentiation, in single precision


@outside_inference()
def per_sample_gradients(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    names: Sequence[str],
    loss: LossLike = nn.functional.cross_entropy,
    chunk_size: int = 256,
) -> Tensor:
    """Gradients of the loss of each sample by the parameters that are to be pruned, by `torch.func`.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode: layers that mix the samples of a batch would mix their gradients.
    inputs : Tensor or Bundle (m, …)
    targets : Tensor or Bundle (m, …)
    names : sequence of str
        Parameters by their names in `model.named_parameters()`, in the order of the columns.
    loss : SampleLoss, name or callable, optional
        See `losses.declared`; cross entropy by default.
    chunk_size : int
        Samples that are differentiated at a time.

    Returns
    -------
    Tensor (m, n)
        Row s holds the gradient of sample s, the named tensors one after the other, each row by row.

    Raises
    ------
    KeyError
        For a name that is no parameter of the model.

    Notes
    -----
    O(m n) memory for the result, plus that of the model for `chunk_size` samples.
    """
    criterion = declared(loss)
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
    chosen = {name: parameters.pop(name) for name in names}
    others = {**parameters, **dict(model.named_buffers())}
    n = sum(tensor.numel() for tensor in chosen.values())
    first = next(iter(chosen.values()))
    rows = torch.empty(len(inputs), n, dtype=first.dtype, device=first.device)
    for start in range(0, len(inputs), chunk_size):
        chunk = slice(start, start + chunk_size)
        x, y = _split(inputs[chunk]), _split(targets[chunk])

        def loss_of_one(weights: dict[str, Tensor], xs: tuple[Tensor, ...], ys: tuple[Tensor, ...]) -> Tensor:
            outputs = call_with(model, {**others, **weights}, x.joined(xs))  # noqa: B023
            return criterion.per_sample(outputs, y.joined(ys)).sum()  # noqa: B023

        by_name = vmap(grad(loss_of_one), in_dims=(None, 0, 0))(chosen, x.rows, y.rows)
        rows[chunk] = torch.cat([by_name[name].flatten(1) for name in names], dim=1)
    return rows


class _split:  # noqa: N801
    """Samples as the tensors that have a row for each, for `torch.func`, and back from one row each."""

    def __init__(self, samples: Any) -> None:
        self._samples = samples
        leaves = samples.leaves if isinstance(samples, Bundle) else [samples]
        self._varying = samples.varying if isinstance(samples, Bundle) else [True]
        self.rows = tuple(leaf for leaf, varies in zip(leaves, self._varying, strict=True) if varies)

    def joined(self, one: tuple[Tensor, ...]) -> Any:
        """A single sample again, from its row of every tensor."""
        rows = iter(one)
        if not isinstance(self._samples, Bundle):
            return next(rows).unsqueeze(0)
        leaves = [
            next(rows).unsqueeze(0) if varies else leaf
            for leaf, varies in zip(self._samples.leaves, self._varying, strict=True)
        ]
        return self._samples[:1].with_leaves(leaves)


@torch.inference_mode(False)
def gradient_rows(
    model: nn.Module,
    inputs: Samples,
    targets: Samples,
    names: Sequence[str],
    *,
    loss: LossLike = nn.functional.cross_entropy,
    batch: int = 1,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[Tensor]:
    """Yield the rows of the gradient matrix in order, a piece at a time.

    Parameters
    ----------
    model : torch.nn.Module
        Runs in evaluation mode; its parameters and mode are as before in the end.
    inputs : (m, …)
        A tensor, or anything with a length whose slices are tensors; moved to the model's device in pieces.
    targets : (m, …)
    names : sequence of str
        Parameters by their names in `model.named_parameters()`, in the order of the columns.
    loss : SampleLoss, name or callable, optional
        See `losses.declared`; cross entropy by default.
    batch : int
        Samples whose mean gradient is a row; an incomplete last batch is left out.
    chunk_bytes : int
        Memory for the gradients and activations of one piece: sets how many samples go together.

    Yields
    ------
    Tensor (c, n)
        On the CPU, in the model's precision, float32 for models of half precision; ⌊m/batch⌋ rows in all.
        In single precision the cross entropy of a sample that is all but certain has a gradient of few correct
        digits, by any route: it is tiny, and a model in float64 gives it exactly.

    Raises
    ------
    InstanceError
        For a gradient with NaN or infinite entries.
    KeyError
        For a name that is no parameter of the model.
    """
    criterion = declared(loss)
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(single_precision(model))
        device = next(model.parameters()).device
        if device.type == "cuda" and any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # cuDNN differentiates recurrent layers in training mode only.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        size = chunk_size(model, placed(inputs[: fewest(model)], model), names, chunk_bytes)
        grouped: tuple[Route, int] | None = None
        if batch == 1:
            end = next(slices(inputs, min(size, _TRIAL))).stop
            few = placed(inputs[:end], model), moved(targets[:end], device)
            route = _fastest_route(model, *few, names, criterion)
            parts = [[part] for part in slices(inputs, size)]
        else:
            last = len(inputs) - batch + 1
            grouped = _grouped_route(model, inputs, targets, names, criterion, batch, chunk_bytes)
            if grouped is not None:
                route, together = grouped
                stop = len(inputs) // batch * batch
                parts = [[part] for part in slices(inputs, together, 0, stop)]
            else:
                route = _mean_route(model, names, criterion)
                size = max(size, batch) if fewest(model) > 1 else size
                parts = [list(slices(inputs, size, start, start + batch)) for start in range(0, last, batch)]
        for row in parts:
            rows: Tensor | None = None
            for part in row:
                try:
                    piece = by_memory(route, model, inputs, targets, part, batch == 1)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:  # an operator without a derivative, shapes that do not fit
                    raise InstanceError(f"the loss cannot be differentiated: {reason(error)}") from error
                if batch > 1 and grouped is None:
                    piece = piece * ((part.stop - part.start) / batch)
                rows = piece if rows is None else rows + piece
            assert rows is not None
            if not torch.isfinite(rows).all():
                bad = int((~torch.isfinite(rows).all(1)).nonzero()[0])
                first = row[0].start + bad * batch
                which = f"sample {first}" if batch == 1 else f"the samples {first} … {first + batch - 1}"
                raise InstanceError(
                    f"the gradient of {which} has NaN or infinite entries: check the data and the checkpoint"
                )
            yield rows


def _grouped_route(
    model: nn.Module,
    inputs: Samples,
    targets: Samples,
    names: Sequence[str],
    loss: SampleLoss,
    batch: int,
    chunk_bytes: int,
) -> tuple[Route, int] | None:
    """A route for the mean gradients of several mini-batches at a time, and how many samples these are.

    None where single mini-batches are as fast, the samples have several shapes, or it is not the same as
    automatic differentiation on the first two of them.
    """
    device = next(model.parameters()).device
    size = chunk_size(model, placed(inputs[: fewest(model)], model), (), chunk_bytes)
    together = size // batch * batch
    if together < 2 * batch or len(inputs) < 2 * batch or fewest(model) > 1 or len(getattr(inputs, "borders", ())):
        return None
    route = _layer_route(model, names, loss, batch)
    if route is None:
        return None
    two = slice(0, 2 * batch)
    x, y = placed(inputs[two], model), moved(targets[two], device)
    single = _mean_route(model, names, loss)
    halves = (slice(0, batch), slice(batch, 2 * batch))
    try:
        found = route(x, y)
        expected = torch.cat([single(x[half], y[half]) for half in halves])
    except Exception as error:  # whatever the model does that the route cannot follow
        logger.debug(f"gradients: not several batches at a time: {type(error).__name__}")
        return None
    same = (found - expected).norm(dim=1) <= _TOLERANCE * expected.norm(dim=1)
    if found.shape != expected.shape or not bool(same.all()):
        logger.debug("gradients: not several batches at a time: differs from automatic differentiation")
        return None
    return route, together


def chunk_size(model: nn.Module, one: Any, names: Sequence[str], chunk_bytes: int) -> int:
    """How many samples fit into `chunk_bytes` with their gradients, activations and patches of convolutions.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode.
    one : Tensor or Bundle (1, …)
        A sample, on the model's device.
    names : sequence of str
        The parameters whose gradients are kept; may be empty.
    chunk_bytes : int
    """
    parameters = dict(model.named_parameters())
    activations, patches = [0], [0]

    def measure(module: nn.Module, inputs: Any, outputs: Any) -> None:
        activations.append(sum(leaf.nbytes for leaf in leaves_of(outputs) if isinstance(leaf, Tensor)))
        if type(module) is nn.Conv2d and inputs and isinstance(inputs[0], Tensor):
            patches.append(columns(module, inputs[0]).nbytes)

    hooks = [m.register_forward_hook(measure) for m in model.modules() if not any(m.children())]
    try:
        with torch.no_grad():
            call(model, one)
    finally:
        for hook in hooks:
            hook.remove()
    gradients = sum(parameters[name].nbytes for name in names)
    needed = 2 * gradients + 4 * sum(activations) + 3 * max(patches) + one.nbytes
    return max(1, min(_LARGEST_CHUNK, int(chunk_bytes // max(needed, 1))))


def _fastest_route(model: nn.Module, x: Any, y: Any, names: Sequence[str], loss: SampleLoss) -> Route:
    """A route that agrees with automatic differentiation on the two samples with the largest losses, and is fast.

    Layers go first; between `torch.func` and one sample at a time a trial decides.
    """
    few = min(_CANDIDATES, len(x))
    with torch.no_grad():
        losses = [float(loss.per_sample(call(model, x[s : s + 1]), y[s : s + 1]).sum()) for s in range(few)]
    hardest = torch.tensor(sorted(range(few), key=lambda s: -losses[s])[:2], device=_device(x))
    hard_x, hard_y = x[hardest], y[hardest]
    loop = _mean_route(model, names, loss)

    def one_at_a_time(inputs: Any, targets: Any) -> Tensor:
        return torch.cat([loop(inputs[s : s + 1], targets[s : s + 1]) for s in range(len(inputs))])

    expected = one_at_a_time(hard_x, hard_y)
    routes: dict[str, Route | None] = {
        "layers": _layer_route(model, names, loss),
        "torch.func": lambda a, b: per_sample_gradients(model, a, b, names, loss, len(a)),
    }
    for title, route in routes.items():
        if route is None:
            continue
        try:
            found = route(hard_x, hard_y)
        except Exception as error:  # whatever the model does that the route cannot follow
            logger.debug(f"gradients: not by {title}: {type(error).__name__}: {str(error).splitlines()[:1]}")
            continue
        same = (found - expected).norm(dim=1) <= _TOLERANCE * expected.norm(dim=1)
        if found.shape != expected.shape or not bool(same.all()):
            logger.debug(f"gradients: not by {title}: differs from automatic differentiation")
            continue
        if title == "torch.func":
            slower = _seconds(route, x, y) / len(x) / (_seconds(one_at_a_time, x[:few], y[:few]) / few)
            if slower > _WORTH_A_SWITCH:
                logger.debug(f"gradients: not by {title}: {slower:.1f} times slower than one sample at a time")
                continue
        logger.debug(f"gradients: by {title}")
        return route
    logger.debug("gradients: by automatic differentiation of one sample at a time")
    return one_at_a_time


def _seconds(route: Route, x: Any, y: Any) -> float:
    """Seconds that a route takes; it has run before, so that nothing is prepared for the first time."""
    started = time.perf_counter()
    float(route(x, y).sum())  # the number comes only when the device is done
    return time.perf_counter() - started


def _device(samples: Any) -> torch.device:
    leaves = samples.leaves if isinstance(samples, Bundle) else [samples]
    return next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))


def _layer_route(model: nn.Module, names: Sequence[str], loss: SampleLoss, group: int = 1) -> Route | None:
    """One forward and one backward pass of the batch, for the plain layers of `layers.layer_of`.

    The rows are means over `group` consecutive samples.
    """
    found = [layer_of(model, name) for name in names]
    owners = [owner for owner in found if owner is not None]
    if len(owners) < len(names):
        return None
    layers = list(dict.fromkeys(layer for layer, _ in owners))

    def route(x: Any, y: Any) -> Tensor:
        with torch.enable_grad(), tapped(layers, graph=True) as record:
            losses = loss.per_sample(call(model, x), y)
            nodes = [p.outputs for layer in layers for p in record[layer] if p.outputs is not None]
            flat = iter(torch.autograd.grad(losses.sum(), nodes, allow_unused=True))
        gradients = {
            layer: [torch.zeros_like(p.outputs) if (g := next(flat)) is None else g for p in record[layer]]
            for layer in layers
        }
        with torch.no_grad():
            parts = [
                layer_gradients(layer, which, record[layer], gradients[layer], group) for layer, which in owners
            ]
            rows = torch.cat(parts, dim=1)
            return rows / group if group > 1 else rows

    return route


def _mean_route(model: nn.Module, names: Sequence[str], loss: SampleLoss) -> Route:
    """The gradient of the mean loss of a batch, (1, n)."""
    parameters = dict(model.named_parameters())
    weights = {name: parameters[name].detach().requires_grad_() for name in names}

    def route(x: Any, y: Any) -> Tensor:
        with torch.enable_grad():
            value = loss.per_sample(call_with(model, weights, x), y).mean()
            if not value.requires_grad:
                return torch.zeros(
                    1, sum(w.numel() for w in weights.values()), dtype=value.dtype, device=value.device
                )
            gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
        row = [
            torch.zeros_like(w).flatten() if g is None else g.flatten()
            for g, w in zip(gradients, weights.values(), strict=True)
        ]
        return torch.cat(row).unsqueeze(0)

    return route
