"""The state in which a network is run: evaluation mode, single precision, with gradients where they are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_HALVES = (torch.float16, torch.bfloat16)


@contextmanager
def outside_inference() -> Iterator[None]:
    """Leave `torch.inference_mode`, in which no operation can be differentiated; also a decorator.

    Unlike `torch.no_grad` it cannot be undone by `torch.enable_grad`.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False):
        yield


def differentiable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made in `torch.inference_mode`, which no graph may hold."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


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


@contextmanager
def single_precision(model: nn.Module) -> Iterator[None]:
    """Convert tensors of half precision to float32 and restore them exactly.

    Every float16 and bfloat16 number is one of float32, so that nothing is lost either way.
    """
    tensors: list[tuple[Tensor, Tensor]] = []
    seen: set[int] = set()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dtype in _HALVES and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors.append((tensor, tensor.data))
    try:
        for tensor, half in tensors:
            tensor.data = half.float()
        yield
    finally:
        for tensor, half in tensors:
            tensor.data = half.to(tensor.device)


def is_half(model: nn.Module) -> bool:
    """Whether a parameter or buffer is of half precision."""
    return any(tensor.dtype in _HALVES for tensor in [*model.parameters(), *model.buffers()])


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, torch.compile and averaging wrappers: names then lack their prefixes."""
    from torch.optim.swa_utils import AveragedModel

    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, wrappers):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def fewest(model: nn.Module) -> int:
    """How many samples the network needs at once: 2 where a batch norm keeps no statistics of its own, else 1."""
    norms = (nn.modules.batchnorm._BatchNorm,)
    alone = all(module.running_mean is not None for module in model.modules() if isinstance(module, norms))
    return 1 if alone else 2
