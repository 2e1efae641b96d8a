"""Inputs and output gradients of the linear and convolutional layers of a network.

A linear layer's gradient is a product of its input and the gradient of its output, so that one forward and
one backward pass of a whole batch give the gradients of every sample [1]_. Its input alone gives the Hessian
of its reconstruction error.

.. [1] Goodfellow: Efficient per-example gradient computations, arXiv:1510.01799, 2015.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

Layer: TypeAlias = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Passage:
    """One call of a layer: its input, and its output as a node of the graph (None unless asked for)."""

    inputs: Tensor
    outputs: Tensor | None


def layer_of(model: nn.Module, name: str) -> tuple[Layer, str] | None:
    """The plain linear or convolutional layer that owns a parameter, and "weight" or "bias"; None for others.

    Subclasses, layers with hooks and parameters that several layers share are others: what they compute may
    differ from their class.
    """
    prefix, _, which = name.rpartition(".")
    try:
        module = model.get_submodule(prefix)
    except AttributeError:
        return None
    if type(module) not in (nn.Linear, nn.Conv2d) or which not in ("weight", "bias"):
        return None
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    parameter = getattr(module, which)
    if sum(other is parameter for _, other in model.named_parameters(remove_duplicate=False)) != 1:
        return None
    return module, which  # type: ignore[return-value]


@contextmanager
def tapped(layers: Sequence[nn.Module], *, graph: bool) -> Iterator[dict[nn.Module, list[Passage]]]:
    """Record every call of `layers` in forward passes inside the block; with `graph`, their outputs too."""
    record: dict[nn.Module, list[Passage]] = {layer: [] for layer in layers}

    def keep(layer: nn.Module, inputs: tuple[Any, ...], outputs: Tensor) -> Tensor | None:
        a = inputs[0].detach()
        if not graph:
            record[layer].append(Passage(a, None))
            return None
        if not outputs.requires_grad:  # the first layer of a network whose parameters are frozen
            outputs = outputs + torch.zeros((), dtype=outputs.dtype, device=outputs.device, requires_grad=True)
        record[layer].append(Passage(a, outputs))
        return outputs.clone()  # the next layer may work in place: the gradient wanted is that of this output

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(keep).remove)
        yield record


def columns(layer: nn.Conv2d, a: Tensor) -> Tensor:
    """The input patches of the filters of a convolution, as columns.

    Parameters
    ----------
    layer : torch.nn.Conv2d
    a : (c, I, H, W)
        Its input.

    Returns
    -------
    Tensor (c, G, K, L)
        For each of G groups the K = I/G·kh·kw inputs of a filter at each of L places: the output is
        weight (G, O/G, K) times this, plus the bias.
    """
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    if not isinstance(layer.padding, str):
        ph, pw = ph2, pw2 = layer.padding
    elif layer.padding == "same":
        ph, pw = dh * (kh - 1) // 2, dw * (kw - 1) // 2
        ph2, pw2 = dh * (kh - 1) - ph, dw * (kw - 1) - pw
    else:
        ph = pw = ph2 = pw2 = 0
    if ph or pw or ph2 or pw2:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        a = functional.pad(a, (pw, pw2, ph, ph2), mode=mode)
    if (kh, kw) == (1, 1):
        patches = a[:, :, ::sh, ::sw].flatten(2)
    else:
        patches = functional.unfold(a, (kh, kw), dilation=(dh, dw), stride=(sh, sw))
    return patches.reshape(len(a), layer.groups, -1, patches.shape[-1])


def layer_gradients(
    layer: Layer, which: str, passages: Sequence[Passage], output_gradients: Sequence[Tensor], group: int = 1
) -> Tensor:
    """Gradients of each sample by the weight or the bias of a layer, summed over the layer's calls.

    Parameters
    ----------
    layer : torch.nn.Linear or torch.nn.Conv2d
    which : {"weight", "bias"}
    passages : sequence of Passage
        The calls of the layer for a batch of c samples, which lie along the first dimension.
    output_gradients : sequence of Tensor
        For each call the gradient of the summed loss by the output.
    group : int
        Consecutive samples whose gradients are summed; a divisor of c. They count as places of one sample: no
        gradient of a single one is formed.

    Returns
    -------
    Tensor (c / group, numel)
        O(c · numel · places) time.
    """
    total: Tensor | None = None
    for passage, g in zip(passages, output_gradients, strict=True):
        a = passage.inputs
        if isinstance(layer, nn.Conv2d):
            g = _merged(g.reshape(len(g), layer.groups, -1, g.shape[-2] * g.shape[-1]), group)
            part = g.sum(-1) if which == "bias" else g @ _merged(columns(layer, a), group).transpose(-1, -2)
        else:
            rows = len(g) // group
            g = g.reshape(rows, -1, g.shape[-1])
            part = g.sum(1) if which == "bias" else g.transpose(1, 2) @ a.reshape(rows, -1, a.shape[-1])
        part = part.flatten(1)
        total = part if total is None else total + part
    assert total is not None
    return total


def _merged(a: Tensor, group: int) -> Tensor:
    """(c, G, K, L) as (c / group, G, K, group · L): the places of several samples side by side."""
    if group == 1:
        return a
    c, G, K, L = a.shape
    return a.reshape(c // group, group, G, K, L).permute(0, 2, 3, 1, 4).reshape(c // group, G, K, group * L)
