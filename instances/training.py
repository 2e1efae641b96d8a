"""A reproducible training loop."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cbs_opt.threads import thread_limit


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch and BLAS use one thread: the order of their sums, and so their rounding, is then fixed."""
    with thread_limit(1):
        yield


def multilayer_perceptron(sizes: Sequence[int], generator: torch.Generator) -> nn.Sequential:
    """Linear layers without biases, with ReLU between them, in float64.

    Parameters
    ----------
    sizes : sequence of int
        Inputs, hidden layers, outputs.
    generator : torch.Generator
        Draws the weights, uniform in ±√(3/inputs of the layer).
    """
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layer = nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.uniform_(-((3 / inputs) ** 0.5), (3 / inputs) ** 0.5, generator=generator)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    generator: torch.Generator,
    *,
    epochs: int,
    batch_size: int = 64,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> None:
    """Train a classifier in place: stochastic gradient descent on the cross entropy, rate falling to zero.

    Parameters
    ----------
    model : torch.nn.Module
    inputs : (m, …)
    targets : int64 (m,)
    generator : torch.Generator
        Shuffles the samples.
    epochs, batch_size : int
    learning_rate, momentum, weight_decay : float
        The rate falls along half a cosine.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    steps = epochs * -(-len(inputs) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(len(inputs), generator=generator)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(inputs[batch]), targets[batch]))
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Share of the samples that are classified correctly."""
    return float((model(inputs).argmax(1) == targets).double().mean())
