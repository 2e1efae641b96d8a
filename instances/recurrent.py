"""What the matrices of a recurrent network multiply, time step by time step.

Layer by layer the network is run by torch itself; its outputs are the hidden states, which are the inputs of the
recurrent matrix one step later. Only the states that a projection (`weight_hr`) reads are computed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}

RECURRENT = frozenset(_GATES)
"""Names of the functions of torch that run a whole recurrent network."""


def recurrent_inputs(kind: str, args: Sequence[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every matrix of a call that runs a recurrent network, with its inputs.

    Parameters
    ----------
    kind : str
        The function of torch, one of `RECURRENT`.
    args : sequence
        The arguments of the call: (input, states, weights, has_biases, layers, dropout, train, bidirectional,
        batch_first), or (data, batch_sizes, states, weights, has_biases, layers, dropout, train, bidirectional).

    Yields
    ------
    weight : Tensor (rows, K)
    inputs : Tensor (places, K)
    """
    if isinstance(args[1], Tensor) and not args[1].is_floating_point():
        data, batch_sizes, states, weights, biases, layers, _, _, both = args[:9]
    else:
        source, states, weights, biases, layers, _, _, both, batch_first = args[:9]
        source = source.transpose(0, 1) if batch_first else source
        steps, batch = source.shape[:2]
        data, batch_sizes = source.flatten(0, 1), torch.full((steps,), batch)
    states = states if isinstance(states, list | tuple) else (states,)
    directions = 2 if both else 1
    each = len(weights) // (layers * directions)
    projected = kind == "lstm" and each == (5 if biases else 3)
    run = getattr(torch, kind)
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            own = list(weights[index * each : (index + 1) * each])
            start = tuple(state[index : index + 1] for state in states)
            order = torch.arange(len(data)) if direction == 0 else _reversed(batch_sizes)
            order = order.to(data.device)
            inputs = data[order]
            first = start if kind == "lstm" else start[0]
            hidden = run(inputs, batch_sizes, first, own, biases, 1, 0.0, False, False)[0]
            before = _previous(hidden, batch_sizes, start[0][0])
            yield own[0], inputs
            yield own[1], before
            if projected:
                yield own[-1], _unprojected(inputs, before, start[1][0], own, biases, batch_sizes)
            back = torch.empty_like(order)
            back[order] = torch.arange(len(order), device=order.device)
            outputs.append(hidden[back])
        data = torch.cat(outputs, -1)


def _steps(batch_sizes: Tensor) -> list[tuple[int, int]]:
    """First row and number of rows of every time step of packed data."""
    out, start = [], 0
    for size in batch_sizes.tolist():
        out.append((start, size))
        start += size
    return out


def _reversed(batch_sizes: Tensor) -> Tensor:
    """The order of packed rows in which every sequence runs backwards."""
    steps = _steps(batch_sizes)
    lengths = [sum(size > sample for _, size in steps) for sample in range(steps[0][1])]
    return torch.tensor(
        [
            steps[lengths[sample] - 1 - t][0] + sample
            for t, (_, size) in enumerate(steps)
            for sample in range(size)
        ],
        dtype=torch.int64,
    )


def _previous(hidden: Tensor, batch_sizes: Tensor, first: Tensor) -> Tensor:
    """The state before every step: that of the step before, or the initial one."""
    parts, last = [], first
    for start, size in _steps(batch_sizes):
        parts.append(last[:size])
        last = hidden[start : start + size]
    return torch.cat(parts)


def _unprojected(
    inputs: Tensor, before: Tensor, cell: Tensor, own: Sequence[Tensor], biases: bool, batch_sizes: Tensor
) -> Tensor:
    """O ⊙ tanh(c) of every step of an LSTM: what its projection multiplies."""
    gates = inputs @ own[0].T + before @ own[1].T
    if biases:
        gates = gates + own[2] + own[3]
    i, f, g, o = gates.chunk(4, -1)
    parts = []
    for start, size in _steps(batch_sizes):
        rows = slice(start, start + size)
        cell = torch.sigmoid(f[rows]) * cell[:size] + torch.sigmoid(i[rows]) * torch.tanh(g[rows])
        parts.append(torch.sigmoid(o[rows]) * torch.tanh(cell))
    return torch.cat(parts)
