"""The inputs of the filters of a convolution as a matrix: plain or transposed, one to three axes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional


def convolution_patches(
    a: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: str | Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The inputs of every output place of a convolution.

    Parameters
    ----------
    a : (c, I, *places)
    kernel, stride, dilation : sequence of int, one for each axis of the places
    padding : "same", "valid" or sequence of int
    groups : int

    Returns
    -------
    Tensor (c, G, K, L)
        K = I/G · prod(kernel), in the order of a filter's weights; L output places. The output of the convolution
        is weight (G, O/G, K) times this.
    """
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if padding == "same":
        pads = [(span // 2, span - span // 2) for span in spans]
    elif isinstance(padding, str):
        pads = [(0, 0)] * len(spans)
    else:
        pads = [(p, p) for p in padding]
    if any(map(any, pads)):
        a = functional.pad(a, [p for pair in reversed(pads) for p in pair])
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        # (…, places, …) → (…, output places, …, kernel places)
        a = a.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    dims = len(kernel)
    order = [0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)]
    places = a.permute(order)
    return places.reshape(len(a), groups, a.shape[1] // groups * _count(kernel), -1)


def transposed_patches(
    a: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The inputs of every output place of a transposed convolution.

    Parameters
    ----------
    a : (c, I, *places)
    kernel, stride, padding, output_padding, dilation : sequence of int, one for each axis of the places
    groups : int

    Returns
    -------
    Tensor (c, G, K, L)
        K = I/G · prod(kernel), in the order (inputs, kernel) of a row of the instance. The output is the weight as
        (G, O/G, K) times this; entries are zero where an input does not reach an output place.
    """
    c, channels, *lengths = a.shape
    outputs = [
        (n - 1) * s - 2 * p + d * (k - 1) + q + 1
        for n, s, p, q, d, k in zip(lengths, stride, padding, output_padding, dilation, kernel, strict=True)
    ]
    out = a.new_zeros(c, channels, *kernel, *outputs)
    for offsets in product(*map(range, kernel)):
        source: list[slice] = []
        target: list[slice] = []
        for offset, n, s, p, d, length in zip(offsets, lengths, stride, padding, dilation, outputs, strict=True):
            # The input at i lands on i·s − p + offset·d.
            shift = offset * d - p
            first = max(0, -(shift // s) if shift < 0 else 0)
            last = min(n - 1, (length - 1 - shift) // s)
            source.append(slice(first, max(first, last + 1)))
            start = first * s + shift
            target.append(slice(start, start + (last - first) * s + 1, s) if last >= first else slice(0, 0))
        view = out
        for offset in offsets:  # the axes of the kernel come after those of samples and channels
            view = view.select(2, offset)
        view[(slice(None), slice(None), *target)] = a[(slice(None), slice(None), *source)]
    return out.reshape(c, groups, channels // groups * _count(kernel), _count(outputs))


def _count(lengths: Sequence[int]) -> int:
    return int(torch.Size(lengths).numel())
