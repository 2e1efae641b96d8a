"""The gradient of the loss of every sample or mini-batch: the rows of the empirical Fisher matrix.

`per_sample_gradients` holds all of them; `gradient_rows` yields them in pieces, and takes the fastest of three
routes to them that gives the same as automatic differentiation of one sample at a time: the inputs and output
gradients of the layers (`layers`), `torch.func`, or that very loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from cbs_opt.errors import InstanceError
from cbs_opt.instances.layers import columns, layer_gradients, layer_of, tapped

logger = logging.getLogger("cbs_opt")

Loss = Callable[[Tensor, Tensor], Tensor]
"""Mean loss of a batch, from outputs (m, …) and targets (m, …)."""

Route = Callable[[Tensor, Tensor], Tensor]
"""Gradients (c, n) of each of c samples, from inputs (c, …) and targets (c, …)."""

CHUNK_BYTES = 1 << 26
"""Memory that the gradients and activations of one piece may take on the CPU: larger pieces are slower there."""

_LARGEST_CHUNK = 512
_CANDIDATES = 8  # samples among which those with the largest losses try the routes out
_TOLERANCE = 1e-4  # largest relative difference of a route from automatic differentiation, in single precision


class Samples(Protocol):
    """Inputs or targets: a tensor, or whatever gives tensors for slices."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, part: slice, /) -> Tensor:
        """The samples of a slice, along the first dimension."""
        ...


def per_sample_gradients(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    names: Sequence[str],
    loss: Loss = nn.functional.cross_entropy,
    chunk_size: int = 256,
) -> Tensor:
    """Gradients of the loss of each sample by the parameters that are to be pruned.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode: layers that mix the samples of a batch would mix their gradients.
    inputs : (m, …)
    targets : (m, …)
    names : sequence of str
        Parameters by their names in `model.named_parameters()`, in the order of the columns.
    loss : callable, optional
        Of a batch that holds one sample; cross entropy by default.
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
    O(m n) memory for the result, and what the model needs for `chunk_size` samples.
    """
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
    chosen = {name: parameters.pop(name) for name in names}
    others = {**parameters, **dict(model.named_buffers())}

    def loss_of_one(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = functional_call(model, {**others, **weights}, (x.unsqueeze(0),))
        return loss(outputs, y.unsqueeze(0))

    gradients_of = vmap(grad(loss_of_one), in_dims=(None, 0, 0))
    n = sum(tensor.numel() for tensor in chosen.values())
    first = next(iter(chosen.values()))
    rows = torch.empty(len(inputs), n, dtype=first.dtype, device=first.device)
    for start in range(0, len(inputs), chunk_size):
        chunk = slice(start, start + chunk_size)
        by_name = gradients_of(chosen, inputs[chunk], targets[chunk])
        rows[chunk] = torch.cat([by_name[name].flatten(1) for name in names], dim=1)
    return rows


def gradient_rows(
    model: nn.Module,
    inputs: Samples,
    targets: Samples,
    names: Sequence[str],
    *,
    loss: Loss = nn.functional.cross_entropy,
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
    loss : callable, optional
        Mean loss of a batch; cross entropy by default.
    batch : int
        Samples whose mean gradient is a row; an incomplete last batch is left out.
    chunk_bytes : int
        Memory for the gradients and activations of one piece: sets how many samples go together.

    Yields
    ------
    Tensor (c, n)
        On the CPU, in the model's precision; ⌊m/batch⌋ rows in all.
        In single precision the cross entropy of a sample that is all but certain has a gradient of few correct
        digits, by any route: it is tiny, and a model in float64 gives it exactly.

    Raises
    ------
    InstanceError
        For a gradient with NaN or infinite entries.
    KeyError
        For a name that is no parameter of the model.
    """
    with evaluation_mode(model):
        device = next(model.parameters()).device
        size = chunk_size(model, inputs[:1].to(device), names, chunk_bytes)
        if batch == 1:
            route = _fastest_route(
                model, inputs[:_CANDIDATES].to(device), targets[:_CANDIDATES].to(device), names, loss
            )
            size = min(size, len(inputs))
            parts = [slice(start, start + size) for start in range(0, len(inputs), size)]
        else:
            route = _mean_route(model, names, loss, size)
            parts = [slice(start, start + batch) for start in range(0, len(inputs) - batch + 1, batch)]
        for part in parts:
            rows = route(inputs[part].to(device), targets[part].to(device)).cpu()
            if not torch.isfinite(rows).all():
                bad = int((~torch.isfinite(rows).all(1)).nonzero()[0])
                first = part.start + bad * batch
                which = f"sample {first}" if batch == 1 else f"the samples {first} … {first + batch - 1}"
                raise InstanceError(
                    f"the gradient of {which} has NaN or infinite entries: check the data and the checkpoint"
                )
            yield rows


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Let the whole model run in evaluation mode; every module's own mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def chunk_size(model: nn.Module, one: Tensor, names: Sequence[str], chunk_bytes: int) -> int:
    """How many samples fit into `chunk_bytes` with their gradients, activations and patches of convolutions.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode.
    one : (1, …)
        A sample, on the model's device.
    names : sequence of str
        The parameters whose gradients are kept; may be empty.
    chunk_bytes : int
    """
    parameters = dict(model.named_parameters())
    activations, patches = [0], [0]

    def measure(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if isinstance(outputs, Tensor):
            activations.append(outputs.nbytes)
        if type(module) is nn.Conv2d and isinstance(inputs[0], Tensor):
            patches.append(columns(module, inputs[0]).nbytes)

    hooks = [m.register_forward_hook(measure) for m in model.modules() if not any(m.children())]
    try:
        with torch.no_grad():
            model(one)
    finally:
        for hook in hooks:
            hook.remove()
    gradients = sum(parameters[name].nbytes for name in names)
    needed = 2 * gradients + 4 * sum(activations) + 3 * max(patches) + one.nbytes
    return max(1, min(_LARGEST_CHUNK, chunk_bytes // max(needed, 1)))


def _fastest_route(model: nn.Module, x: Tensor, y: Tensor, names: Sequence[str], loss: Loss) -> Route:
    """The first route that agrees with automatic differentiation on the two samples with the largest losses."""
    with torch.no_grad():
        losses = [float(loss(model(x[s : s + 1]), y[s : s + 1])) for s in range(len(x))]
    hardest = sorted(range(len(x)), key=lambda s: -losses[s])[:2]
    x, y = x[hardest], y[hardest]
    loop = _mean_route(model, names, loss, 1)

    def one_at_a_time(inputs: Tensor, targets: Tensor) -> Tensor:
        return torch.cat([loop(inputs[s : s + 1], targets[s : s + 1]) for s in range(len(inputs))])

    expected = one_at_a_time(x, y)
    routes: dict[str, Route | None] = {
        "layers": _layer_route(model, names, loss),
        "torch.func": lambda a, b: per_sample_gradients(model, a, b, names, loss, len(a)),
    }
    for title, route in routes.items():
        if route is None:
            continue
        try:
            found = route(x, y)
        except Exception as error:  # whatever the model does that the route cannot follow
            logger.debug(f"gradients: not by {title}: {type(error).__name__}: {str(error).splitlines()[:1]}")
            continue
        if found.shape == expected.shape and bool(
            ((found - expected).norm(dim=1) <= _TOLERANCE * expected.norm(dim=1)).all()
        ):
            logger.debug(f"gradients: by {title}")
            return route
        logger.debug(f"gradients: not by {title}: differs from automatic differentiation")
    logger.debug("gradients: by automatic differentiation of one sample at a time")
    return one_at_a_time


def _layer_route(model: nn.Module, names: Sequence[str], loss: Loss) -> Route | None:
    """One forward and one backward pass of the batch, for the plain layers of `layers.layer_of`."""
    found = [layer_of(model, name) for name in names]
    owners = [owner for owner in found if owner is not None]
    if len(owners) < len(names):
        return None
    layers = list(dict.fromkeys(layer for layer, _ in owners))

    def of_one(outputs: Tensor, target: Tensor) -> Tensor:
        return loss(outputs.unsqueeze(0), target.unsqueeze(0))

    def route(x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad(), tapped(layers, graph=True) as record:
            losses = vmap(of_one)(model(x), y)
            nodes = [p.outputs for layer in layers for p in record[layer] if p.outputs is not None]
            flat = iter(torch.autograd.grad(losses.sum(), nodes))
        gradients = {layer: [next(flat) for _ in record[layer]] for layer in layers}
        with torch.no_grad():
            parts = [layer_gradients(layer, which, record[layer], gradients[layer]) for layer, which in owners]
            return torch.cat(parts, dim=1)

    return route


def _mean_route(model: nn.Module, names: Sequence[str], loss: Loss, size: int) -> Route:
    """The gradient of the mean loss of a batch, (1, n), of `size` samples at a time."""
    parameters = dict(model.named_parameters())
    weights = {name: parameters[name].detach().requires_grad_() for name in names}

    def route(x: Tensor, y: Tensor) -> Tensor:
        total: Tensor | None = None
        for start in range(0, len(x), size):
            part = slice(start, min(start + size, len(x)))
            with torch.enable_grad():
                outputs = functional_call(model, weights, (x[part],))
                share = (part.stop - part.start) / len(x)
                value = loss(outputs, y[part]) * share
                gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
            row = torch.cat(
                [
                    torch.zeros_like(w).flatten() if g is None else g.flatten()
                    for g, w in zip(gradients, weights.values(), strict=True)
                ]
            )
            total = row if total is None else total + row
        assert total is not None
        return total.unsqueeze(0)

    return route
