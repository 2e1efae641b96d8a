"""The gradient of the loss of every sample: the rows of the empirical Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Loss = Callable[[Tensor, Tensor], Tensor]
"""Mean loss of a batch, from outputs (m, …) and targets (m, …)."""


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
