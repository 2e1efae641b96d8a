"""Calls of torch that hide several products, written out as one call of `linear` for each product.

They give what torch gives. `MultiheadAttention` and recurrent networks run in one call, within which the outputs
of their matrices, and the gradients by them, cannot be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cbs_opt.instances.recurrent import reversed_steps

State = tuple[Tensor, ...]
Step = Callable[[Tensor, State, Tensor, Tensor | None], State]
"""(outputs of the input matrix, state, recurrent matrix, its bias) → the next state."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`functional.multi_head_attention_forward`: the projections apart, and torch's own for what is between."""
    if options.get("use_separate_proj_weight", False):
        weights = [options[f"{kind}_proj_weight"] for kind in ("q", "k", "v")]
    else:
        assert in_proj_weight is not None
        weights = [in_proj_weight[part * embed_dim : (part + 1) * embed_dim] for part in range(3)]
    biases = [None] * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    if query is key and key is value and in_proj_weight is not None:
        q, k, v = functional.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        q, k, v = (
            functional.linear(a, W, b) for a, W, b in zip((query, key, value), weights, biases, strict=True)
        )
    identity = torch.eye(embed_dim, dtype=q.dtype, device=q.device)
    options |= {"use_separate_proj_weight": True} | {f"{kind}_proj_weight": identity for kind in ("q", "k", "v")}
    mixed, shares = functional.multi_head_attention_forward(
        q, k, v, embed_dim, heads, None, None, bias_k, bias_v, add_zero_attn, dropout, identity, None, **options
    )
    return functional.linear(mixed, out_proj_weight, out_proj_bias), shares


def _lstm(i: Tensor, state: State, W: Tensor, bias: Tensor | None) -> State:
    gates = (i + functional.linear(state[0], W, bias)).chunk(4, -1)
    c = torch.sigmoid(gates[1]) * state[1] + torch.sigmoid(gates[0]) * torch.tanh(gates[2])
    return torch.sigmoid(gates[3]) * torch.tanh(c), c


def _gru(i: Tensor, state: State, W: Tensor, bias: Tensor | None) -> State:
    (ir, iz, new), (hr, hz, old) = i.chunk(3, -1), functional.linear(state[0], W, bias).chunk(3, -1)
    z = torch.sigmoid(iz + hz)
    return ((1 - z) * torch.tanh(new + torch.sigmoid(ir + hr) * old) + z * state[0],)


def _plain(activation: Callable[[Tensor], Tensor]) -> Step:
    return lambda i, state, W, bias: (activation(i + functional.linear(state[0], W, bias)),)


_STEPS: dict[str, Step] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": _plain(torch.tanh),
    "rnn_relu": _plain(torch.relu),
}


def recurrent(kind: str, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """`torch.lstm`, `gru`, `rnn_tanh`, `rnn_relu` step by step; arguments as for `recurrent.recurrent_inputs`.

    Returns
    -------
    tuple of Tensor
        Outputs and last states, as torch gives them.
    """
    packed = isinstance(args[1], Tensor) and not args[1].is_floating_point()
    if packed:
        data, batch_sizes, states, weights, biases, layers, _, _, both = args[:9]
        first_axis = False
    else:
        source, states, weights, biases, layers, _, _, both, first_axis = args[:9]
        source = source.transpose(0, 1) if first_axis else source
        steps, batch = source.shape[:2]
        data, batch_sizes = source.flatten(0, 1), torch.full((steps,), batch)
    states = states if isinstance(states, list | tuple) else (states,)
    directions = 2 if both else 1
    each = len(weights) // (layers * directions)
    ends: list[State] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            own = list(weights[index * each : (index + 1) * each])
            order = torch.arange(len(data)) if direction == 0 else reversed_steps(batch_sizes)
            start = tuple(state[index] for state in states)
            hidden, end = _one_direction(kind, data[order.to(data.device)], batch_sizes, start, own, biases)
            ends.append(end)
            outputs.append(hidden[torch.argsort(order).to(data.device)])
        data = torch.cat(outputs, -1)
    lasts = tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
    if not packed:
        data = data.unflatten(0, (steps, batch))
        data = data.transpose(0, 1) if first_axis else data
    return data, *lasts


def _one_direction(
    kind: str, data: Tensor, batch_sizes: Tensor, state: State, own: Sequence[Tensor], biases: bool
) -> tuple[Tensor, State]:
    """Hidden states of all steps of packed rows, and the last ones of every sequence."""
    step = _STEPS[kind]
    projection = own[-1] if kind == "lstm" and len(own) == (5 if biases else 3) else None
    i = functional.linear(data, own[0], own[2] if biases else None)
    hidden, ended, at = [], [], 0
    for size in batch_sizes.tolist():
        # Sequences are sorted by length: those that are over leave from the end.
        ended.append(tuple(part[size:] for part in state))
        state = step(i[at : at + size], tuple(p[:size] for p in state), own[1], own[3] if biases else None)
        if projection is not None:
            state = (functional.linear(state[0], projection), *state[1:])
        hidden.append(state[0])
        at += size
    ended.append(state)
    return torch.cat(hidden), tuple(torch.cat(parts) for parts in zip(*reversed(ended), strict=True))


def cell(kind: str, a: Tensor, states: Any, first: Tensor, second: Tensor, *biases: Tensor | None) -> Any:
    """`torch.lstm_cell`, `gru_cell`, `rnn_tanh_cell`, `rnn_relu_cell`: one step."""
    state = tuple(states) if isinstance(states, list | tuple) else (states,)
    own, recurrent_bias = biases or (None, None)
    after = _STEPS[kind](functional.linear(a, first, own), state, second, recurrent_bias)
    return after if kind == "lstm" else after[0]


UNFUSED: dict[str, Callable[..., Any]] = {
    "multi_head_attention_forward": attention,
    **{kind: lambda *args, kind=kind: recurrent(kind, args) for kind in _STEPS},
    **{f"{kind}_cell": lambda *args, kind=kind: cell(kind, *args) for kind in _STEPS},
}
"""By the names of torch's functions."""
