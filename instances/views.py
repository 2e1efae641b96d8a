"""Views of tensors: which memory they look at, and which rows of a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_NO_MEMORY = "none"


class NotFollowed(Exception):  # noqa: N818  (no error of the user's)
    """A call that multiplies in a way that cannot be followed."""


def memory_of(tensor: Tensor) -> tuple[str, int]:
    """Which memory a tensor is a view of."""
    try:
        return str(tensor.device), tensor.untyped_storage().data_ptr() if tensor.numel() else 0
    except (RuntimeError, NotImplementedError):  # sparse tensors, and others without memory of their own
        return _NO_MEMORY, id(tensor)


def is_wrapped(result: Any) -> bool:
    """Whether a transform of `torch.func` stands for more than the tensor shows, such as all samples of `vmap`."""
    return isinstance(result, Tensor) and result.layout is torch.strided and memory_of(result)[0] == _NO_MEMORY


def is_view(result: Any, args: Sequence[Any]) -> bool:
    """Whether a call only looked at a part of a tensor: the use of that part is what counts."""
    results = result if isinstance(result, list | tuple) else (result,)
    tensors = [part for part in results if isinstance(part, Tensor)]
    if not tensors or not args or not isinstance(args[0], Tensor):
        return not tensors
    return all(memory_of(part) == memory_of(args[0]) for part in tensors)


def part_of(matrix: Tensor, weight: Tensor, *, stacked: bool = False) -> tuple[int, int, bool]:
    """Which rows of a weight a view of it holds, and whether it is transposed.

    Those of a stack of matrices follow each other.
    """
    shapes = [weight]
    if stacked:
        shapes = [weight.flatten(0, 1)] if weight.is_contiguous() else []
    elif weight.dim() != 2 and weight.is_contiguous():
        shapes.append(weight.flatten(1))  # a convolution with kernels of one place, written as a product
    for whole in shapes:
        for flipped in (False, True) if whole.dim() == 2 == matrix.dim() else (False,):
            part = matrix.T if flipped else matrix
            offset, step = part.storage_offset() - whole.storage_offset(), max(whole.stride(0), 1)
            if _same_rows(part, whole) and offset % step == 0:
                return offset // step, offset // step + part.shape[0], flipped
    raise NotFollowed("a part of it is used in an order of its own")


def _same_rows(part: Tensor, whole: Tensor) -> bool:
    """Whether the rows of both have the same shape and steps in memory."""
    if part.dim() != whole.dim() or part.shape[1:] != whole.shape[1:]:
        return False
    steps = zip(part.shape, part.stride(), whole.stride(), strict=True)
    return all(length == 1 or a == b for length, a, b in steps)
